"""Files of equal slots with a record each: what the disk tier is made of.

A segment is two files. ``NNNN.data`` holds the blocks, preallocated. ``NNNN.index`` holds one fixed record a slot:
which block it is, and the checksums of the block and of the record. Nothing else says what a slot holds, so there is
no journal to replay: opening a folder reads the records. A record is written after its block and cleared before its
slot is reused; whatever a crash leaves half done, a checksum that does not fit turns it into an empty slot.

Blocks go past the page cache where the file system allows it (O_DIRECT): a cache behind a cache would hold everything
twice, and the kernel's copy costs more than the disk.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from dynamo_core.kv import BlockDescriptor

RECORD = np.dtype(
    [
        ("sequence_hash", "<u8"),
        ("local_hash", "<u8"),
        ("parent_hash", "<u8"),
        ("data_checksum", "<u8"),
        ("record_checksum", "<u8"),
        ("position", "<u4"),
        ("flags", "<u4"),
    ]
)
"""48 bytes a slot."""

PAGE_BYTES = 4096
LARGE_SLOT_BYTES = 64 * 1024
USED = 1
HAS_PARENT = 2
_CHECKED_FIELDS = [name for name in RECORD.names or () if name != "record_checksum"]


@dataclass(frozen=True)
class StoredBlock:
    """A block that a record names.

    Attributes:
        descriptor: Which block.
        data_checksum: XXH3-64 of its bytes, seeded with its sequence hash.
    """

    descriptor: BlockDescriptor
    data_checksum: int


class SlotFile:
    """One segment.

    Args:
        folder: Where its files are.
        number: Its number; names the files.
        slots: How many slots it has.
        slot_bytes: Bytes of each.
        direct: Go past the page cache if slots are large or page-sized, and the file system can.

    Raises:
        OSError: if the files cannot be made, for example because the disk is full.
    """

    def __init__(self, folder: Path, number: int, slots: int, slot_bytes: int, *, direct: bool = True) -> None:
        self.slots = slots
        self._slot_bytes = slot_bytes
        self._stride = slot_stride(slot_bytes)
        self._data_path = folder / f"{number:04d}.data"
        self._index_path = folder / f"{number:04d}.index"
        self._data, self.direct = _open_data(self._data_path, wanted=direct and self._stride % PAGE_BYTES == 0)
        self._local = threading.local()
        try:
            os.posix_fallocate(self._data, 0, slots * self._stride)
            self._index = _open_index(self._index_path, slots)
        except OSError:
            os.close(self._data)
            raise

    def records(self) -> Iterator[tuple[int, StoredBlock]]:
        """Yield slot and block of every record that is whole."""
        for slot in np.flatnonzero(self._index["flags"] & USED):
            record = self._index[slot]
            if whole_record(record):
                yield int(slot), stored_block(record)

    def read(self, slot: int, into: NDArray[np.uint8]) -> memoryview:
        """Read a slot and return its bytes; shorter than a slot if the file was cut. The caller compares the checksum.

        Args:
            slot: Which.
            into: Memory of one ``slot_stride``, at a page's start; see ``aligned_bytes``.
        """
        count = os.preadv(self._data, [into.data], slot * self._stride)
        return into[: min(count, self._slot_bytes)].data

    def write(self, slot: int, block: BlockDescriptor, data: bytes | memoryview) -> StoredBlock:
        """Write a block, then the record that names it."""
        self.clear(slot)
        _write_all(self._data, self._aligned(data) if self.direct else data, slot * self._stride)
        stored = StoredBlock(block, data_checksum(block.sequence_hash, data))
        self._index[slot] = _record(stored)
        return stored

    def _aligned(self, data: bytes | memoryview) -> memoryview:
        """Return the data where O_DIRECT can take it from: as it is if it lies there, else copied."""
        given = np.frombuffer(data, dtype=np.uint8)
        if given.ctypes.data % PAGE_BYTES == 0 and given.nbytes == self._stride:
            return given.data
        staged: NDArray[np.uint8] | None = getattr(self._local, "staged", None)
        if staged is None:
            staged = self._local.staged = aligned_bytes(self._stride)
        staged[: given.nbytes] = given
        return staged.data

    def clear(self, slot: int) -> None:
        """Make a slot name nothing."""
        self._index[slot] = np.zeros((), RECORD)

    def sync(self) -> None:
        """Wait until data and records are on the medium, against loss of power."""
        os.fdatasync(self._data)
        self._index.flush()

    def close(self) -> None:
        """Close the files; they stay on disk."""
        self._index.flush()
        del self._index
        os.close(self._data)


def slot_stride(slot_bytes: int) -> int:
    """Return the distance of slots: whole pages for large ones, which then can be read past the page cache."""
    if slot_bytes < LARGE_SLOT_BYTES:
        return slot_bytes
    return -(-slot_bytes // PAGE_BYTES) * PAGE_BYTES


def aligned_bytes(size: int) -> NDArray[np.uint8]:
    """Return memory that begins at a page."""
    memory = np.empty(size + PAGE_BYTES, dtype=np.uint8)
    skip = -memory.ctypes.data % PAGE_BYTES
    return memory[skip : skip + size]


def data_checksum(sequence_hash: int, data: bytes | memoryview) -> int:
    """Return the checksum that ties bytes to the block they belong to."""
    return xxhash.xxh3_64_intdigest(data, sequence_hash)


def _open_data(path: Path, *, wanted: bool) -> tuple[int, bool]:
    """Open a data file; return its descriptor, and whether it goes past the page cache."""
    flags = os.O_RDWR | os.O_CREAT
    if wanted:
        try:
            return os.open(path, flags | os.O_DIRECT, 0o600), True
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: the file system has no O_DIRECT
                raise
    return os.open(path, flags, 0o600), False


def _open_index(path: Path, slots: int) -> np.memmap[tuple[int], np.dtype[np.void]]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, slots * RECORD.itemsize)
    finally:
        os.close(descriptor)
    return np.memmap(path, dtype=RECORD, mode="r+", shape=(slots,))


def _write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    left = memoryview(data).cast("B")
    while left:
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written


def _record(stored: StoredBlock) -> NDArray[np.void]:
    block = stored.descriptor
    flags = USED if block.parent_hash is None else USED | HAS_PARENT
    record = np.zeros((), RECORD)
    record["sequence_hash"] = block.sequence_hash
    record["local_hash"] = block.local_hash
    record["parent_hash"] = block.parent_hash or 0
    record["data_checksum"] = stored.data_checksum
    record["position"] = block.position
    record["flags"] = flags
    record["record_checksum"] = _record_checksum(record)
    return record


def _record_checksum(record: NDArray[np.void]) -> int:
    return xxhash.xxh3_64_intdigest(b"".join(record[name].tobytes() for name in _CHECKED_FIELDS))


def whole_record(record: NDArray[np.void]) -> bool:
    """Whether a record fits its checksum."""
    return int(record["record_checksum"]) == _record_checksum(record)


def stored_block(record: NDArray[np.void]) -> StoredBlock:
    """Return the block that a whole record names."""
    has_parent = int(record["flags"]) & HAS_PARENT
    descriptor = BlockDescriptor(
        sequence_hash=int(record["sequence_hash"]),
        local_hash=int(record["local_hash"]),
        parent_hash=int(record["parent_hash"]) if has_parent else None,
        position=int(record["position"]),
    )
    return StoredBlock(descriptor, int(record["data_checksum"]))
