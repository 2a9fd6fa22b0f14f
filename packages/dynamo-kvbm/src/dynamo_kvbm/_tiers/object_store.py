"""G4, object store: one object a block, named by its content, shared by all workers of a model.

An object's name says which block of which model it is and which it continues, so two workers that store the same block
write the same object, and a listing tells a worker all that it needs to announce what others, or itself before a
restart, have written. Each object carries a header with a checksum, seeded with the block's
identity. A cut, damaged or misplaced object is a miss.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog
import xxhash

from dynamo_core.clock import Clock, SystemClock
from dynamo_core.enums import Tier
from dynamo_core.errors import ConfigurationError, InvalidRequestError
from dynamo_core.kv import BlockDescriptor
from dynamo_kvbm._eviction.base import EvictionOrder
from dynamo_kvbm._eviction.lru import LruOrder
from dynamo_kvbm._tiers.packed_block import packed_block, unpacked_block

if TYPE_CHECKING:
    from obstore.store import ObjectStore

CONCURRENCY = 16
LIST_INTERVAL_S = 60.0

_NAME = re.compile(r"([0-9a-f]{16})(?:-([0-9a-f]{16})-([0-9a-f]{16})?-([0-9a-f]{1,8}))?")

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class _Object:
    """What is known of an object; the block is None if its name does not say more than its hash."""

    name: str
    sequence_hash: int
    block: BlockDescriptor | None

    @property
    def parent_hash(self) -> int | None:
        return None if self.block is None else self.block.parent_hash

    @property
    def position(self) -> int:
        return 0 if self.block is None else self.block.position


class ObjectTier:
    """A ``BlockStore`` in an object store. Blocks may have any size.

    What the store holds is known from a listing at start, from own writes, and from a listing a minute, made by the
    thread that writes. ``contains`` is a look into that knowledge and asks nobody.

    Args:
        url: ``s3://bucket/prefix``, or another URL that obstore knows.
        capacity_blocks: Most blocks known and kept; the next one beyond that deletes one.
        fingerprint: What the blocks are of; others are stored beside and never seen.
        config: Options of the store, for example ``endpoint``, ``region`` and credentials. What is not given comes from
            the environment, as obstore reads it.
        eviction: Makes the eviction order for a capacity.
        list_interval_s: Seconds between listings.
        clock: Time of the listings.

    Raises:
        ConfigurationError: if the extra ``object`` is not installed, the URL is not known, or the store cannot be
            listed.
    """

    def __init__(  # noqa: PLR0913 - built in one place, every argument by name
        self,
        url: str,
        capacity_blocks: int,
        *,
        fingerprint: str,
        config: Mapping[str, Any] | None = None,
        eviction: Callable[[int], EvictionOrder] = LruOrder,
        list_interval_s: float = LIST_INTERVAL_S,
        clock: Clock | None = None,
    ) -> None:
        if capacity_blocks < 1:
            raise ConfigurationError(f"an object tier of {capacity_blocks} blocks holds nothing; give at least 1")
        self._store = _open_store(url, config or {})
        self._capacity = capacity_blocks
        self._folder = xxhash.xxh3_128_hexdigest(fingerprint.encode())
        self._lock = threading.RLock()
        self._order = eviction(capacity_blocks)
        self._known: dict[int, _Object] = {}
        self._changes: dict[int, None] | None = {}
        self._writing = 0
        self._pool = ThreadPoolExecutor(CONCURRENCY, thread_name_prefix="kvbm-object")
        self._clock = clock or SystemClock()
        self._list_interval_s = list_interval_s
        self._listed_s = self._clock.monotonic()
        self.damaged_blocks = 0
        self.failed_writes = 0
        try:
            self.refresh()
        except _store_errors() as error:
            self._pool.shutdown()
            raise ConfigurationError(f"object store {url} cannot be listed: {error}") from error
        self._changes = {}

    @property
    def tier(self) -> Tier:
        """``Tier.EXTERNAL``."""
        return Tier.EXTERNAL

    @property
    def capacity_blocks(self) -> int:
        """Most blocks known and kept."""
        return self._capacity

    def contains(self, sequence_hashes: Sequence[int]) -> list[bool]:
        """Whether each block is known to be present."""
        with self._lock:
            return [item in self._known for item in sequence_hashes]

    def describe(self, sequence_hashes: Sequence[int]) -> list[BlockDescriptor]:
        """Return the descriptors of those of these blocks that are known to be present."""
        with self._lock:
            found = [self._known[item].block for item in sequence_hashes if item in self._known]
            return [block for block in found if block is not None]

    def held(self) -> list[BlockDescriptor]:
        """Return every block known to be present, for example to announce what a restart found."""
        with self._lock:
            return self.describe(list(self._known))

    def drain_changes(self) -> list[int] | None:
        """Return the blocks that listings found or missed since the last call; None if they were too many to note."""
        with self._lock:
            changes, self._changes = self._changes, {}
            return None if changes is None else list(changes)

    def touch(self, prefix: Sequence[int]) -> None:
        """Mark the blocks of a prefix, root first, as used now; absent ones are ignored."""
        with self._lock:
            self._order.touch([item for item in prefix if item in self._known])

    def put(self, blocks: Sequence[BlockDescriptor], data: Sequence[bytes | memoryview]) -> list[int]:
        """Store blocks that are not known, several at once, and return what was deleted for them.

        A block whose write fails is not held; ``contains`` tells.

        Raises:
            InvalidRequestError: if there are more or fewer pieces than blocks.
        """
        if len(blocks) != len(data):
            raise InvalidRequestError(f"{len(blocks)} blocks came with {len(data)} pieces of data", param="data")
        self._refresh_if_due()
        pieces = {block.sequence_hash: (block, piece) for block, piece in zip(blocks, data, strict=True)}
        with self._lock:
            self.touch(list(pieces))
            fresh = [pair for item, pair in pieces.items() if item not in self._known][: self._capacity]
            evicted = self._make_room(len(fresh))
            # What other threads are writing needs its room too, and cannot be evicted yet.
            fresh = fresh[: max(0, self._capacity - len(self._known) - self._writing)]
            self._writing += len(fresh)
        self._delete(evicted.values())
        written = list(self._pool.map(self._write, fresh))
        with self._lock:
            self._writing -= len(fresh)
            kept = [block for (block, _), done in zip(fresh, written, strict=True) if done]
            self._learn(kept)
        return list(evicted)

    def get(self, sequence_hashes: Sequence[int]) -> list[bytes | memoryview | None]:
        """Return the bytes of each block, several at once; None for those that are absent or damaged."""
        present = [item for item, there in zip(sequence_hashes, self.contains(sequence_hashes), strict=True) if there]
        found = dict(zip(present, self._pool.map(self._read, present), strict=True))
        lost = [item for item, piece in found.items() if piece is None]
        self._take_out(lost)
        return [found.get(item) for item in sequence_hashes]

    def remove(self, sequence_hashes: Sequence[int]) -> None:
        """Delete blocks; absent ones are ignored."""
        self._delete(self._take_out(sequence_hashes).values())

    def refresh(self) -> None:
        """List the store: learn what others wrote, as far as there is room, and forget what they deleted."""
        started = set(self._known)
        listed = dict(self._list())
        with self._lock:
            gone = self._take_out([item for item in started if item not in listed])
            room = self._capacity - len(self._known) - self._writing
            fresh = [item for item in listed if item not in self._known][: max(0, room)]
            self._known.update({item: listed[item] for item in fresh})
            blocks = sorted((listed[item] for item in fresh), key=lambda found: found.position)
            self._order.insert([(found.sequence_hash, found.parent_hash) for found in blocks])
            self._note([*gone, *fresh])
        self._listed_s = self._clock.monotonic()

    def close(self) -> None:
        """End the threads; the objects stay. Idempotent."""
        self._pool.shutdown()

    def _refresh_if_due(self) -> None:
        if self._clock.monotonic() - self._listed_s < self._list_interval_s:
            return
        try:
            self.refresh()
        except _store_errors() as error:
            _log.warning("object store cannot be listed", error=str(error))
            self._listed_s = self._clock.monotonic()

    def _make_room(self, count: int) -> dict[int, str]:
        evicted: dict[int, str] = {}
        while len(self._known) + self._writing + count > self._capacity and (victim := self._order.evict()) is not None:
            evicted[victim] = self._known.pop(victim).name
        return evicted

    def _learn(self, blocks: Sequence[BlockDescriptor]) -> None:
        new = [block for block in blocks if block.sequence_hash not in self._known]
        self._known.update({block.sequence_hash: _Object(_name(block), block.sequence_hash, block) for block in blocks})
        self._order.insert([(block.sequence_hash, block.parent_hash) for block in new])

    def _take_out(self, sequence_hashes: Iterable[int]) -> dict[int, str]:
        """Forget blocks; return those that were known, with the names of their objects."""
        with self._lock:
            gone = [item for item in sequence_hashes if self._order.discard(item)]
            return {item: self._known.pop(item).name for item in gone}

    def _note(self, sequence_hashes: Iterable[int]) -> None:
        if self._changes is not None:
            self._changes.update(dict.fromkeys(sequence_hashes))
            if len(self._changes) > 2 * self._capacity:
                self._changes = None

    def _list(self) -> Iterable[tuple[int, _Object]]:
        import obstore

        for batch in obstore.list(self._store, prefix=self._folder + "/"):
            for meta in batch:
                found = _named(meta["path"].rsplit("/", 1)[-1])
                if found is not None:
                    yield found.sequence_hash, found

    def _write(self, pair: tuple[BlockDescriptor, bytes | memoryview]) -> bool:
        import obstore

        block, data = pair
        try:
            obstore.put(self._store, f"{self._folder}/{_name(block)}", packed_block(block, data))
        except _store_errors() as error:
            self.failed_writes += 1
            _log.warning("object store cannot write", error=str(error))
            return False
        return True

    def _read(self, sequence_hash: int) -> memoryview | None:
        import obstore

        with self._lock:
            known = self._known.get(sequence_hash)
        if known is None:
            return None
        try:
            body = memoryview(obstore.get(self._store, f"{self._folder}/{known.name}").bytes().to_bytes())
        except _store_errors() as error:
            _log.warning("object store cannot read", error=str(error))
            return None
        found = unpacked_block(sequence_hash, body)
        if found is None:
            self.damaged_blocks += 1
            return None
        with self._lock:
            if sequence_hash in self._known:
                if known.block is None:
                    self._note([sequence_hash])
                self._known[sequence_hash] = _Object(known.name, sequence_hash, found[0])
        return found[1]

    def _delete(self, names: Iterable[str]) -> None:
        import obstore

        paths = [f"{self._folder}/{name}" for name in names]
        if not paths:
            return
        try:
            obstore.delete(self._store, paths)
        except _store_errors() as error:
            _log.warning("object store cannot delete", error=str(error), blocks=len(paths))


def _name(block: BlockDescriptor) -> str:
    parent = "" if block.parent_hash is None else f"{block.parent_hash:016x}"
    return f"{block.sequence_hash:016x}-{block.local_hash:016x}-{parent}-{block.position:x}"


def _named(name: str) -> _Object | None:
    """Read the name of an object; None for what is no block."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    sequence, local, parent, position = found.groups()
    if local is None:  # written by release 0.1
        return _Object(name, int(sequence, 16), None)
    parent_hash = int(parent, 16) if parent else None
    block = BlockDescriptor(int(sequence, 16), int(local, 16), parent_hash, int(position, 16))
    return _Object(name, block.sequence_hash, block)


def _open_store(url: str, config: Mapping[str, Any]) -> ObjectStore:
    try:
        import obstore.store
    except ImportError as error:
        raise ConfigurationError("an object tier needs a library: pip install 'dynamo-kvbm[object]'") from error
    options = dict(config)
    client: dict[str, Any] = {"timeout": "30s", "connect_timeout": "5s"}
    if str(options.get("endpoint", "")).startswith("http://"):
        client["allow_http"] = True
    # Which options there are depends on the URL, which only the library can tell.
    from_url: Callable[..., ObjectStore] = obstore.store.from_url
    try:
        if url.startswith(("memory:", "file:")):
            return from_url(url)
        return from_url(url, config=options, client_options=client, retry_config={"max_retries": 3})
    except (*_store_errors(), ValueError) as error:
        raise ConfigurationError(f"object store {url!r} cannot be opened: {error}") from error


def _store_errors() -> tuple[type[Exception], ...]:
    from obstore.exceptions import BaseError

    return (BaseError, OSError)
