from __future__ import annotations

import asyncio

from dynamo_core import wire
from dynamo_core.ids import EndpointId, WorkerId
from dynamo_core.load import ForwardPassMetrics, ReportedLoad, WorkerLoad
from dynamo_core.memory import MemoryEventBus
from dynamo_core.planes import FORWARD_PASS, LOAD, TRAFFIC, Topic
from dynamo_core.planning import TrafficStats
from dynamo_core.testing import FakeClock
from dynamo_planner._sources.bus import BusSource

BACKEND, PREFILL = EndpointId("dynamo", "backend", "generate"), EndpointId("dynamo", "prefill", "generate")


async def test_traffic_loads_and_passes_are_collected_with_the_role_of_each_worker() -> None:
    clock = FakeClock()
    bus = MemoryEventBus(clock=clock)
    await bus.start()
    source = BusSource(bus, "dynamo", clock, 30, {BACKEND: "decode", PREFILL: "prefill"})
    task = asyncio.create_task(source.run())
    await clock.settle()
    for endpoint, worker in ((BACKEND, 10), (PREFILL, 11)):
        load = WorkerLoad(WorkerId(worker), reported=ReportedLoad(kv_used_blocks=worker))
        (await bus.publisher(Topic.of(LOAD, endpoint))).publish(wire.WORKER_LOAD.encode(load))
    passes = await bus.publisher(Topic.of(FORWARD_PASS, BACKEND))
    passes.publish(wire.FORWARD_PASS_METRICS.encode(ForwardPassMetrics(WorkerId(10), 0.02)))
    passes.publish(b"\xc1")
    traffic = await bus.publisher(Topic(TRAFFIC, "dynamo"))
    traffic.publish(wire.TRAFFIC_STATS.encode(TrafficStats("m", 5.0, requests=3)))
    await clock.advance(10)
    seen = await source.observe({})
    assert seen.roles == {"a": "decode", "b": "prefill"}
    assert seen.loads["b"].kv_used_blocks == 11
    assert [item.wall_time_s for item in seen.passes] == [0.02]
    assert (seen.traffic[0].requests, seen.traffic[0].interval_s) == (3, 10)
    assert source.lost_reports == 1
    await clock.advance(31)
    later = await source.observe({})
    assert (later.loads, later.passes, later.traffic, later.stale) == ({}, (), (), ("traffic",))
    await source.close()
    async with asyncio.timeout(5):
        await task
