from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dynamo_core.engine import EngineConfig
from dynamo_core.ids import WorkerId
from dynamo_core.load import ForwardPassMetrics, ReportedLoad, ScheduledStats, WorkerLoad
from dynamo_core.planes import FORWARD_PASS, LOAD, Subscription
from dynamo_core.wire import FORWARD_PASS_METRICS, WORKER_LOAD


class Reports:
    """Everything published on a topic, decoded as it comes."""

    def __init__(self, process: Any, codec: Any, subscription: Subscription) -> None:
        self.seen: list[Any] = []
        self._codec = codec
        self._subscription = subscription
        process.tasks.append(process._spawn(self._collect(), name="collect"))

    async def _collect(self) -> None:
        async for event in self._subscription:
            self.seen.append(self._codec.decode(event.payload))

    def take(self) -> list[Any]:
        taken, self.seen = self.seen, []
        return taken


def engine_with_load(kit: Any) -> Any:
    class Loaded(kit.ScriptedEngine):
        def __init__(self) -> None:
            super().__init__(config=EngineConfig("scripted"))
            self.used = 3
            self.listener: Callable[[ForwardPassMetrics], None] | None = None

        def load(self, *, dp_rank: int = 0) -> ReportedLoad:
            return ReportedLoad(kv_used_blocks=self.used, kv_total_blocks=10, active_requests=len(self.sinks))

        def set_forward_pass_listener(self, listener: Callable[[ForwardPassMetrics], None]) -> None:
            self.listener = listener

    return Loaded()


async def test_load_is_published_on_change_and_as_a_heartbeat(process: Any, kit: Any) -> None:
    engine = engine_with_load(kit)
    worker = await process.worker(engine, load_interval_s=0.1, load_heartbeat_s=1.0)
    reports = Reports(process, WORKER_LOAD, await process.subscribe(LOAD, worker.endpoint))
    await process.clock.settle()
    reports.take()
    await process.clock.advance(3.05)
    beats = reports.take()
    assert len(beats) == 3
    assert beats[0] == WorkerLoad(
        WorkerId(worker.instance_id), ReportedLoad(3, 10, reported_at_s=beats[0].reported.reported_at_s)
    )
    assert beats[0].reported.reported_at_s > 1_700_000_000
    assert process.metric("dynamo_worker_kv_used_blocks", dp_rank="0") == 3


async def test_changes_are_published_at_most_once_an_interval(process: Any, kit: Any) -> None:
    engine = engine_with_load(kit)
    worker = await process.worker(engine, load_interval_s=0.1, load_heartbeat_s=10.0)
    reports = Reports(process, WORKER_LOAD, await process.subscribe(LOAD, worker.endpoint))
    await process.clock.settle()
    reports.take()
    await process.open(kit.request())
    for _ in range(100):
        engine.used += 1
        await process.clock.advance(0.01)
    seen = reports.take()
    assert 9 <= len(seen) <= 11
    used = [report.reported.kv_used_blocks for report in seen]
    assert used == sorted(set(used))


async def test_an_engine_without_load_reports_its_requests(process: Any, kit: Any) -> None:
    engine = kit.ScriptedEngine()
    worker = await process.worker(engine, load_interval_s=0.1, load_heartbeat_s=5.0)
    reports = Reports(process, WORKER_LOAD, await process.subscribe(LOAD, worker.endpoint))
    await process.open(kit.request("a"))
    await process.open(kit.request("b"))
    await process.clock.advance(0.3)
    assert reports.take()[-1].reported.active_requests == 2
    engine.finish("a", 0)
    await process.clock.advance(0.3)
    assert reports.take()[-1].reported.active_requests == 1


async def test_an_engine_that_cannot_tell_its_load_is_not_asked_again(process: Any, kit: Any) -> None:
    class Confused(kit.ScriptedEngine):
        asked = 0

        def load(self, *, dp_rank: int = 0) -> ReportedLoad:
            self.asked += 1
            raise IndexError("no such rank")

    engine = Confused()
    worker = await process.worker(engine, load_interval_s=0.1, load_heartbeat_s=0.1)
    reports = Reports(process, WORKER_LOAD, await process.subscribe(LOAD, worker.endpoint))
    await process.open(kit.request())
    await process.clock.advance(1)
    assert reports.take()[-1].reported.active_requests == 1
    assert engine.asked == 1


async def test_each_forward_pass_is_published_and_idle_ones_are_marked(process: Any, kit: Any) -> None:
    engine = engine_with_load(kit)
    worker = await process.worker(engine)
    reports = Reports(process, FORWARD_PASS_METRICS, await process.subscribe(FORWARD_PASS, worker.endpoint))
    passed = ForwardPassMetrics(WorkerId(worker.instance_id), 0.02, ScheduledStats(num_decode_requests=3))
    engine.listener(passed)
    engine.listener(passed)
    await process.clock.settle()
    assert reports.take() == [passed, passed]
    await process.clock.advance(3)
    idle = reports.take()
    assert 2 <= len(idle) <= 3
    assert {report.wall_time_s for report in idle} == {0.0}
