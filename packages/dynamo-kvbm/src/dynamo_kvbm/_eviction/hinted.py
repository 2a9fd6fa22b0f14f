"""What sessions say about their future, leaves first.

A session that will go on says when; one that has ended says so. An expectation belongs to the last block of a path: if
that block goes, its parent inherits the expectation, since the session will come back for the rest. What nobody expects
goes first, oldest first; then what is expected latest. An expectation that was missed by a while is one no more, so
sessions that never came back do not fill the tier.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Sequence
from itertools import pairwise

from dynamo_core.clock import Clock, SystemClock
from dynamo_core.errors import InternalError
from dynamo_kvbm._eviction.base import LeafOrder

GRACE_S = 60.0


class HintedOrder(LeafOrder):
    """Evicts what is over, what is not expected back, then what is expected latest. Expected ones cost O(log n) a step.

    Args:
        capacity_blocks: Size of the tier; not used.
        clock: The clock of the expectations.
        grace_s: How long after its time an expectation still counts.
    """

    def __init__(self, capacity_blocks: int, *, clock: Clock | None = None, grace_s: float = GRACE_S) -> None:
        super().__init__()
        self._clock = clock or SystemClock()
        self._grace_s = grace_s
        self._next: dict[int, float] = {}
        self._ages: OrderedDict[int, None] = OrderedDict()  # unexpected blocks
        self._latest: list[tuple[float, int]] = []
        self._soonest: list[tuple[float, int]] = []
        self._ended: set[int] = set()  # of the unexpected blocks, those of sessions that are over
        self._ended_leaves: deque[int] = deque()  # with entries that no longer hold

    def insert(self, blocks: Sequence[tuple[int, int | None]]) -> None:
        """Add blocks that nobody expects yet, as the youngest; held parents of theirs count as used."""
        for sequence_hash, parent in blocks:
            self._lineage.add(sequence_hash, parent)
            self._ages[sequence_hash] = None
        self.touch([sequence_hash for sequence_hash, _ in blocks])

    def touch(self, sequence_hashes: Sequence[int]) -> None:
        """Make blocks and their ancestors the youngest. Who came back is no longer expected at the old time."""
        if self._next:
            for sequence_hash in sequence_hashes:
                self._forget_expectation(sequence_hash)
        used = self._with_ancestors(sequence_hashes)
        if self._ended:
            self._ended.difference_update(used)
        for sequence_hash in used:
            if sequence_hash in self._ages:
                self._ages.move_to_end(sequence_hash)

    def expect(self, sequence_hashes: Sequence[int], next_use_s: float | None) -> None:
        """Say when a path will be used next on the order's clock; None for a session that has ended."""
        for sequence_hash in sequence_hashes:
            self._forget_expectation(sequence_hash)
        if next_use_s is None:
            self._end(sequence_hashes)
        elif sequence_hashes:
            self._ended.difference_update(sequence_hashes)
            self._set_expectation(sequence_hashes[-1], next_use_s)

    def evict(self) -> int | None:
        """Remove and return the next unpinned leaf."""
        self._drop_missed()
        victim = self._ended_leaf()
        if victim is None:
            victim = next((item for item in self._ages if self._lineage.evictable(item)), None)
        if victim is None:
            victim = self._latest_leaf()
        if victim is not None:
            self._evict(victim)
        return victim

    def check_integrity(self) -> None:
        """Verify that each held block is expected or not."""
        self._lineage.check_integrity()
        if self._next.keys() & self._ages.keys() or len(self._next) + len(self._ages) != len(self._lineage):
            raise InternalError("a block is both expected and not, or neither")
        if not self._ended <= self._ages.keys():
            raise InternalError("a block of an ended session is expected, or not held")
        listed = set(self._ended_leaves)
        if any(item not in listed for item in self._ended if self._lineage.leaf(item)):
            raise InternalError("a leaf of an ended session would not go first")

    def _with_ancestors(self, sequence_hashes: Sequence[int]) -> list[int]:
        """Return what a use renews, children before parents."""
        parents = self._lineage.parents
        used = list(reversed(sequence_hashes))
        if not used or any(parents[child] != parent for child, parent in pairwise(used)):
            return list(self._lineage.upward(sequence_hashes))
        above = parents[used[-1]]
        while above is not None and above in parents:
            used.append(above)
            above = parents[above]
        return used

    def _evict(self, victim: int) -> None:
        parent = self._lineage.parents[victim]
        expected = self._next.get(victim)
        self._drop(victim)
        if expected is not None and parent is not None and parent in self._lineage:
            self._set_expectation(parent, min(expected, self._next.get(parent, expected)))

    def _drop(self, sequence_hash: int) -> None:
        self._next.pop(sequence_hash, None)
        self._ages.pop(sequence_hash, None)
        self._ended.discard(sequence_hash)
        parent = self._lineage.parents[sequence_hash]
        self._lineage.remove(sequence_hash)
        if parent is not None and parent in self._ended and self._lineage.leaf(parent):
            self._ended_leaves.append(parent)

    def _end(self, sequence_hashes: Sequence[int]) -> None:
        """Note that nobody will use these blocks again; those that others continue stay until those are gone."""
        for sequence_hash in sequence_hashes:
            if sequence_hash not in self._ended:
                self._ended.add(sequence_hash)
                if self._lineage.leaf(sequence_hash):
                    self._ended_leaves.append(sequence_hash)
        if len(self._ended_leaves) > 2 * len(self._ended) + 64:
            self._ended_leaves = deque(item for item in dict.fromkeys(self._ended_leaves) if item in self._ended)

    def _ended_leaf(self) -> int | None:
        """Return the evictable block of an ended session that was left over first."""
        pinned: list[int] = []
        victim = None
        while victim is None and self._ended_leaves:
            item = self._ended_leaves.popleft()
            if item not in self._ended or not self._lineage.leaf(item):
                continue
            if self._lineage.evictable(item):
                victim = item
            else:
                pinned.append(item)
        self._ended_leaves.extendleft(reversed(pinned))
        return victim

    def _set_expectation(self, sequence_hash: int, next_use_s: float) -> None:
        self._ages.pop(sequence_hash, None)
        self._ended.discard(sequence_hash)
        self._next[sequence_hash] = next_use_s
        heapq.heappush(self._latest, (-next_use_s, sequence_hash))
        heapq.heappush(self._soonest, (next_use_s, sequence_hash))
        self._compact()

    def _forget_expectation(self, sequence_hash: int) -> None:
        if self._next.pop(sequence_hash, None) is not None:
            self._ages[sequence_hash] = None

    def _drop_missed(self) -> None:
        limit = self._clock.monotonic() - self._grace_s
        while self._soonest and self._soonest[0][0] < limit:
            next_use_s, item = heapq.heappop(self._soonest)
            if self._next.get(item) == next_use_s:
                self._forget_expectation(item)
                self._ages.move_to_end(item, last=False)

    def _latest_leaf(self) -> int | None:
        passed: list[tuple[float, int]] = []
        victim = None
        while victim is None and self._latest:
            entry = heapq.heappop(self._latest)
            if self._next.get(entry[1]) != -entry[0]:
                continue
            passed.append(entry)
            if self._lineage.evictable(entry[1]):
                victim = entry[1]
        for entry in passed:
            heapq.heappush(self._latest, entry)
        return victim

    def _compact(self) -> None:
        """Rebuild the heaps once outdated entries outnumber the true ones."""
        if max(len(self._latest), len(self._soonest)) > 2 * len(self._next) + 64:
            self._soonest = [(next_use_s, item) for item, next_use_s in self._next.items()]
            self._latest = [(-next_use_s, item) for next_use_s, item in self._soonest]
            heapq.heapify(self._soonest)
            heapq.heapify(self._latest)
