"""Retention priorities, leaves first: the lowest priority goes first, and within one the least recently used.

A block needs its ancestors, so a priority holds for them too: they never have a lower one than what continues them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from dynamo_core.errors import InternalError
from dynamo_kvbm._eviction.base import LeafOrder


class PriorityOrder(LeafOrder):
    """Evicts by priority, then by age.

    Args:
        capacity_blocks: Size of the tier; not used.
    """

    def __init__(self, capacity_blocks: int) -> None:
        super().__init__()
        self._priority: dict[int, int] = {}
        self._ages: dict[int, OrderedDict[int, None]] = {}

    def insert(self, blocks: Sequence[tuple[int, int | None]]) -> None:
        """Add blocks with priority 0 as the youngest; held parents of theirs count as used."""
        for sequence_hash, parent in blocks:
            self._lineage.add(sequence_hash, parent)
            self._place(sequence_hash, 0)
        self.touch([sequence_hash for sequence_hash, _ in blocks])

    def prioritise(self, priorities: Iterable[tuple[int, int]]) -> None:
        """Set priorities, and raise those of ancestors that have a lower one."""
        for sequence_hash, priority in priorities:
            for position, item in enumerate(self._lineage.upward([sequence_hash])):
                if position and self._priority[item] >= priority:
                    break
                self._take(item)
                self._place(item, priority)

    def touch(self, sequence_hashes: Sequence[int]) -> None:
        """Make blocks and their ancestors the youngest of their priorities."""
        for sequence_hash in self._lineage.upward(sequence_hashes):
            self._ages[self._priority[sequence_hash]].move_to_end(sequence_hash)

    def evict(self) -> int | None:
        """Remove and return the oldest unpinned leaf of the lowest priority that has one."""
        for priority in sorted(self._ages):
            for sequence_hash in self._ages[priority]:
                if self._lineage.evictable(sequence_hash):
                    self._drop(sequence_hash)
                    return sequence_hash
        return None

    def check_integrity(self) -> None:
        """Verify that each held block is in the list of its priority."""
        self._lineage.check_integrity()
        listed = {item: priority for priority, ages in self._ages.items() for item in ages}
        if listed != self._priority or len(self._priority) != len(self._lineage):
            raise InternalError("lineage and priorities hold different blocks")

    def _drop(self, sequence_hash: int) -> None:
        self._take(sequence_hash)
        self._lineage.remove(sequence_hash)

    def _place(self, sequence_hash: int, priority: int) -> None:
        self._priority[sequence_hash] = priority
        self._ages.setdefault(priority, OrderedDict())[sequence_hash] = None

    def _take(self, sequence_hash: int) -> None:
        priority = self._priority.pop(sequence_hash)
        del self._ages[priority][sequence_hash]
        if not self._ages[priority]:
            del self._ages[priority]
