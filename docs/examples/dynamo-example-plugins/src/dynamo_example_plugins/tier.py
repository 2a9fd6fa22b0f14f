"""A tier of KV blocks: each block in a file of its own, the least recently written one leaves first."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from dynamo_core.enums import Tier
from dynamo_core.errors import InvalidRequestError
from dynamo_core.kv import BlockDescriptor, BlockLayout


class FileTier:
    """A folder of files. Small because it leaves out what a disk tier needs to be fast and to survive a crash."""

    tier = Tier.EXTERNAL

    def __init__(self, *, layout: BlockLayout, fingerprint: str, folder: str, capacity_blocks: int) -> None:
        # The fingerprint says what the blocks are of: a folder of its own keeps models apart.
        self._folder = Path(folder) / hashlib.sha256(fingerprint.encode()).hexdigest()
        self._folder.mkdir(parents=True, exist_ok=True)
        for stale in self._folder.iterdir():  # of an earlier process; this tier does not outlive one
            stale.unlink()
        self._block_bytes = layout.block_bytes
        self._ages: OrderedDict[int, None] = OrderedDict()
        self._lock = threading.Lock()  # one thread writes to a tier, another reads from it
        self.capacity_blocks = capacity_blocks

    def contains(self, sequence_hashes: Sequence[int]) -> list[bool]:
        """Whether each block is there."""
        with self._lock:
            return [item in self._ages for item in sequence_hashes]

    def put(self, blocks: Sequence[BlockDescriptor], data: Sequence[bytes | memoryview]) -> list[int]:
        """Store blocks; return those that left for them."""
        if len(blocks) != len(data):
            raise InvalidRequestError(f"{len(blocks)} blocks came with {len(data)} pieces", param="data")
        evicted: list[int] = []
        with self._lock:
            for block, piece in zip(blocks, data, strict=True):
                if block.sequence_hash not in self._ages:
                    while len(self._ages) >= self.capacity_blocks:
                        evicted.append(self._drop_oldest())
                    self._path(block.sequence_hash).write_bytes(piece)
                self._ages[block.sequence_hash] = None
                self._ages.move_to_end(block.sequence_hash)
            return [item for item in dict.fromkeys(evicted) if item not in self._ages]

    def get(self, sequence_hashes: Sequence[int]) -> list[bytes | memoryview | None]:
        """Return the bytes of each block."""
        with self._lock:
            return [self._path(item).read_bytes() if item in self._ages else None for item in sequence_hashes]

    def remove(self, sequence_hashes: Sequence[int]) -> None:
        """Drop blocks."""
        with self._lock:
            for item in sequence_hashes:
                if self._ages.pop(item, 0) is None:
                    self._path(item).unlink()

    def close(self) -> None:
        """Nothing is open between calls."""

    def _drop_oldest(self) -> int:
        oldest, _ = self._ages.popitem(last=False)
        self._path(oldest).unlink()
        return oldest

    def _path(self, sequence_hash: int) -> Path:
        return self._folder / f"{sequence_hash:016x}"
