from __future__ import annotations

import asyncio
import inspect
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from dynamo_core.discovery import Discovery
from dynamo_core.memory import MemoryDiscovery
from dynamo_core.planning import Observation, PoolState, ScalingTarget, TrafficStats
from dynamo_core.telemetry import Metrics
from dynamo_core.testing import FakeClock
from dynamo_planner import ConstantPredictor, PlannerSettings, create_planner
from dynamo_planner._election import Election
from dynamo_planner._loop import PlannerLoop
from dynamo_planner._metrics import PlannerMetrics
from dynamo_planner._record import DecisionLog, read_log
from dynamo_planner._targets.virtual import VirtualTarget


class Yielding:
    """Lets other tasks run before and after each call, so that a task can be killed between any two."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not inspect.iscoroutinefunction(found):
            return found

        async def call(*arguments: Any, **options: Any) -> Any:
            await asyncio.sleep(0)
            try:
                return await found(*arguments, **options)
            finally:
                await asyncio.sleep(0)

        return call


class Rising:
    """Traffic that grows with every look."""

    lost_reports = 0

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self.requests = 100

    async def run(self) -> None:
        pass

    async def observe(self, pools: Mapping[str, PoolState]) -> Observation:
        traffic = TrafficStats("m", 10.0, requests=self.requests)
        return Observation(self._clock.time(), (traffic,), dict(pools))

    async def close(self) -> None:
        pass


def loop_of(
    discovery: MemoryDiscovery, clock: FakeClock, name: str, *, log: Path | None = None
) -> tuple[PlannerLoop, Rising, Metrics]:
    settings = PlannerSettings(throughput_interval_s=10, planning_quantile=0.5)
    metrics, source = Metrics(), Rising(clock)
    loop = PlannerLoop(
        settings,
        create_planner(settings, ConstantPredictor),
        source,
        cast("ScalingTarget", Yielding(VirtualTarget(discovery, "dynamo", {"worker": 1}))),
        clock=clock,
        metrics=PlannerMetrics(metrics),
        election=Election(cast("Discovery", Yielding(discovery)), "dynamo", name),
        log=None if log is None else DecisionLog(log, 1_000_000),
    )
    return loop, source, metrics


async def test_a_successor_of_a_killed_leader_continues_without_a_double_step() -> None:
    discovery, clock = MemoryDiscovery(), FakeClock()
    await VirtualTarget(discovery, "dynamo", {"worker": 1}).start()
    one, source, metrics = loop_of(discovery, clock, "one")
    two, late, _ = loop_of(discovery, clock, "two")
    source.requests = late.requests = 300
    decision = await one.tick()
    assert decision is not None
    assert decision.replicas == {"worker": 4}
    assert await two.tick() is None
    assert (one.leading, two.leading) == (True, False)
    assert two.health().reason == "another planner leads"
    assert metrics.registry.get_sample_value("dynamo_planner_leading") == 1
    await discovery.delete("dynamo/planner/leader")
    await clock.advance(10)
    taken_over = await two.tick()
    assert taken_over is not None
    assert taken_over.decision_id > decision.decision_id
    assert taken_over.replicas == {"worker": 4}
    assert (await VirtualTarget(discovery, "dynamo", {"worker": 1}).state())["worker"].desired == 4


async def test_a_planner_that_dies_between_any_two_calls_leaves_no_double_step() -> None:
    died_after_asking = died_before_asking = 0
    for point in itertools.count():
        discovery, clock = MemoryDiscovery(), FakeClock()
        target = VirtualTarget(discovery, "dynamo", {"worker": 1})
        await target.start()
        one, source, _ = loop_of(discovery, clock, "one")
        two, late, _ = loop_of(discovery, clock, "two")
        source.requests = late.requests = 300
        dying = asyncio.create_task(one.tick())
        for _ in range(point):
            await asyncio.sleep(0)
        if dying.done():
            break
        dying.cancel()
        await asyncio.gather(dying, return_exceptions=True)
        asked = (await target.state())["worker"].desired
        assert asked in (1, 4)
        died_after_asking += asked == 4
        died_before_asking += asked == 1
        await discovery.delete("dynamo/planner/leader")
        await clock.advance(10)
        for _ in range(3):
            assert await two.tick() is not None
            assert (await target.state())["worker"].desired == 4
            await clock.advance(10)
    assert died_before_asking >= 5
    assert died_after_asking >= 1


async def test_decisions_are_kept_with_their_input_and_a_full_disk_does_not_stop_them(tmp_path: Path) -> None:
    discovery, clock = MemoryDiscovery(), FakeClock()
    await VirtualTarget(discovery, "dynamo", {"worker": 1}).start()
    path = tmp_path / "decisions.jsonl"
    loop, _, metrics = loop_of(discovery, clock, "one", log=path)
    decision = await loop.tick()
    [record] = read_log(path)
    assert record.decision == decision
    assert record.observation.traffic[0].requests == 100
    path.unlink()
    path.mkdir()
    assert await loop.tick() is not None
    assert metrics.registry.get_sample_value("dynamo_planner_lost_records_total") == 1
