"""A piece of memory that processes of one machine share, with the books of who uses which slot of it.

Everything lies in one file of a memory file system: a header, a ring of changed slots, one record and one row of pin
counts a slot, then the blocks. Changes happen under one file lock, which the kernel releases when its holder dies. Two
things keep a death from doing harm:

* A slot is reserved (``WRITING``, with its owner), then filled, then published (``READY``). What a dead process had
  reserved or pinned is given back: each process holds a lock of its own for as long as it lives, so others can tell.
* The header says that a change is under way. Whoever takes the lock and finds it said so was preceded by a death, and
  makes every process read all records again. A record's state is written last, so none is half true.
"""

from __future__ import annotations

import fcntl
import itertools
import mmap
import os
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import structlog
import xxhash
from numpy.typing import NDArray

from dynamo_core.clock import Clock, SystemClock
from dynamo_core.errors import ConfigurationError
from dynamo_core.kv import BlockDescriptor
from dynamo_kvbm._tiers.arena import HUGE_PAGE_BYTES, Pages, advise_huge, round_up
from dynamo_kvbm._tiers.fork_guard import ForkGuard

RECORD = np.dtype(
    [
        ("sequence_hash", "<u8"),
        ("local_hash", "<u8"),
        ("parent_hash", "<u8"),
        ("used", "<u8"),
        ("position", "<u4"),
        ("priority", "<i4"),
        ("has_parent", "<u2"),
        ("owner", "<u2"),
        ("state", "<u4"),
    ]
)
"""48 bytes a slot."""

FREE, WRITING, READY = 0, 1, 2
MAX_PROCESSES = 32
LOCK_TIMEOUT_S = 1.0
_LOCK_POLL_S = 0.0002
_LOCK_SPINS = 20
_MAGIC = int.from_bytes(b"DYNKVSH1", "little")
_HEADER_BYTES = 4096
_MIN_RING = 1024
_CLEAN_WORDS = 9
# Words of the header.
_IS, _BLOCK_BYTES, _CAPACITY, _FINGERPRINT, _EPOCH, _VERSION, _TICK, _DIRTY, _RING = range(_CLEAN_WORDS)

_log = structlog.get_logger(__name__)


