"""Adaptive replacement, leaves first.

Source: Megiddo and Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003. Blocks used once are in the
``recent`` list, blocks used again in ``frequent``; two ghost lists remember what left each, and a block that comes
back from a ghost list moves the target size between the two in its favour.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from dynamo_core.errors import InternalError
from dynamo_kvbm._eviction.base import LeafOrder


class ArcOrder(LeafOrder):
    """Balances recency and frequency by what was missed.

    Args:
        capacity_blocks: Size of the tier; bounds the ghosts.
    """

    def __init__(self, capacity_blocks: int) -> None:
        self._capacity = capacity_blocks
        self._target = 0.0
        super().__init__()
        self._recent: OrderedDict[int, None] = OrderedDict()
        self._frequent: OrderedDict[int, None] = OrderedDict()
        self._recent_ghosts: OrderedDict[int, None] = OrderedDict()
        self._frequent_ghosts: OrderedDict[int, None] = OrderedDict()

    def insert(self, blocks: Sequence[tuple[int, int | None]]) -> None:
        """Add blocks: to ``frequent`` those that a ghost list remembers, to ``recent`` the others."""
        for sequence_hash, parent in reversed(blocks):
            self._lineage.add(sequence_hash, parent)
            self._list_for_new(sequence_hash)[sequence_hash] = None
        self._trim_ghosts()

    def touch(self, sequence_hashes: Sequence[int]) -> None:
        """Move blocks and their ancestors to the young end of ``frequent``."""
        for sequence_hash in self._lineage.upward(sequence_hashes):
            self._recent.pop(sequence_hash, None)
            self._frequent[sequence_hash] = None
            self._frequent.move_to_end(sequence_hash)

    def evict(self) -> int | None:
        """Remove and return the oldest unpinned leaf of the list that exceeds its target, else of the other."""
        recent_first = bool(self._recent) and len(self._recent) > self._target
        for recent in (recent_first, not recent_first):
            held, ghosts = (self._recent, self._recent_ghosts) if recent else (self._frequent, self._frequent_ghosts)
            victim = next((block for block in held if self._lineage.evictable(block)), None)
            if victim is not None:
                del held[victim]
                self._lineage.remove(victim)
                ghosts[victim] = None
                return victim
        return None

    def check_integrity(self) -> None:
        """Verify that each held block is in one list and no ghost is held."""
        self._lineage.check_integrity()
        lists = (self._recent, self._frequent)
        if sum(map(len, lists)) != len(self._lineage) or any(
            block not in self._lineage for one in lists for block in one
        ):
            raise InternalError("lineage and lists hold different blocks")
        ghosts = (self._recent_ghosts, self._frequent_ghosts)
        if any(block in self._lineage for one in ghosts for block in one):
            raise InternalError("a ghost is held")

    def _drop(self, sequence_hash: int) -> None:
        self._recent.pop(sequence_hash, None)
        self._frequent.pop(sequence_hash, None)
        self._lineage.remove(sequence_hash)

    def _list_for_new(self, sequence_hash: int) -> OrderedDict[int, None]:
        recent, frequent = len(self._recent_ghosts), len(self._frequent_ghosts)
        if sequence_hash in self._recent_ghosts:
            self._target = min(float(self._capacity), self._target + max(1.0, frequent / recent))
            del self._recent_ghosts[sequence_hash]
            return self._frequent
        if sequence_hash in self._frequent_ghosts:
            self._target = max(0.0, self._target - max(1.0, recent / frequent))
            del self._frequent_ghosts[sequence_hash]
            return self._frequent
        return self._recent

    def _trim_ghosts(self) -> None:
        while self._recent_ghosts and len(self._recent) + len(self._recent_ghosts) > self._capacity:
            self._recent_ghosts.popitem(last=False)
        total = len(self._lineage) + len(self._recent_ghosts)
        while self._frequent_ghosts and total + len(self._frequent_ghosts) > 2 * self._capacity:
            self._frequent_ghosts.popitem(last=False)
