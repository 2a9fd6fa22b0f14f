"""Whole branches, leaves first.

Only leaves are in the queue, by last use. A block that becomes a leaf because its last child went is next, whatever its
age: what continued it was not worth keeping, and the rest of the branch makes room before another branch is cut.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from dynamo_core.errors import InternalError
from dynamo_kvbm._eviction.base import LeafOrder


class LineageOrder(LeafOrder):
    """Evicts the branch whose leaf was used longest ago, from its end to its fork.

    Args:
        capacity_blocks: Size of the tier; not used.
    """

    def __init__(self, capacity_blocks: int) -> None:
        super().__init__()
        self._leaves: OrderedDict[int, None] = OrderedDict()

    def insert(self, blocks: Sequence[tuple[int, int | None]]) -> None:
        """Add blocks; those without children become the youngest leaves."""
        for sequence_hash, parent in blocks:
            self._lineage.add(sequence_hash, parent)
            if parent is not None:
                self._leaves.pop(parent, None)
        for sequence_hash, _ in reversed(blocks):
            if self._lineage.leaf(sequence_hash):
                self._leaves[sequence_hash] = None

    def touch(self, sequence_hashes: Sequence[int]) -> None:
        """Make those of the blocks that are leaves the youngest."""
        for sequence_hash in sequence_hashes:
            if sequence_hash in self._leaves:
                self._leaves.move_to_end(sequence_hash)

    def evict(self) -> int | None:
        """Remove and return the oldest leaf that is not pinned."""
        victim = next((leaf for leaf in self._leaves if not self._lineage.pinned(leaf)), None)
        if victim is not None:
            self._drop(victim)
        return victim

    def check_integrity(self) -> None:
        """Verify that the queue holds the leaves and nothing else."""
        self._lineage.check_integrity()
        if {item for item in self._lineage.parents if self._lineage.leaf(item)} != set(self._leaves):
            raise InternalError("the queue holds other blocks than the leaves")

    def _drop(self, sequence_hash: int) -> None:
        parent = self._lineage.parents[sequence_hash]
        self._lineage.remove(sequence_hash)
        self._leaves.pop(sequence_hash, None)
        if parent is not None and parent in self._lineage and self._lineage.leaf(parent):
            self._leaves[parent] = None
            self._leaves.move_to_end(parent, last=False)
