"""Least recently used, leaves first.

Every use moves a block and its ancestors to the young end, children before parents. So a parent is always younger than
its children, the oldest block is a leaf, and eviction is O(1).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from dynamo_core.errors import InternalError
from dynamo_kvbm._eviction.base import LeafOrder


class LruOrder(LeafOrder):
    """Evicts the leaf whose last use is longest ago."""

    def __init__(self, capacity_blocks: int) -> None:
        super().__init__()
        self._ages: OrderedDict[int, None] = OrderedDict()

    def insert(self, blocks: Sequence[tuple[int, int | None]]) -> None:
        """Add blocks as the youngest; held parents of theirs count as used."""
        outer = [parent for _, parent in blocks if parent is not None and parent in self._ages]
        add, ages = self._lineage.add, self._ages
        for sequence_hash, parent in reversed(blocks):
            add(sequence_hash, parent)
            ages[sequence_hash] = None
        if outer:
            self.touch(outer)

    def touch(self, sequence_hashes: Sequence[int]) -> None:
        """Make blocks and their ancestors the youngest."""
        move, parents = self._ages.move_to_end, self._lineage.parents
        above: int | None = sequence_hashes[-1] if sequence_hashes else None
        for sequence_hash in reversed(sequence_hashes):
            if sequence_hash != above:  # not one chain: the order in which several are walked matters
                for one in self._lineage.upward(sequence_hashes):
                    move(one)
                return
            move(sequence_hash)
            above = parents[sequence_hash]
        while above in self._ages:
            move(above)
            above = parents[above]

    def evict(self) -> int | None:
        """Remove and return the oldest unpinned leaf; older pinned blocks and their ancestors are passed over."""
        for sequence_hash in self._ages:
            if self._lineage.evictable(sequence_hash):
                self._drop(sequence_hash)
                return sequence_hash
        return None

    def check_integrity(self) -> None:
        """Verify that the books agree."""
        self._lineage.check_integrity()
        if len(self._lineage) != len(self._ages) or any(block not in self._lineage for block in self._ages):
            raise InternalError("lineage and ages hold different blocks")

    def _drop(self, sequence_hash: int) -> None:
        del self._ages[sequence_hash]
        self._lineage.remove(sequence_hash)
