"""The fake clock wakes sleepers in order, and only when told."""

import asyncio

import pytest

from dynamo_core.clock import Clock, SystemClock
from dynamo_core.testing import FakeClock


async def test_sleepers_wake_in_order_at_their_own_time() -> None:
    clock = FakeClock()
    seen: list[tuple[str, float]] = []

    async def sleeper(name: str, delay_s: float) -> None:
        await clock.sleep(delay_s)
        seen.append((name, clock.monotonic()))

    async with asyncio.TaskGroup() as group:
        for name, delay_s in (("c", 3.0), ("a", 1.0), ("b1", 2.0), ("b2", 2.0)):
            group.create_task(sleeper(name, delay_s))
        await clock.advance(2.5)
        assert seen == [("a", 1.0), ("b1", 2.0), ("b2", 2.0)]
        assert clock.monotonic() == 2.5
        assert clock.sleepers == 1
        assert clock.next_due_s == 0.5
        await clock.advance(0.5)
    assert seen[-1] == ("c", 3.0)


async def test_repeated_sleeps_happen_within_one_advance() -> None:
    clock = FakeClock()
    ticks: list[float] = []

    async def ticker() -> None:
        while True:
            await clock.sleep(1.0)
            ticks.append(clock.monotonic())

    task = asyncio.create_task(ticker())
    await clock.advance(3.0)
    task.cancel()
    assert ticks == [1.0, 2.0, 3.0]


async def test_cancelled_sleeper_leaves() -> None:
    clock = FakeClock()
    task = asyncio.create_task(clock.sleep(5.0))
    await clock.wait_for_sleepers(1)
    task.cancel()
    await asyncio.wait([task])
    assert clock.sleepers == 0
    assert clock.next_due_s is None


async def test_run_jumps_to_the_end() -> None:
    clock = FakeClock(epoch_s=100.0)

    async def work() -> str:
        await clock.sleep(1000.0)
        return "done"

    assert await clock.run(work()) == "done"
    assert clock.time() == 1100.0


async def test_run_gives_up_on_what_never_comes() -> None:
    clock = FakeClock()
    with pytest.raises(TimeoutError, match="0 sleepers"):
        await clock.run(asyncio.Event().wait())
    with pytest.raises(TimeoutError, match="1 sleepers"):
        await clock.run(clock.sleep(100.0), limit_s=10.0)


async def test_run_raises_what_the_work_raises() -> None:
    async def work() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await FakeClock().run(work())


async def test_waiting_for_sleepers_ends() -> None:
    with pytest.raises(TimeoutError, match="0 tasks sleep, not 1"):
        await FakeClock().wait_for_sleepers(1, limit_ticks=10)


async def test_time_does_not_go_back() -> None:
    with pytest.raises(ValueError, match="back"):
        await FakeClock().advance(-1.0)


async def test_empty_sleep_returns() -> None:
    await FakeClock().sleep(0)
    await FakeClock().sleep(-1)


async def test_both_are_clocks() -> None:
    assert isinstance(FakeClock(), Clock)
    clock = SystemClock()
    assert isinstance(clock, Clock)
    before = clock.monotonic()
    await clock.sleep(0)
    assert clock.monotonic() >= before
    assert clock.time() > 1e9
