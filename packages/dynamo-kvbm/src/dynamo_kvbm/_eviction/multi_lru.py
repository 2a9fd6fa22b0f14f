"""Several LRU lists by frequency, leaves first.

A block's list is the logarithm of how often it was used, so what is used often outlives what is used lately. Uses are
counted in a table that outlives the block, as in TinyLFU (Einziger, Friedman and Manes, 2017): a block that comes back
starts where it was. The table is halved when it has seen ten times the capacity, so old fame fades.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from dynamo_core.errors import InternalError
from dynamo_kvbm._eviction.base import LeafOrder

LEVELS = 4
SAMPLE_FACTOR = 10


class FrequencyTable:
    """Counts of uses that fade.

    Args:
        capacity_blocks: Size of the tier; after ten times as many uses all counts are halved.
    """

    def __init__(self, capacity_blocks: int) -> None:
        self._sample = SAMPLE_FACTOR * capacity_blocks
        self._seen = 0
        self._counts: dict[int, int] = {}

    def __len__(self) -> int:
        """Blocks counted, at most ten times the capacity."""
        return len(self._counts)

    def count(self, sequence_hash: int) -> int:
        """Return how often a block was used lately."""
        return self._counts.get(sequence_hash, 0)

    def note(self, sequence_hashes: Iterable[int]) -> None:
        """Count a use of each block."""
        for item in sequence_hashes:
            self._counts[item] = self._counts.get(item, 0) + 1
            self._seen += 1
        if self._seen >= self._sample:
            self._seen //= 2
            self._counts = {item: count // 2 for item, count in self._counts.items() if count > 1}


class MultiLruOrder(LeafOrder):
    """Evicts the oldest leaf of the least used blocks.

    Args:
        capacity_blocks: Size of the tier; bounds the table of uses.
    """

    def __init__(self, capacity_blocks: int) -> None:
        super().__init__()
        self._uses = FrequencyTable(capacity_blocks)
        self._levels: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(LEVELS)]
        self._level_of: dict[int, int] = {}

    def insert(self, blocks: Sequence[tuple[int, int | None]]) -> None:
        """Add blocks as the youngest of the list that their uses give; held parents of theirs count as used."""
        for sequence_hash, parent in blocks:
            self._lineage.add(sequence_hash, parent)
        self.touch([sequence_hash for sequence_hash, _ in blocks])

    def touch(self, sequence_hashes: Sequence[int]) -> None:
        """Count a use of blocks and their ancestors and make them the youngest of their lists."""
        walked = list(self._lineage.upward(sequence_hashes))
        self._uses.note(dict.fromkeys(walked))
        for sequence_hash in walked:
            level = min(LEVELS - 1, max(0, self._uses.count(sequence_hash).bit_length() - 1))
            before = self._level_of.get(sequence_hash)
            if before is not None and before != level:
                del self._levels[before][sequence_hash]
            self._level_of[sequence_hash] = level
            self._levels[level][sequence_hash] = None
            self._levels[level].move_to_end(sequence_hash)

    def evict(self) -> int | None:
        """Remove and return the oldest unpinned leaf of the lowest list that has one."""
        for level in self._levels:
            for sequence_hash in level:
                if self._lineage.evictable(sequence_hash):
                    self._drop(sequence_hash)
                    return sequence_hash
        return None

    def check_integrity(self) -> None:
        """Verify that each held block is in one list."""
        self._lineage.check_integrity()
        listed = {item: i for i, level in enumerate(self._levels) for item in level}
        if listed != self._level_of or sum(map(len, self._levels)) != len(self._lineage):
            raise InternalError("lineage and lists hold different blocks")

    def _drop(self, sequence_hash: int) -> None:
        del self._levels[self._level_of.pop(sequence_hash)][sequence_hash]
        self._lineage.remove(sequence_hash)
