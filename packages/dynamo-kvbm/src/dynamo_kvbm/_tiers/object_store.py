"""G4, object store: one object a block, named by its content, shared by all workers of a model.

An object's name says which block of which model it is, so two workers that store the same block write the same object,
and a worker finds what another has written. Each object carries a header with a checksum, seeded with the block's
identity. A cut, damaged or misplaced object is a miss.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import structlog
import xxhash

from dynamo_core.clock import Clock, SystemClock
from dynamo_core.enums import Tier
from dynamo_core.errors import ConfigurationError, InvalidRequestError
from dynamo_core.kv import BlockDescriptor
from dynamo_kvbm._eviction.base import EvictionOrder
from dynamo_kvbm._eviction.lru import LruOrder

if TYPE_CHECKING:
    from obstore.store import ObjectStore

HEADER = struct.Struct("<8sQQQQIIQ")
"""Magic, sequence hash, local hash, parent hash, payload bytes, position, flags, checksum of the payload."""

MAGIC = b"DYNKVB01"
HAS_PARENT = 1
CONCURRENCY = 16
LIST_INTERVAL_S = 60.0

_log = structlog.get_logger(__name__)


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
        self._known: dict[int, BlockDescriptor | None] = {}
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
        """Return the descriptors of those of these blocks that were written or read by this tier."""
        with self._lock:
            found = [self._known.get(item) for item in sequence_hashes]
            return [block for block in found if block is not None]

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
            evicted = self._make_room(fresh)
        self._delete(evicted)
        written = list(self._pool.map(self._write, fresh))
        with self._lock:
            kept = [block for (block, _), done in zip(fresh, written, strict=True) if done]
            self._learn(kept)
        return evicted

    def get(self, sequence_hashes: Sequence[int]) -> list[bytes | memoryview | None]:
        """Return the bytes of each block, several at once; None for those that are absent or damaged."""
        present = [item for item, there in zip(sequence_hashes, self.contains(sequence_hashes), strict=True) if there]
        found = dict(zip(present, self._pool.map(self._read, present), strict=True))
        lost = [item for item, piece in found.items() if piece is None]
        self._forget(lost)
        return [found.get(item) for item in sequence_hashes]

    def remove(self, sequence_hashes: Sequence[int]) -> None:
        """Delete blocks; absent ones are ignored."""
        self._delete(self._forget(sequence_hashes))

    def refresh(self) -> None:
        """List the store: learn what others wrote, as far as there is room, and forget what they deleted."""
        started = set(self._known)
        listed = set(self._list())
        with self._lock:
            self._forget([item for item in started if item not in listed])
            room = self._capacity - len(self._known)
            fresh = [item for item in listed if item not in self._known][: max(0, room)]
            self._known.update(dict.fromkeys(fresh))
            self._order.insert([(item, None) for item in fresh])
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

    def _make_room(self, fresh: Sequence[tuple[BlockDescriptor, bytes | memoryview]]) -> list[int]:
        evicted: list[int] = []
        while len(self._known) + len(fresh) > self._capacity and (victim := self._order.evict()) is not None:
            del self._known[victim]
            evicted.append(victim)
        return evicted

    def _learn(self, blocks: Sequence[BlockDescriptor]) -> None:
        new = [block for block in blocks if block.sequence_hash not in self._known]
        self._known.update({block.sequence_hash: block for block in blocks})
        self._order.insert([(block.sequence_hash, block.parent_hash) for block in new])

    def _forget(self, sequence_hashes: Iterable[int]) -> list[int]:
        with self._lock:
            gone = [item for item in sequence_hashes if self._order.discard(item)]
            for item in gone:
                del self._known[item]
            return gone

    def _path(self, sequence_hash: int) -> str:
        return f"{self._folder}/{sequence_hash:016x}"

    def _list(self) -> Iterable[int]:
        import obstore

        for batch in obstore.list(self._store, prefix=self._folder + "/"):
            for meta in batch:
                name = meta["path"].rsplit("/", 1)[-1]
                if len(name) == 16 and not set(name) - set("0123456789abcdef"):
                    yield int(name, 16)

    def _write(self, pair: tuple[BlockDescriptor, bytes | memoryview]) -> bool:
        import obstore

        block, data = pair
        try:
            obstore.put(self._store, self._path(block.sequence_hash), _packed(block, data))
        except _store_errors() as error:
            self.failed_writes += 1
            _log.warning("object store cannot write", error=str(error))
            return False
        return True

    def _read(self, sequence_hash: int) -> memoryview | None:
        import obstore

        try:
            body = memoryview(obstore.get(self._store, self._path(sequence_hash)).bytes().to_bytes())
        except _store_errors() as error:
            _log.warning("object store cannot read", error=str(error))
            return None
        found = _unpacked(sequence_hash, body)
        if found is None:
            self.damaged_blocks += 1
            return None
        with self._lock:
            if sequence_hash in self._known:
                self._known[sequence_hash] = found[0]
        return found[1]

    def _delete(self, sequence_hashes: Sequence[int]) -> None:
        import obstore

        if not sequence_hashes:
            return
        try:
            obstore.delete(self._store, [self._path(item) for item in sequence_hashes])
        except _store_errors() as error:
            _log.warning("object store cannot delete", error=str(error), blocks=len(sequence_hashes))


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


def _packed(block: BlockDescriptor, data: bytes | memoryview) -> bytes:
    checksum = xxhash.xxh3_64_intdigest(data, block.sequence_hash)
    flags = 0 if block.parent_hash is None else HAS_PARENT
    header = HEADER.pack(
        MAGIC,
        block.sequence_hash,
        block.local_hash,
        block.parent_hash or 0,
        len(data),
        block.position,
        flags,
        checksum,
    )
    return b"".join((header, data))


def _unpacked(sequence_hash: int, body: memoryview) -> tuple[BlockDescriptor, memoryview] | None:
    """Return a block, or None if the object is not whole, or not that block."""
    if len(body) < HEADER.size:
        return None
    magic, identity, local, parent, size, position, flags, checksum = HEADER.unpack_from(body)
    data = body[HEADER.size :]
    if magic != MAGIC or identity != sequence_hash or size != len(data):
        return None
    if xxhash.xxh3_64_intdigest(data, sequence_hash) != checksum:
        return None
    return BlockDescriptor(identity, local, parent if flags & HAS_PARENT else None, position), data
