from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_core import plugins
from dynamo_core.errors import InternalError
from dynamo_core.testing import FakeClock
from dynamo_kvbm._eviction.arc import ArcOrder
from dynamo_kvbm._eviction.base import EvictionOrder
from dynamo_kvbm._eviction.hinted import HintedOrder
from dynamo_kvbm._eviction.lineage import LineageOrder
from dynamo_kvbm._eviction.lru import LruOrder
from dynamo_kvbm._eviction.multi_lru import FrequencyTable, MultiLruOrder
from dynamo_kvbm._eviction.priority import PriorityOrder
from dynamo_kvbm._eviction.s3fifo import S3FifoOrder

ORDERS: dict[str, Callable[[int], EvictionOrder]] = {
    "lru": LruOrder,
    "arc": ArcOrder,
    "s3fifo": S3FifoOrder,
    "multi-lru": MultiLruOrder,
    "lineage": LineageOrder,
    "priority": PriorityOrder,
    "hinted": HintedOrder,
}


def chain(*hashes: int) -> list[tuple[int, int | None]]:
    return [(item, hashes[i - 1] if i else None) for i, item in enumerate(hashes)]


def drained(order: EvictionOrder) -> list[int]:
    found: list[int] = []
    while (victim := order.evict()) is not None:
        found.append(victim)
    return found


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest) -> EvictionOrder:
    return ORDERS[request.param](10)


@pytest.mark.parametrize("name", ORDERS)
def test_the_order_is_installed_under_its_name(name: str) -> None:
    assert plugins.load("kv_eviction", name) is ORDERS[name]
    assert isinstance(ORDERS[name](1), EvictionOrder)


def test_a_chain_goes_from_its_end(order: EvictionOrder) -> None:
    order.insert(chain(1, 2, 3))
    assert drained(order) == [3, 2, 1]


def test_a_pinned_leaf_keeps_its_ancestors(order: EvictionOrder) -> None:
    order.insert(chain(1, 2))
    order.pin([2])
    assert order.evict() is None
    assert not order.discard(2)
    order.unpin([2])
    assert order.evict() == 2


def test_a_pinned_block_is_passed_over(order: EvictionOrder) -> None:
    order.insert(chain(1))
    order.insert(chain(2))
    order.pin([1])
    assert order.evict() == 2


def test_an_unbalanced_unpin_is_a_defect(order: EvictionOrder) -> None:
    order.insert(chain(1))
    with pytest.raises(InternalError, match="unpinned more often"):
        order.unpin([1])


def test_a_parent_that_comes_back_after_its_child_is_no_leaf(order: EvictionOrder) -> None:
    order.insert([(2, 1)])
    order.insert([(1, None)])
    assert order.evict() == 2


def test_lru_evicts_the_chain_whose_use_is_longest_ago() -> None:
    order = LruOrder(10)
    order.insert(chain(1, 2))
    order.insert(chain(10, 20))
    order.touch([1, 2])
    assert drained(order) == [20, 10, 2, 1]


def test_lru_counts_a_new_child_as_a_use_of_its_ancestors() -> None:
    order = LruOrder(10)
    order.insert(chain(1, 2))
    order.insert(chain(10))
    order.insert([(3, 2)])
    assert order.evict() == 10


def test_arc_keeps_what_came_back_over_what_came_once() -> None:
    order = ArcOrder(4)
    order.insert(chain(1))
    order.touch([1])
    for scan in range(10, 16):
        while len(order) >= 4:
            assert order.evict() != 1
        order.insert(chain(scan))
    assert 1 in order


def test_s3fifo_drops_a_scan_before_what_was_used_twice() -> None:
    order = S3FifoOrder(10)
    order.insert(chain(1))
    order.touch([1])
    for scan in range(10, 40):
        while len(order) >= 10:
            assert order.evict() != 1
        order.insert(chain(scan))
    assert 1 in order


def test_multi_lru_keeps_what_is_used_often_over_what_is_used_lately() -> None:
    order = MultiLruOrder(10)
    order.insert(chain(1))
    for _ in range(4):
        order.touch([1])
    order.insert(chain(2))
    order.insert(chain(3))
    assert drained(order) == [2, 3, 1]


def test_a_frequency_table_fades_and_stays_bounded() -> None:
    table = FrequencyTable(10)
    table.note([7] * 8)
    table.note(range(100, 192))
    assert (table.count(7), len(table)) == (4, 1)


