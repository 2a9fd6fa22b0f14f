"""Shared memory between two processes of one host: a segment of slots, mapped by both."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
from pathlib import Path

SHARED_FOLDER = Path("/dev/shm")
SEGMENT_SLOTS = 4
SLOT_BYTES = 1 << 22
MAX_SEGMENTS = 4
_MARKER = "-0"
_MARKER_BYTES = 16


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

    def close(self) -> None:
        """Unmap it and, if it was made here, remove it. Idempotent."""
        # A copy that nobody waits for any more may still hold the memory; it is unmapped with the last of them.
        with contextlib.suppress(BufferError):
            self.view.release()
            self._map.close()
        if self._owned:
            self.path.unlink(missing_ok=True)


class SegmentPool:
    """Segments of one sending process, used again and again: fresh memory costs more than the copy into it.

    Args:
        size_bytes: Length of each.
        limit: Most segments.
    """

    def __init__(self, size_bytes: int, limit: int) -> None:
        self.size_bytes = size_bytes
        self._limit = limit
        self._free: list[Segment] = []
        self._lent = 0
        self._prefix = f"dynamo-kv-{os.getpid()}-{secrets.token_hex(4)}"
        self._made = 0
        self._lock = -1
        remove_abandoned()
        self.marker = self._make_marker()

    def take(self) -> Segment | None:
        """Lend a segment; None if all are lent or memory is short."""
        if self._free:
            self._lent += 1
            return self._free.pop()
        if not self.marker or self._lent >= self._limit:
            return None
        self._made += 1
        try:
            segment = Segment(SHARED_FOLDER / f"{self._prefix}-{self._made}", self.size_bytes, create=True)
        except OSError:
            return None
        self._lent += 1
        return segment

    def give_back(self, segment: Segment, *, reusable: bool) -> None:
        """Take a segment back; one that a receiver may still read is thrown away."""
        self._lent -= 1
        if reusable:
            self._free.append(segment)
        else:
            segment.close()

    def close(self) -> None:
        """Remove all segments and the marker. Idempotent."""
        for segment in self._free:
            segment.close()
        self._free.clear()
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
    """Return a pool whose segments hold ``SEGMENT_SLOTS`` slots of whole blocks."""
    slot = max(1, SLOT_BYTES // block_bytes) * block_bytes
    return SegmentPool(SEGMENT_SLOTS * slot, MAX_SEGMENTS)
