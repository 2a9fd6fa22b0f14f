from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any

import pytest

from dynamo_core import plugins, wire
from dynamo_core.component import Component, ComponentContext, ComponentPlugin
from dynamo_core.enums import HealthState
from dynamo_core.errors import UnavailableError
from dynamo_core.memory import MemoryDiscovery, MemoryEventBus, MemoryRequestPlane
from dynamo_core.planes import TRAFFIC, Publisher, Topic
from dynamo_core.planning import PoolState, TrafficStats
from dynamo_core.telemetry import Metrics
from dynamo_planner import ConstantPredictor, PlannerSettings, create_planner
from dynamo_planner._component import PlannerComponent


class StepClock:
    """A clock whose sleepers wake when the test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._sleepers: list[tuple[float, asyncio.Event]] = []

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    async def sleep(self, delay_s: float) -> None:
        wake = asyncio.Event()
        self._sleepers.append((self.now + delay_s, wake))
        await wake.wait()

    def advance(self, seconds: float) -> None:
        self.now += seconds
        due = [item for item in self._sleepers if item[0] <= self.now]
        self._sleepers = [item for item in self._sleepers if item not in due]
        for _, wake in due:
            wake.set()

    @property
    def asleep(self) -> int:
        return len(self._sleepers)


class RecordingTarget:
    """A pool that does at once what it is asked."""

    def __init__(self) -> None:
        self.replicas = 1
        self.asked: list[dict[str, int]] = []
        self.reachable = True
        self.closed = False

    async def start(self) -> None:
        pass

    async def state(self) -> Mapping[str, PoolState]:
        if not self.reachable:
            raise UnavailableError("the supervisor is away")
        return {"worker": PoolState(ready=self.replicas, desired=self.replicas)}

    async def scale(self, replicas: Mapping[str, int], *, decision_id: int = 0) -> None:
        self.asked.append(dict(replicas))
        self.replicas = replicas["worker"]

    async def close(self) -> None:
        self.closed = True


class Rig:
    """A planner component in a process of its own making."""

    def __init__(self, **options: Any) -> None:
        settings = PlannerSettings(
            requests_per_replica_s=10,
            utilization=1,
            interval_s=10,
            throughput_interval_s=10,
            stale_after_s=30,
            scale_down_delay_s=20,
            **options,
        )
        self.clock = StepClock()
        self.bus = MemoryEventBus(clock=self.clock)
        self.target = RecordingTarget()
        self.metrics = Metrics()
        self._tasks: set[asyncio.Task[None]] = set()
        self.context = ComponentContext(
            namespace="dynamo",
            discovery=MemoryDiscovery(),
            request_plane=MemoryRequestPlane(),
            event_bus=self.bus,
            metrics=self.metrics,
            clock=self.clock,
            spawn=self._spawn,
        )
        planner = create_planner(settings, ConstantPredictor)
        self.component = PlannerComponent(self.context, settings, self.target, planner)
        self.publisher: Publisher | None = None

    def _spawn(self, coroutine: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)
        return task

    async def settle(self) -> None:
        """Let everything that is ready run, until the loop sleeps again."""
        for _ in range(50):
            await asyncio.sleep(0)
        assert self.clock.asleep == 1

    async def report(self, requests: int) -> None:
        if self.publisher is None:
            self.publisher = await self.bus.publisher(Topic(TRAFFIC, "dynamo"))
        self.publisher.publish(wire.TRAFFIC_STATS.encode(TrafficStats("m", 5.0, requests=requests)))
        await self.settle()

    async def tick(self) -> None:
        self.clock.advance(10)
        await self.settle()

    async def decisions(self) -> list[dict[str, Any]]:
        answer = await self.context.admin_routes["decisions"]({})
        return answer["decisions"]

    def health(self) -> HealthState:
        return self.context.health.report()["planner"].state


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    await rig.component.start()
    await rig.settle()
    yield rig
    await rig.component.stop()
    await rig.component.stop()
    assert rig.target.closed


async def test_reports_of_one_window_add_up_to_a_rate_and_scale_the_target(rig: Rig) -> None:
    await rig.report(150)
    await rig.report(150)
    await rig.tick()
    assert rig.target.asked == [{"worker": 3}]
    [decision] = await rig.decisions()
    assert decision["values"]["observed_requests_per_second"] == 30.0
    assert decision["reason"] == "scale_up"
    assert rig.metrics.registry.get_sample_value("dynamo_planner_desired_replicas", {"role": "worker"}) == 3


async def test_the_target_goes_back_down_after_the_delay(rig: Rig) -> None:
    await rig.report(300)
    await rig.tick()
    for _ in range(3):
        await rig.report(0)
        await rig.tick()
    assert rig.target.replicas == 1


async def test_silence_holds_and_is_said_so(rig: Rig) -> None:
    await rig.report(300)
    await rig.tick()
    for _ in range(5):
        await rig.tick()
    assert rig.target.replicas == 3
    assert (await rig.decisions())[-1]["reason"] == "no_traffic_data"


async def test_an_unreachable_target_degrades_health_and_recovers(rig: Rig) -> None:
    rig.target.reachable = False
    await rig.tick()
    assert rig.health() is HealthState.DEGRADED
    assert rig.metrics.registry.get_sample_value("dynamo_planner_failed_ticks_total") == 1
    rig.target.reachable = True
    await rig.tick()
    assert rig.health() is HealthState.READY


async def test_an_unreadable_report_is_counted_and_harmless(rig: Rig) -> None:
    await rig.report(0)
    assert rig.publisher is not None
    rig.publisher.publish(b"\xc1 not msgpack")
    await rig.tick()
    assert rig.metrics.registry.get_sample_value("dynamo_planner_lost_reports") == 1
    assert rig.health() is HealthState.READY


async def test_advisory_mode_decides_and_leaves_the_replicas_alone() -> None:
    rig = Rig(advisory=True)
    await rig.component.start()
    await rig.settle()
    await rig.report(300)
    await rig.tick()
    assert rig.target.asked == []
    [decision] = await rig.decisions()
    assert (decision["advisory"], decision["replicas"]) == (True, {"worker": 3})
    await rig.component.stop()


def test_the_plug_in_is_found_by_name() -> None:
    plugin = plugins.load("components", "planner")
    assert isinstance(plugin, ComponentPlugin)
    assert plugin.settings_types == (PlannerSettings,)
    assert isinstance(Rig().component, Component)
    assert plugins.load("load_predictors", "constant") is ConstantPredictor