def test_lineage_drops_a_branch_to_its_fork_before_another() -> None:
    order = LineageOrder(10)
    order.insert(chain(1, 2, 3))
    order.insert([(4, 1)])
    order.insert(chain(9))
    order.touch([1, 2, 3])
    assert drained(order) == [4, 9, 3, 2, 1]


def test_a_priority_holds_for_ancestors_and_nobody_else() -> None:
    order = PriorityOrder(10)
    order.insert(chain(1, 2))
    order.insert(chain(3))
    order.prioritise([(2, 5)])
    order.insert(chain(4))
    assert drained(order) == [3, 4, 2, 1]


async def test_hinted_evicts_the_ended_then_what_is_expected_latest() -> None:
    clock = FakeClock()
    order = HintedOrder(10, clock=clock)
    order.insert([(0, None)])
    for first in (1, 3, 5):
        order.insert([(first, 0), (first + 1, first)])
    now = clock.monotonic()
    order.expect([0, 1, 2], now + 50)
    order.expect([0, 3, 4], now + 100)
    order.expect([0, 5, 6], None)
    assert drained(order) == [6, 5, 4, 3, 2, 1, 0]


async def test_hinted_lets_a_parent_inherit_what_is_expected_of_its_child() -> None:
    clock = FakeClock()
    order = HintedOrder(10, clock=clock)
    order.insert(chain(1, 2))
    order.insert(chain(3, 4))
    order.expect([1, 2], clock.monotonic() + 100)
    order.expect([3, 4], clock.monotonic() + 50)
    assert [order.evict(), order.evict()] == [2, 1]


async def test_hinted_gives_up_on_sessions_that_are_overdue() -> None:
    clock = FakeClock()
    order = HintedOrder(10, clock=clock, grace_s=10)
    order.insert(chain(1))
    order.insert(chain(2))
    order.expect([1], clock.monotonic() + 5)
    order.expect([2], clock.monotonic() + 500)
    await clock.advance(20)
    assert order.evict() == 1


def test_hinted_evicts_an_ended_session_before_older_blocks_but_not_what_others_continue() -> None:
    order = HintedOrder(10)
    order.insert(chain(1, 2))
    order.insert(chain(3, 4, 5))
    order.insert([(6, 3)])
    order.expect([3, 4, 5], None)
    assert drained(order) == [5, 4, 2, 1, 6, 3]


def test_hinted_takes_back_an_end_when_the_blocks_are_used_again() -> None:
    order = HintedOrder(10)
    order.insert(chain(1, 2))
    order.insert(chain(3, 4))
    order.expect([3, 4], None)
    order.touch([3, 4])
    assert drained(order) == [2, 1, 4, 3]


def test_hinted_passes_over_pinned_ends_and_comes_back_to_them() -> None:
    order = HintedOrder(10)
    order.insert(chain(1))
    order.insert(chain(2))
    order.expect([2], None)
    order.pin([2])
    assert order.evict() == 1
    order.unpin([2])
    assert order.evict() == 2


def test_hinted_keeps_its_list_of_ends_bounded() -> None:
    order = HintedOrder(10)
    order.insert(chain(1))
    for _ in range(1000):
        order.expect([1], None)
        order.touch([1])
    order.expect([1], None)
    assert sys.getsizeof(vars(order)["_ended_leaves"]) < 4096
    assert order.evict() == 1


def test_hinted_keeps_its_heaps_bounded() -> None:
    order = HintedOrder(10)
    order.insert(chain(1))
    for i in range(1000):
        order.expect([1], 1e9 + i)
    assert order.evict() == 1


PARENTS = {1: None, 2: 1, 3: 2, 4: 2, 5: None, 6: 5, 7: 6, 8: 1}


def path(block: int) -> list[int]:
    parent = PARENTS[block]
    return [*path(parent), block] if parent is not None else [block]


STEPS = st.tuples(
    st.sampled_from(["insert", "touch", "evict", "discard", "pin", "unpin"]), st.sampled_from(sorted(PARENTS))
)


