"""Shared memory between two processes of one host: a segment of slots, mapped by both."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
from pathlib import Path
from typing import Generic, Protocol, TypeVar

SHARED_FOLDER = Path("/dev/shm")
SEGMENT_SLOTS = 4
SLOT_BYTES = 1 << 22
MAX_SEGMENTS = 4
_MARKER = "-0"
_MARKER_BYTES = 16


class SlotMemory(Protocol):
    """A piece of memory that slots lie in, on the sender's side."""

    view: memoryview

    @property
    def name(self) -> str:
        """What a receiver needs to read it."""
        ...

    def close(self) -> None:
        """Give it up."""
        ...


T = TypeVar("T", bound=SlotMemory)


class Segment:
    """A file in memory, mapped for reading and writing.

    Args:
        path: The file.
        size_bytes: Its length.
        create: Whether to make it; then ``close`` removes it.

    Raises:
        OSError: if it cannot be made or opened.
    """

    def __init__(self, path: Path, size_bytes: int, *, create: bool) -> None:
        flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0)
        descriptor = os.open(path, flags, 0o600)
        try:
            if create:
                os.posix_fallocate(descriptor, 0, size_bytes)
            elif os.fstat(descriptor).st_size != size_bytes:
                raise OSError(f"shared memory {path} has another size than {size_bytes} bytes")
            self._map = mmap.mmap(descriptor, size_bytes, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        finally:
            os.close(descriptor)
        self.path = path
        self.view = memoryview(self._map)
        self._owned = create

    @property
    def name(self) -> str:
        """Its path."""
        return str(self.path)

    async def read(self, start: int, size: int) -> memoryview:
        """Return a piece of it, without a copy."""
        return self.view[start : start + size]

    def close(self) -> None:
        """Unmap it and, if it was made here, remove it. Idempotent."""
        # A copy that nobody waits for any more may still hold the memory; it is unmapped with the last of them.
        with contextlib.suppress(BufferError):
            self.view.release()
            self._map.close()
        if self._owned:
            self.path.unlink(missing_ok=True)


class LendingPool(Generic[T]):
    """Memory for transfers, used again and again.

    Args:
        limit: Most pieces.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._free: list[T] = []
        self._lent = 0

    def make(self) -> T:
        """Make another piece.

        Raises:
            OSError: if memory is short.
        """
        raise OSError("this pool makes nothing")

    def take(self) -> T | None:
        """Lend a piece; None if all are lent or memory is short."""
        if self._free:
            self._lent += 1
            return self._free.pop()
        if self._lent >= self._limit:
            return None
        try:
            made = self.make()
        except OSError:
            return None
        self._lent += 1
        return made

    def give_back(self, piece: T, *, reusable: bool) -> None:
        """Take a piece back; one that a receiver may still read is thrown away."""
        self._lent -= 1
        if reusable:
            self._free.append(piece)
        else:
            piece.close()

    def close(self) -> None:
        """Close all that is not lent. Idempotent."""
        for piece in self._free:
            piece.close()
        self._free.clear()


class SegmentPool(LendingPool[Segment]):
    """Segments of one sending process: fresh shared memory costs more than the copy into it.

    Args:
        size_bytes: Length of each.
        limit: Most segments.
    """

    def __init__(self, size_bytes: int, limit: int) -> None:
        super().__init__(limit)
        self.size_bytes = size_bytes
        self._prefix = f"dynamo-kv-{os.getpid()}-{secrets.token_hex(4)}"
        self._made = 0
        self._lock = -1
        remove_abandoned()
        self.marker = self._make_marker()

    def make(self) -> Segment:
        """Make another segment."""
        if not self.marker:
            raise OSError("there is no shared memory")
        self._made += 1
        return Segment(SHARED_FOLDER / f"{self._prefix}-{self._made}", self.size_bytes, create=True)

    def close(self) -> None:
        """Remove all segments and the marker. Idempotent."""
        super().close()
        if self.marker:
            Path(self.marker.split(":")[0]).unlink(missing_ok=True)
            self.marker = ""
            os.close(self._lock)

    def _make_marker(self) -> str:
        path, content = SHARED_FOLDER / f"{self._prefix}{_MARKER}", secrets.token_hex(_MARKER_BYTES)
        unlocked = path.with_suffix(".new")
        try:
            self._lock = os.open(unlocked, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError:
            return ""
        os.write(self._lock, content.encode())
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unlocked.rename(path)
        return f"{path}:{content}"


def remove_abandoned() -> None:
    """Remove what killed processes left: a living one holds the lock of its marker."""
    for marker in SHARED_FOLDER.glob(f"dynamo-kv-*{_MARKER}"):
        try:
            with marker.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for path in SHARED_FOLDER.glob(f"{marker.name.removesuffix(_MARKER)}-*"):
                    path.unlink(missing_ok=True)
        except OSError:
            continue  # somebody lives there, or it is not ours


def is_shared(marker: str) -> bool:
    """Whether the sender's marker can be read here, so that both see the same memory files."""
    path, _, content = marker.rpartition(":")
    if not path or Path(path).parent != SHARED_FOLDER:
        return False
    try:
        return Path(path).read_text(encoding="ascii") == content
    except (OSError, UnicodeDecodeError):
        return False


def segment_pool(block_bytes: int) -> SegmentPool:
    """Return a pool whose segments hold ``SEGMENT_SLOTS`` slots."""
    return SegmentPool(SEGMENT_SLOTS * slot_bytes(block_bytes), MAX_SEGMENTS)


def slot_bytes(block_bytes: int) -> int:
    """Return the length of a slot: whole blocks, at least one."""
    return max(1, SLOT_BYTES // block_bytes) * block_bytes
