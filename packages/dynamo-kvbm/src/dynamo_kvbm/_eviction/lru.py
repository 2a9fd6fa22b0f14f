"""Least recently used, leaves first.

Every use moves a block and its ancestors to the young end, children before parents. So a parent is always younger than
its children, the oldest block is a leaf, and eviction is O(1).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from dynamo_core.errors import InternalError
from dynamo_kvbm._eviction.base import Lineage


class LruOrder:
    """Evicts the leaf whose last use is longest ago."""

    def __init__(self, capacity_blocks: int) -> None:
        self._lineage = Lineage()
        self._ages: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._ages)

    def __contains__(self, sequence_hash: int) -> bool:
        return sequence_hash in self._ages

    def insert(self, blocks: Sequence[tuple[int, int | None]]) -> None:
        """Add blocks as the youngest."""
        for sequence_hash, parent in blocks:
            self._lineage.add(sequence_hash, parent)
            self._ages[sequence_hash] = None
        self.touch([sequence_hash for sequence_hash, _ in blocks])

    def touch(self, sequence_hashes: Sequence[int]) -> None:
        """Make blocks and their ancestors the youngest."""
        move = self._ages.move_to_end
        for sequence_hash in self._lineage.upward(sequence_hashes):
            move(sequence_hash)

    def pin(self, sequence_hashes: Iterable[int]) -> None:
        """Keep blocks from eviction."""
        self._lineage.pin(sequence_hashes)

    def unpin(self, sequence_hashes: Iterable[int]) -> None:
        """Take back one pin of each block."""
        self._lineage.unpin(sequence_hashes)

    def discard(self, sequence_hash: int) -> bool:
        """Remove a block unless it is pinned or not held."""
        if sequence_hash not in self._ages or self._lineage.pinned(sequence_hash):
            return False
        self._forget(sequence_hash)
        return True

    def evict(self) -> int | None:
        """Remove and return the oldest unpinned leaf; older pinned blocks and their ancestors are passed over."""
        for sequence_hash in self._ages:
            if self._lineage.evictable(sequence_hash):
                self._forget(sequence_hash)
                return sequence_hash
        return None

    def check_integrity(self) -> None:
        """Verify that the books agree."""
        self._lineage.check_integrity()
        if len(self._lineage) != len(self._ages) or any(block not in self._lineage for block in self._ages):
            raise InternalError("lineage and ages hold different blocks")

    def _forget(self, sequence_hash: int) -> None:
        del self._ages[sequence_hash]
        self._lineage.remove(sequence_hash)
