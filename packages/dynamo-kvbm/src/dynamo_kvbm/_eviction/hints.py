"""What is known of the future of blocks, kept until the blocks are in a tier, and the bounded promise to keep some."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TypeVar

from dynamo_core.clock import Clock
from dynamo_core.kv import BlockDescriptor
from dynamo_kvbm._eviction.base import EvictionOrder, SupportsHints, SupportsPriority

T = TypeVar("T")
MAX_HINTED = 1 << 16
RETAINED_SHARE = 0.5


class HintBook:
    """Hints by block, for an eviction order. Its owner holds the lock.

    A session says what it knows while its blocks are still on the device, so hints wait here until the blocks come. The
    book is bounded: the hint given longest ago goes first.

    Args:
        order: What listens; an order that cannot is spared.
        capacity_blocks: Size of the tier; at most half of it is retained at once.
        clock: The clock of expectations and of retention.
    """

    def __init__(self, order: EvictionOrder, capacity_blocks: int, clock: Clock) -> None:
        self._order = order
        self._clock = clock
        self._max_retained = int(capacity_blocks * RETAINED_SHARE)
        self._expected: OrderedDict[int, float | None] = OrderedDict()
        self._priorities: OrderedDict[int, int] = OrderedDict()
        self._retain_until: OrderedDict[int, float] = OrderedDict()
        self._tenants: OrderedDict[int, str] = OrderedDict()
        self._retained: dict[int, float] = {}
        self._ends: list[tuple[float, int]] = []

    @property
    def retained_blocks(self) -> int:
        """Blocks kept by a promise now."""
        return len(self._retained)

    def expect(self, sequence_hashes: Sequence[int], next_use_s: float | None) -> None:
        """Say when the blocks of a path will be used next on the clock; None for never again."""
        _note(self._expected, sequence_hashes, next_use_s)
        self._pass_on([item for item in sequence_hashes if item in self._order])

    def prioritise(self, sequence_hashes: Sequence[int], priority: int) -> None:
        """Give blocks a priority in place of the one that they come with."""
        _note(self._priorities, sequence_hashes, priority)
        if isinstance(self._order, SupportsPriority):
            self._order.prioritise((item, priority) for item in sequence_hashes if item in self._order)

    def retain(self, sequence_hashes: Sequence[int], until_s: float) -> None:
        """Keep blocks until a time on the clock, as far as no more than half of the tier is kept so."""
        _note(self._retain_until, sequence_hashes, until_s)
        self._keep([item for item in sequence_hashes if item in self._order])

    def assign(self, sequence_hashes: Sequence[int], tenant: str) -> None:
        """Say whose blocks are; those in the tier stay whose they were."""
        _note(self._tenants, sequence_hashes, tenant)

    def tenant_of(self, sequence_hash: int) -> str:
        """Return whose a block is; blocks of nobody share what there is."""
        return self._tenants.get(sequence_hash, "")

    def arrived(self, blocks: Sequence[BlockDescriptor]) -> None:
        """Apply what is known to blocks that have come into the tier, in sequence order."""
        hashes = [block.sequence_hash for block in blocks]
        if isinstance(self._order, SupportsPriority):
            priorities = [
                (block.sequence_hash, self._priorities.get(block.sequence_hash, block.priority)) for block in blocks
            ]
            self._order.prioritise(pair for pair in priorities if pair[1])
        self._pass_on([item for item in hashes if item in self._expected])
        self._spend(hashes)
        self._keep([item for item in hashes if item in self._retain_until])

    def settle(self) -> None:
        """End the promises whose time has come; before each eviction."""
        now = self._clock.monotonic()
        while self._ends and self._ends[0][0] <= now:
            end, item = heapq.heappop(self._ends)
            if self._retained.get(item) == end:
                del self._retained[item]
                self._order.unpin([item])

    def release(self, sequence_hashes: Iterable[int]) -> None:
        """End the promises for blocks that are to be dropped."""
        kept = [item for item in sequence_hashes if self._retained.pop(item, None) is not None]
        self._order.unpin(kept)

    def _pass_on(self, held: Sequence[int]) -> None:
        if not held or not isinstance(self._order, SupportsHints):
            return
        # One expectation a path: that of its last block, which its ancestors inherit as it goes.
        self._order.expect(held, self._expected[held[-1]])

    def _spend(self, arrived: Sequence[int]) -> None:
        """Forget what was expected of blocks once they had it: if they come again, it is for another session."""
        for item in arrived:
            self._expected.pop(item, None)

    def _keep(self, held: Sequence[int]) -> None:
        self.settle()
        for item in held:
            until_s = self._retain_until.pop(item)
            if item not in self._retained:
                if len(self._retained) >= self._max_retained:
                    break
                self._order.pin([item])
            self._retained[item] = until_s
            heapq.heappush(self._ends, (until_s, item))
        if len(self._ends) > 2 * len(self._retained) + MAX_HINTED:
            self._ends = [(end, item) for item, end in self._retained.items()]
            heapq.heapify(self._ends)


def _note(book: OrderedDict[int, T], items: Sequence[int], value: T) -> None:
    for item in items:
        book[item] = value
        book.move_to_end(item)
    while len(book) > MAX_HINTED:
        book.popitem(last=False)
