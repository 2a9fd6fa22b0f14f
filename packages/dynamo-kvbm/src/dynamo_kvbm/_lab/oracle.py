"""The best that any order could do with what the future brings: farthest next use, leaves first."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from dynamo_core.errors import InternalError
from dynamo_kvbm._eviction.base import LeafOrder


class OracleOrder(LeafOrder):
    """Evicts the leaf whose next use is farthest. Tell it the next uses before blocks are inserted or touched.

    Args:
        capacity_blocks: Size of the tier; not used.
    """

    def __init__(self, capacity_blocks: int) -> None:
        super().__init__()
        self._next: dict[int, float] = {}
        self._depth: dict[int, int] = {}
        self._heap: list[tuple[float, int, int]] = []

    def foresee(self, next_uses: Mapping[int, float]) -> None:
        """Set the next use of blocks, held or about to be inserted."""
        for block, time in next_uses.items():
            self._next[block] = time
            if block in self._lineage:
                heapq.heappush(self._heap, (-time, -self._depth[block], block))

    def insert(self, blocks: Sequence[tuple[int, int | None]]) -> None:
        """Add blocks whose next use is known."""
        for block, parent in blocks:
            self._lineage.add(block, parent)
            self._depth[block] = 0 if parent is None else self._depth.get(parent, 0) + 1
            heapq.heappush(self._heap, (-self._next[block], -self._depth[block], block))

    def touch(self, sequence_hashes: Sequence[int]) -> None:
        """Change nothing: only the future counts."""

    def evict(self) -> int | None:
        """Remove and return the leaf that is used again latest."""
        passed: list[tuple[float, int, int]] = []
        victim = None
        while self._heap and victim is None:
            entry = heapq.heappop(self._heap)
            block = entry[2]
            if block not in self._lineage or self._next[block] != -entry[0]:
                continue
            if self._lineage.evictable(block):
                victim = block
            else:
                passed.append(entry)
        for entry in passed:
            heapq.heappush(self._heap, entry)
        if victim is not None:
            self._drop(victim)
        return victim

    def check_integrity(self) -> None:
        """Verify that the depth of each held block is known. Raises ``InternalError`` otherwise."""
        self._lineage.check_integrity()
        if self._depth.keys() != self._lineage.parents.keys():
            raise InternalError("lineage and depths hold different blocks")

    def _drop(self, sequence_hash: int) -> None:
        self._lineage.remove(sequence_hash)
        del self._depth[sequence_hash]