@pytest.mark.parametrize("name", ORDERS)
@given(steps=st.lists(STEPS, max_size=60))
def test_every_order_evicts_exactly_when_there_is_an_unpinned_leaf(name: str, steps: list[tuple[str, int]]) -> None:
    order = ORDERS[name](6)
    pins: dict[int, int] = {}
    for step, block in steps:
        held = [item for item in path(block) if item in pins]
        if step == "insert" and block not in pins:
            order.insert([(block, PARENTS[block])])
            pins[block] = 0
        elif step == "touch":
            order.touch(held)
        elif step == "discard":
            assert order.discard(block) == (pins.get(block) == 0)
            pins = {item: count for item, count in pins.items() if item != block or count}
        elif step == "pin" and block in pins:
            order.pin([block])
            pins[block] += 1
        elif step == "unpin" and pins.get(block):
            order.unpin([block])
            pins[block] -= 1
        elif step == "evict":
            leaves = {item for item, count in pins.items() if not count and not any(PARENTS[o] == item for o in pins)}
            victim = order.evict()
            assert (victim in leaves) if leaves else (victim is None)
            pins.pop(victim or 0, None)
        order.check_integrity()
        assert len(order) == len(pins)
        assert all(item in order for item in pins)


HINTS = st.tuples(
    st.sampled_from(["insert", "touch", "end", "expect", "evict", "discard", "pin", "unpin"]),
    st.sampled_from(sorted(PARENTS)),
    st.integers(1, 50),
)


class Sessions:
    """A hinted order beside what it should know, kept the slow way; one method a step."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.order = HintedOrder(6, clock=self.clock)
        self.pins: dict[int, int] = {}
        self.ended: set[int] = set()
        self.expected: dict[int, int] = {}

    def held(self, block: int) -> list[int]:
        return [item for item in path(block) if item in self.pins]

    def insert(self, block: int, time: int) -> None:
        if block in self.pins:
            return
        self.order.insert([(block, PARENTS[block])])
        self.pins[block] = 0
        above: int | None = block
        while above in self.pins:
            self.ended.discard(above)
            above = PARENTS[above]

    def touch(self, block: int, time: int) -> None:
        held = self.held(block)
        self.order.touch(held)
        self.ended.difference_update(held)
        self.unexpect(held)

    def end(self, block: int, time: int) -> None:
        held = self.held(block)
        self.order.expect(held, None)
        self.ended.update(held)
        self.unexpect(held)

    def expect(self, block: int, time: int) -> None:
        if held := self.held(block):
            self.order.expect(held, self.clock.monotonic() + time)
            self.ended.difference_update(held)
            self.unexpect(held)
            self.expected[held[-1]] = time

    def discard(self, block: int, time: int) -> None:
        if self.order.discard(block):
            self.forget(block)

    def pin(self, block: int, time: int) -> None:
        if block in self.pins:
            self.order.pin([block])
            self.pins[block] += 1

    def unpin(self, block: int, time: int) -> None:
        if self.pins.get(block):
            self.order.unpin([block])
            self.pins[block] -= 1

    def evict(self, block: int, time: int) -> None:
        victim, candidates = self.order.evict(), self.candidates()
        assert (victim in candidates) if candidates else (victim is None)
        if victim is None:
            return
        parent, expected = PARENTS[victim], self.expected.get(victim)
        self.forget(victim)
        if expected is not None and parent in self.pins:
            self.expected[parent] = min(expected, self.expected.get(parent, expected))
            self.ended.discard(parent)

    def candidates(self) -> set[int]:
        """Return the blocks of which one must go next."""
        parents = {PARENTS[item] for item in self.pins}
        leaves = {item for item, count in self.pins.items() if not count and item not in parents}
        latest = max((self.expected[item] for item in leaves & self.expected.keys()), default=0)
        last = {item for item in leaves if self.expected.get(item) == latest}
        return (leaves & self.ended) or (leaves - self.expected.keys()) or last

    def unexpect(self, held: list[int]) -> None:
        self.expected = {item: time for item, time in self.expected.items() if item not in held}

    def forget(self, block: int) -> None:
        del self.pins[block]
        self.ended.discard(block)
        self.expected.pop(block, None)


@given(steps=st.lists(HINTS, max_size=80))
def test_hinted_takes_the_ended_then_the_unexpected_then_the_latest(steps: list[tuple[str, int, int]]) -> None:
    sessions = Sessions()
    for step, block, time in steps:
        getattr(sessions, step)(block, time)
        sessions.order.check_integrity()
