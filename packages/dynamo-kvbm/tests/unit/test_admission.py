from __future__ import annotations

from dynamo_core.kv import BlockDescriptor
from dynamo_core.testing import FakeClock
from dynamo_kvbm._admission import MAX_EXPECTED, PROBE_EVERY, CostTest, SecondTouch


def test_second_touch_counts_within_its_bound() -> None:
    seen = SecondTouch(2)
    seen.note([1, 2, 1])
    assert (seen.seen_twice(1), seen.seen_twice(2)) == (True, False)
    seen.note([3, 4])
    assert not seen.seen_twice(1)


async def test_the_time_to_compute_is_measured_from_look_up_to_the_last_missing_block() -> None:
    clock = FakeClock()
    cost = CostTest(clock)
    cost.looked_up([1, 2, 3, 4])
    await clock.advance(2.0)
    cost.computed([BlockDescriptor(1), BlockDescriptor(2)])
    assert cost.recompute_s is None
    cost.computed([BlockDescriptor(3), BlockDescriptor(4)])
    assert cost.recompute_s == 0.5


def test_unmeasured_tiers_pass_and_slow_ones_are_probed() -> None:
    cost = CostTest(FakeClock())
    cost.recompute_s = 0.1
    assert cost.worth("disk")
    cost.fetched("disk", 2, 0.1)
    assert cost.worth("disk")
    for _ in range(100):
        cost.fetched("disk", 1, 1.0)
    asked = [number for number in range(1, 3 * PROBE_EVERY + 1) if cost.worth("disk")]
    assert asked == [2, 4, 8, 16, PROBE_EVERY, 2 * PROBE_EVERY, 3 * PROBE_EVERY]


def test_one_bad_moment_does_not_close_a_tier() -> None:
    cost = CostTest(FakeClock())
    cost.recompute_s = 0.1
    cost.fetched("host_pinned", 10, 0.1)
    cost.fetched("host_pinned", 1, 30.0)
    assert cost.worth("host_pinned")
    for _ in range(100):
        cost.fetched("host_pinned", 1, 30.0)
    assert not cost.worth("host_pinned"), "but a tier that is slow for good is"


def test_prefixes_that_are_never_computed_are_forgotten() -> None:
    clock = FakeClock()
    cost = CostTest(clock)
    cost.looked_up([1])
    for item in range(2, MAX_EXPECTED + 2):
        cost.looked_up([item])
    cost.computed([BlockDescriptor(1)])
    assert cost.recompute_s is None
