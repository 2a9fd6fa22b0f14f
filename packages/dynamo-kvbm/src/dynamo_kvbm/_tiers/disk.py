"""G3, local disk: content-addressed blocks in preallocated segment files that survive a restart.

Every read is compared with the block's checksum, which is seeded with the block's identity. A torn write, a flipped bit
or bytes of another block are a miss and leave the tier, never an answer.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import structlog
from numpy.typing import NDArray

from dynamo_core.enums import Tier
from dynamo_core.errors import ConfigurationError, InternalError
from dynamo_core.kv import BlockDescriptor
from dynamo_kvbm._eviction.base import EvictionOrder
from dynamo_kvbm._eviction.lru import LruOrder
from dynamo_kvbm._tiers.base import Spill, require_pieces
from dynamo_kvbm._tiers.fork_guard import ForkGuard, OwnersLock
from dynamo_kvbm._tiers.read_memory import ReadMemory
from dynamo_kvbm._tiers.slot_file import RECORD, SlotFile, StoredBlock, aligned_bytes, data_checksum, slot_stride

T = TypeVar("T")
R = TypeVar("R")

SEGMENT_BYTES = 256 * 1024**2
IO_THREADS = 4
FORMAT = "dynamo-kvbm-disk-v1"

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class _Place:
    segment: int
    slot: int
    stored: StoredBlock


class DiskTier:
    """A ``BlockStore`` in a folder.

    Any thread may call any method; in a child forked from its process they raise ``ConflictError``. One lock guards
    the books; reads and writes run outside it, on slots that nobody else may take meanwhile. A block is held only once
    it is written; a block that cannot be written is not held.

    Args:
        folder: Made if it does not exist. One process owns it at a time.
        capacity_blocks: Most blocks.
        block_bytes: Size of every block.
        fingerprint: What the blocks are of (model, layout, hash algorithm); a folder of another one is refused.
        eviction: Makes the eviction order for a capacity.
        direct: Go past the page cache where the file system can.

    Raises:
        ConfigurationError: if the folder cannot be used, is owned by another process, or holds other blocks.
    """

    def __init__(
        self,
        folder: Path,
        capacity_blocks: int,
        block_bytes: int,
        *,
        fingerprint: str = "",
        eviction: Callable[[int], EvictionOrder] = LruOrder,
        direct: bool = True,
    ) -> None:
        if capacity_blocks < 1 or block_bytes < 1:
            raise ConfigurationError(
                f"a disk tier of {capacity_blocks} blocks of {block_bytes} bytes holds nothing; give both at least 1"
            )
        self._capacity = capacity_blocks
        self._block_bytes = block_bytes
        self._slots_per_segment = max(1, min(capacity_blocks, SEGMENT_BYTES // slot_stride(block_bytes)))
        self._stride = slot_stride(block_bytes)
        self._direct = direct
        self._folder = folder
        self._owner = _take_folder(folder, {"format": FORMAT, "block_bytes": block_bytes, "blocks_of": fingerprint})
        self._guard = ForkGuard(f"the disk tier in {folder}", [self._owner])
        self._lock = OwnersLock(self._guard)
        self._io = ThreadPoolExecutor(IO_THREADS - 1, thread_name_prefix="kvbm-disk")
        self._memory = ReadMemory()
        self._segments: list[SlotFile] = []
        self._free: list[tuple[int, int]] = []
        self._places: dict[int, _Place] = {}
        self._order = eviction(capacity_blocks)
        self._writing = 0
        self._closed = False
        self._spill: Spill | None = None
        self.damaged_blocks = 0
        self.failed_writes = 0
        self._recover()

    @property
    def tier(self) -> Tier:
        """``Tier.DISK``."""
        return Tier.DISK

    @property
    def capacity_blocks(self) -> int:
        """Most blocks."""
        return self._capacity

    @property
    def used_blocks(self) -> int:
        """Blocks held."""
        return len(self._places)

    def held(self) -> list[BlockDescriptor]:
        """Return every block held, for example to announce what a restart found."""
        with self._lock:
            return [place.stored.descriptor for place in self._places.values()]

    def describe(self, sequence_hashes: Sequence[int]) -> list[BlockDescriptor]:
        """Return the descriptors of those of these blocks that are present."""
        with self._lock:
            return [self._places[item].stored.descriptor for item in sequence_hashes if item in self._places]

    def contains(self, sequence_hashes: Sequence[int]) -> list[bool]:
        """Whether each block is present."""
        with self._lock:
            return [sequence_hash in self._places for sequence_hash in sequence_hashes]

    def spill_to(self, receive: Spill) -> None:
        """Read victims back and hand them to ``receive``, on the thread that calls ``put``, without the lock."""
        self._spill = receive

    def touch(self, prefix: Sequence[int]) -> None:
        """Mark the blocks of a prefix, root first, as used now; absent ones are ignored."""
        with self._lock:
            self._order.touch([sequence_hash for sequence_hash in prefix if sequence_hash in self._places])

    def put(self, blocks: Sequence[BlockDescriptor], data: Sequence[bytes | memoryview]) -> list[int]:
        """Store blocks and return what was evicted for them; see ``BlockStore.put``.

        A block that finds no room, or whose write fails, is not held; ``contains`` tells.

        Raises:
            InvalidRequestError: if a piece has another size than the tier's blocks.
        """
        require_pieces(blocks, data, self._block_bytes)
        with self._lock:
            pairs = list(zip(blocks, data, strict=True))
            self._order.touch([block.sequence_hash for block, _ in pairs if block.sequence_hash in self._places])
            fresh = {
                block.sequence_hash: (block, piece) for block, piece in pairs if block.sequence_hash not in self._places
            }
            slots, victims = self._take_slots([block for block, _ in fresh.values()])
        self._hand_on(victims)
        writes = [(*given, *slot) for given, slot in zip(fresh.values(), slots, strict=False)]
        self._each(lambda write: self._write(*write), writes)
        return [place.stored.descriptor.sequence_hash for place in victims]

    def get(self, sequence_hashes: Sequence[int]) -> list[bytes | memoryview | None]:
        """Return the bytes of each block, None for those that are absent or damaged; damaged ones are dropped.

        The blocks of one call share one piece of memory, which goes when the last of them does.
        """
        with self._lock:
            places = [self._places.get(sequence_hash) for sequence_hash in sequence_hashes]
            found = [place.stored.descriptor.sequence_hash for place in places if place is not None]
            self._order.pin(found)
        data = self._read_all(places)
        with self._lock:
            self._order.unpin(found)
            for place, piece in zip(places, data, strict=True):
                if place is not None and piece is None:
                    self._drop(place)
        return list(data)

    def remove(self, sequence_hashes: Sequence[int]) -> None:
        """Drop blocks that are not being read; absent ones are ignored."""
        with self._lock:
            for sequence_hash in sequence_hashes:
                if self._order.discard(sequence_hash):
                    self._release(self._places.pop(sequence_hash))

    def sync(self) -> None:
        """Wait until everything is on the medium, against loss of power; a killed process loses nothing without it."""
        for segment in self._segments:
            segment.sync()

    def check_integrity(self) -> None:
        """Verify the books and compare every block with its checksum.

        Raises:
            InternalError: with what is wrong.
        """
        with self._lock:
            self._order.check_integrity()
            slots = [(place.segment, place.slot) for place in self._places.values()] + self._free
            if len(slots) != len(set(slots)) or len(self._order) != len(self._places):
                raise InternalError("a slot is in use twice, or the order holds other blocks")
            damaged = [place for place in self._places.values() if self._read(place) is None]
            if damaged:
                raise InternalError(f"{len(damaged)} blocks do not fit their checksums")

    def close(self) -> None:
        """Close the files; the blocks stay for the next owner. Idempotent, and nothing in a forked child."""
        if self._guard.is_foreign:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._guard.end()
            self._io.shutdown()
            for segment in self._segments:
                segment.close()
            os.close(self._owner)

    def _each(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Do several reads or writes at once, so that one is checked while another is under way."""
        if len(items) < 2:
            return [work(item) for item in items]
        share = -(-len(items) // IO_THREADS)
        shares = [items[start : start + share] for start in range(0, len(items), share)]

        def do_share(part: Sequence[T]) -> list[R]:
            return [work(item) for item in part]

        others = [self._io.submit(do_share, part) for part in shares[1:]]
        # The caller would only wait, so it does a share; the others must end before it may fail.
        try:
            done = do_share(shares[0])
        finally:
            wait(others)
        return [*done, *(item for other in others for item in other.result())]

    def _recover(self) -> None:
        for index in sorted(self._folder.glob("*.index")):
            if not self._grow(index.stat().st_size // RECORD.itemsize):
                raise ConfigurationError(f"disk tier segment {index} cannot be opened; repair or delete {self._folder}")
        for number, segment in enumerate(self._segments):
            used: set[int] = set()
            for slot, stored in segment.records():
                sequence_hash = stored.descriptor.sequence_hash
                if sequence_hash not in self._places and len(self._places) < self._capacity:
                    self._places[sequence_hash] = _Place(number, slot, stored)
                    used.add(slot)
            self._free = [place for place in self._free if place[0] != number or place[1] not in used]
        self._order.insert([(key, place.stored.descriptor.parent_hash) for key, place in self._places.items()])

    def _grow(self, slots: int) -> bool:
        number = len(self._segments)
        try:
            segment = SlotFile(self._folder, number, slots, self._block_bytes, direct=self._direct)
        except OSError as error:
            _log.warning("disk tier cannot grow", folder=str(self._folder), error=str(error))
            return False
        self._segments.append(segment)
        self._free += [(number, slot) for slot in range(segment.slots - 1, -1, -1)]
        return True

    def _take_slots(self, fresh: Sequence[BlockDescriptor]) -> tuple[list[tuple[int, int]], list[_Place]]:
        """Return slots for as many of the blocks as fit, and what was evicted; held parents of new blocks stay."""
        parents = [block.parent_hash for block in fresh if block.parent_hash is not None]
        kept = [parent for parent in parents if parent in self._places]
        self._order.pin(kept)
        slots: list[tuple[int, int]] = []
        victims: list[_Place] = []
        while len(slots) < len(fresh) and (slot := self._take_slot(victims)) is not None:
            self._writing += 1
            slots.append(slot)
        self._order.unpin(kept)
        return slots, victims

    def _take_slot(self, victims: list[_Place]) -> tuple[int, int] | None:
        full = len(self._places) + self._writing >= self._capacity
        if not full and (self._free or self._grow(self._slots_per_segment)):
            return self._free.pop()
        victim = self._order.evict()
        if victim is None:
            return None
        # The victim's bytes stay readable in its slot until the new block is written there.
        place = self._places.pop(victim)
        victims.append(place)
        return place.segment, place.slot

    def _hand_on(self, victims: Sequence[_Place]) -> None:
        if self._spill is None or not victims:
            return
        read = [(place.stored.descriptor, self._read(place)) for place in victims]
        whole = [(block, data) for block, data in read if data is not None]
        self.damaged_blocks += len(read) - len(whole)
        self._spill([block for block, _ in whole], [data for _, data in whole])

    def _write(self, block: BlockDescriptor, data: bytes | memoryview, segment: int, slot: int) -> None:
        try:
            stored = self._segments[segment].write(slot, block, data)
        except OSError as error:
            _log.warning("disk tier cannot write", folder=str(self._folder), error=str(error))
            with self._lock:
                self._writing -= 1
                self.failed_writes += 1
                self._free.append((segment, slot))
            return
        with self._lock:
            self._writing -= 1
            if block.sequence_hash in self._places:  # another thread wrote the same block meanwhile
                self._release(_Place(segment, slot, stored))
                return
            self._places[block.sequence_hash] = _Place(segment, slot, stored)
            self._order.insert([(block.sequence_hash, block.parent_hash)])

    def _read_all(self, places: Sequence[_Place | None]) -> list[memoryview | None]:
        memory = self._memory.take(self._stride * sum(place is not None for place in places))
        pieces = iter(memory.reshape(-1, self._stride))
        work = [None if place is None else (place, next(pieces)) for place in places]
        return self._each(lambda pair: None if pair is None else self._read(*pair), work)

    def _read(self, place: _Place, into: NDArray[np.uint8] | None = None) -> memoryview | None:
        try:
            memory = aligned_bytes(self._stride) if into is None else into
            data = self._segments[place.segment].read(place.slot, memory)
        except OSError as error:
            _log.warning("disk tier cannot read", folder=str(self._folder), error=str(error))
            return None
        expected = place.stored.data_checksum
        whole = data_checksum(place.stored.descriptor.sequence_hash, data) == expected
        return data if whole else None

    def _drop(self, place: _Place) -> None:
        sequence_hash = place.stored.descriptor.sequence_hash
        self.damaged_blocks += 1
        if self._places.get(sequence_hash) is place and self._order.discard(sequence_hash):
            self._release(self._places.pop(sequence_hash))

    def _release(self, place: _Place) -> None:
        self._segments[place.segment].clear(place.slot)
        self._free.append((place.segment, place.slot))


def _take_folder(folder: Path, identity: dict[str, object]) -> int:
    """Make the folder, lock it, and check or write what it is of; return the lock's descriptor."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = os.open(folder / "owner.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigurationError(f"disk tier folder {folder}: {error.strerror}; give a writable folder") from error
    try:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _check_identity(folder / "identity.json", identity)
    except BlockingIOError as error:
        os.close(owner)
        raise ConfigurationError(
            f"disk tier folder {folder} belongs to a running process; give each worker a folder of its own"
        ) from error
    except BaseException:
        os.close(owner)
        raise
    return owner


def _check_identity(path: Path, identity: dict[str, object]) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(identity), encoding="utf-8")
        temporary.replace(path)
        return
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}; delete its folder to start empty") from error
    if found != identity:
        raise ConfigurationError(
            f"disk tier folder {path.parent} holds blocks of {found}, not of {identity}; "
            "give another folder or delete it"
        )