class SharedArena:
    """One process's view of the shared memory.

    Args:
        folder: Where the file is; made if it does not exist. All processes name the same.
        capacity_blocks: Slots.
        block_bytes: Size of each.
        fingerprint: What the blocks are of; memory of other blocks is refused.
        clock: Ends waits for the lock.

    Raises:
        ConfigurationError: if the folder cannot be used, holds other blocks, has no room, or ``MAX_PROCESSES`` use it.
    """

    def __init__(
        self, folder: Path, capacity_blocks: int, block_bytes: int, fingerprint: str, clock: Clock | None = None
    ) -> None:
        self.capacity_blocks = capacity_blocks
        self._folder = folder
        self._clock = clock or SystemClock()
        self._pause = threading.Event()
        self._ring_slots = max(_MIN_RING, capacity_blocks)
        self._closed = False
        self._given_up = False
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _open(folder / "lock")
        except OSError as error:
            raise ConfigurationError(f"host_dir {folder}: {error.strerror}; give a writable folder") from error
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            self._attach(block_bytes, [block_bytes, capacity_blocks, xxhash.xxh3_64_intdigest(fingerprint.encode())])
        except BaseException:
            os.close(self._lock)
            raise
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        self.guard = ForkGuard(f"the shared host tier in {folder}", [self._lock, self._membership])

    @property
    def version(self) -> tuple[int, int]:
        """Epoch and count of changes. A process that has seen both has seen everything."""
        return self._header[_EPOCH], self._header[_VERSION]

    @property
    def settled(self) -> bool:
        """Whether no change is under way; a death during one counts as under way."""
        return not self._header[_DIRTY]

    @contextmanager
    def locked(self) -> Generator[bool]:
        """Take the lock; yield whether it was had in time. A stopped process must not stop all others."""
        if not self._take_lock():
            _log.warning("shared host tier is locked by another process", folder=str(self._folder))
            yield False
            return
        try:
            if self._header[_DIRTY]:
                _log.warning("a process died while it changed the shared host tier", folder=str(self._folder))
                self._header[_EPOCH] += 1
                self.reclaim()
            self._header[_DIRTY] = 1
            yield True
            # An error skips this: then the next holder of the lock takes it for a death, and all read again.
            self._header[_DIRTY] = 0
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def changed_since(self, seen: tuple[int, int]) -> Sequence[int]:
        """Return the slots that changed after ``seen``; all of them if the ring has forgotten some."""
        epoch, version = self.version
        if epoch != seen[0] or not 0 <= version - seen[1] <= self._ring_slots:
            return range(self.capacity_blocks)
        places = np.arange(seen[1], version, dtype=np.uint64) % np.uint64(self._ring_slots)
        return list(dict.fromkeys(self._changes[places].tolist()))

    def reserve(self, slot: int) -> None:
        """Take a slot for a block to come; under the lock."""
        self.records["owner"][slot] = self.member
        self._set_state(slot, WRITING)

    def publish(self, slot: int, block: BlockDescriptor) -> None:
        """Say what a reserved slot holds; under the lock."""
        record = self.records[slot]
        record["sequence_hash"] = block.sequence_hash
        record["local_hash"] = block.local_hash
        record["parent_hash"] = block.parent_hash or 0
        record["has_parent"] = block.parent_hash is not None
        record["position"] = block.position
        record["priority"] = block.priority
        record["used"] = self.tick()
        self._set_state(slot, READY)

    def free(self, slot: int) -> None:
        """Give a slot back; under the lock."""
        self._set_state(slot, FREE)

    def tick(self) -> int:
        """Return the next moment of the clock of uses. Two processes may get the same one, which does no harm."""
        self._header[_TICK] += 1
        return self._header[_TICK]

    def pin(self, slots: Sequence[int]) -> None:
        """Keep slots from being reused by others; under the lock."""
        self._pins[slots, self.member] += 1

    def unpin(self, slots: Sequence[int]) -> None:
        """Take back one pin of each slot. Only this process writes its column, so the lock is not needed."""
        self._pins[slots, self.member] -= 1

    def pinned(self, slot: int) -> bool:
        """Whether a living process keeps a slot; pins of dead ones are taken back. Under the lock."""
        holders: list[int] = np.flatnonzero(self._pins[slot]).tolist()
        dead = [member for member in holders if not self._alive(member)]
        self._pins[:, dead] = 0
        return len(dead) < len(holders)

    def reclaim(self) -> None:
        """Give back what dead processes had reserved; under the lock."""
        reserved = np.flatnonzero(self.records["state"] == WRITING)
        owners = self.records["owner"][reserved]
        for member in np.unique(owners).tolist():
            if not self._alive(member):
                for slot in reserved[owners == member].tolist():
                    self.free(slot)

    def close(self) -> None:
        """Leave. The memory, and the blocks in it, stay for the others and for the next process. Idempotent."""
        if not self._closed and not self.guard.is_foreign:
            self._closed = True
            self.guard.end()
            self._pins[:, self.member] = 0
            os.close(self._membership)
            os.close(self._lock)

    def _set_state(self, slot: int, state: int) -> None:
        self.records["state"][slot] = state
        self._changes[self._header[_VERSION] % self._ring_slots] = slot
        self._header[_VERSION] += 1

    def _take_lock(self) -> bool:
        now = self._clock.monotonic()
        # Once it could not be had, calls try once and do not wait, until it can be had again.
        deadline = now if self._given_up else now + LOCK_TIMEOUT_S
        for attempt in itertools.count():
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if self._clock.monotonic() >= deadline:
                    break
                if attempt < _LOCK_SPINS:
                    os.sched_yield()
                else:
                    self._pause.wait(_LOCK_POLL_S)
            else:
                self._given_up = False
                return True
        self._given_up = True
        return False

    def _attach(self, block_bytes: int, identity: list[int]) -> None:
        """Map the file, make it if nobody has, and become one of its processes; under the lock."""
        path = self._folder / "arena"
        books = _HEADER_BYTES + self._ring_slots * 4 + self.capacity_blocks * (RECORD.itemsize + 2 * MAX_PROCESSES)
        start = round_up(books, HUGE_PAGE_BYTES)
        size = round_up(start + self.capacity_blocks * block_bytes, HUGE_PAGE_BYTES)
        self._map_file(path, size, identity)
        flat = np.frombuffer(self._memory, dtype=np.uint8)
        ring_end = _HEADER_BYTES + self._ring_slots * 4
        records_end = ring_end + self.capacity_blocks * RECORD.itemsize
        self._changes = flat[_HEADER_BYTES:ring_end].view(np.uint32)
        self.records = flat[ring_end:records_end].view(RECORD)
        self._pins = flat[records_end:books].view(np.uint16).reshape(self.capacity_blocks, MAX_PROCESSES)
        self.blocks: NDArray[np.uint8] = flat[start : start + self.capacity_blocks * block_bytes].reshape(
            self.capacity_blocks, block_bytes
        )
        if not self._header[_IS]:
            for word, value in enumerate(identity, start=1):
                self._header[word] = value
            self._header[_IS] = _MAGIC
        self.member, self._membership = self._join()
        self._inherit()

    def _map_file(self, path: Path, size: int, identity: list[int]) -> None:
        try:
            descriptor = _open(path)
        except OSError as error:
            raise ConfigurationError(f"host_dir {path.parent}: {error.strerror}; give a writable folder") from error
        try:
            found = os.fstat(descriptor).st_size
            if found not in {0, size}:
                raise _other_blocks(path)
            os.posix_fallocate(descriptor, 0, size)  # later there is no way to say that memory ran out
            self._memory = mmap.mmap(descriptor, size)
        except OSError as error:
            raise ConfigurationError(
                f"host_dir {path.parent} needs {size} bytes: {error.strerror}; lower host_blocks or host_bytes"
            ) from error
        finally:
            os.close(descriptor)
        self._header = memoryview(self._memory)[: 8 * _CLEAN_WORDS].cast("Q")
        if self._header[_IS] and list(self._header[1:4]) != identity:
            raise _other_blocks(path)
        hugetlb = os.statvfs(path).f_bsize >= HUGE_PAGE_BYTES
        self.pages = Pages.HUGETLB if hugetlb else advise_huge(self._memory, "shmem_enabled")

    def _join(self) -> tuple[int, int]:
        for member in range(MAX_PROCESSES):
            descriptor = _open(self._folder / f"member.{member}")
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
            else:
                return member, descriptor
        raise ConfigurationError(f"host_dir {self._folder} is in use by {MAX_PROCESSES} processes; give another folder")

    def _inherit(self) -> None:
        """Put right what the last process with this number left, if it died."""
        if self._header[_DIRTY]:
            self._header[_EPOCH] += 1
            self._header[_DIRTY] = 0
        self._pins[:, self.member] = 0
        left = (self.records["state"] == WRITING) & (self.records["owner"] == self.member)
        for slot in np.flatnonzero(left).tolist():
            self.free(slot)

    def _alive(self, member: int) -> bool:
        if member == self.member:
            return True
        descriptor = _open(self._folder / f"member.{member}")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False


def described(record: NDArray[np.void]) -> BlockDescriptor:
    """Return the block that a record names."""
    sequence, local, parent, _, position, priority, has_parent, _, _ = record.item()
    return BlockDescriptor(sequence, local, parent if has_parent else None, position, priority)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _other_blocks(path: Path) -> ConfigurationError:
    return ConfigurationError(
        f"host_dir {path.parent} holds blocks of another number, size or model; give another folder, or delete it once "
        "no process uses it"
    )
