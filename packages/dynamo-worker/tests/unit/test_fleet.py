"""Many workers in one process: identities, events, loads, failures."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from dynamo_core.engine import EngineConfig, EngineContext
from dynamo_core.enums import FinishReason, HealthState
from dynamo_core.errors import ConfigurationError
from dynamo_core.planes import KV_EVENTS, LOAD, CallOptions
from dynamo_core.requests import GenerateChunk, GenerateRequest
from dynamo_core.telemetry import Metrics
from dynamo_core.tokens import pack_tokens
from dynamo_core.wire import GENERATE_REQUEST, KV_EVENT_BATCH, WORKER_LOAD
from dynamo_worker import WorkerSettings, create_worker
from dynamo_worker._fleet import WorkerFleet
from dynamo_worker._plugin import plugin

WORKERS = 64
MOCK = ["--kv-block-size", "4", "--total-kv-blocks", "256"]


async def start(process: Any, count: int = WORKERS, **settings: Any) -> WorkerFleet:
    options = WorkerSettings(engine="mock", num_workers=count, **{"canary_idle_s": 0.0, **settings})
    fleet = plugin.create(process.context, (options,), list(MOCK))
    assert isinstance(fleet, WorkerFleet)
    process.workers.append(fleet)
    await fleet.start()
    return fleet


async def ask(process: Any, kit: Any, worker: Any, request: GenerateRequest) -> Any:
    reply = kit.Reply()
    options = CallOptions(f"{request.request_id}-{worker.instance_id:x}")
    payload = GENERATE_REQUEST.encode(request)
    reply.call = await process.plane.open(worker.address, worker.endpoint, payload, reply, options)
    return reply


async def test_each_worker_is_registered_under_an_id_of_its_own(process: Any) -> None:
    fleet = await start(process)
    records = await process.models()
    ids = {record.instance_id for record in records}
    assert ids == {worker.instance_id for worker in fleet.workers}
    assert len(ids) == WORKERS
    generate = [i for i in await process.instances() if i.endpoint.endpoint == "generate"]
    assert len({(instance.instance_id, instance.address) for instance in generate}) == WORKERS
    assert {record.card.checksum for record in records} == {records[0].card.checksum}, "one model, one set of workers"
    await fleet.drain(5)
    assert await process.models() == []


async def test_each_worker_has_blocks_events_and_load_of_its_own(process: Any, kit: Any) -> None:
    fleet = await start(process)
    events = await process.subscribe(KV_EVENTS, fleet.workers[0].endpoint)
    loads = await process.subscribe(LOAD, fleet.workers[0].endpoint)
    replies: list[Any] = []
    for number, worker in enumerate(fleet.workers):
        prompt = list(range(number + 1, number + 1 + 4 * (number % 5 + 1) + 1))
        replies.append(await ask(process, kit, worker, kit.request(prompt=prompt, max_tokens=100)))
    await process.clock.advance(0.5)
    stored: dict[int, int] = {}
    busy: set[int] = set()
    async with asyncio.timeout(20):
        while len(stored) < WORKERS or len(busy) < WORKERS:
            batch = KV_EVENT_BATCH.decode((await kit.next_event(events)).payload)
            first = batch.events[0]
            assert first.event_id >= 1
            stored.setdefault(batch.worker.instance_id, first.event_id)
            load = WORKER_LOAD.decode((await kit.next_event(loads)).payload)
            if load.reported.active_requests == 1:
                busy.add(load.worker.instance_id)
    assert set(stored.values()) == {1}, "every worker counts its events from one"
    for reply in replies:
        await process.clock.run(reply.done.wait())
        assert (reply.error, len(reply.tokens)) == (None, 100)
        assert reply.chunks[-1].usage.cached_tokens == 0, "nobody else's blocks are its own"


async def test_metrics_of_workers_do_not_overwrite_each_other(process: Any, kit: Any) -> None:
    metrics = Metrics(labels={"dynamo_component": "worker"})
    process.context = replace(process.context, metrics=metrics)
    fleet = await start(process, 2)
    await ask(process, kit, fleet.workers[1], kit.request(max_tokens=1000))
    await process.clock.advance(0.1)
    found = [
        metrics.registry.get_sample_value("dynamo_worker_engine_requests", {"dynamo_component": f"worker-{number}"})
        for number in range(2)
    ]
    assert found == [0.0, 1.0]


async def test_one_dead_worker_leaves_alone(process: Any, kit: Any) -> None:
    """The process goes on with the others, and stops with the last."""
    engines = [kit.ScriptedEngine(), kit.ScriptedEngine()]
    left = iter(engines)
    settings = WorkerSettings(canary_idle_s=10.0, probe_timeout_s=3.0)
    fleet = WorkerFleet(process.context, 2, lambda each: create_worker(each, settings, engine=next(left)))
    process.workers.append(fleet)
    await fleet.start()

    def answer(request: Any, sink: Any) -> None:
        sink.push(GenerateChunk(pack_tokens([5]), 0, finish_reason=FinishReason.LENGTH))

    engines[1].script = answer
    await process.clock.advance(14)
    assert [worker.health().state for worker in fleet.workers] == [HealthState.FAILED, HealthState.READY]
    assert {record.instance_id for record in await process.models()} == {fleet.workers[1].instance_id}
    assert process.stop_requests == []
    engines[1].script = None
    await process.clock.advance(14)
    (reason,) = process.stop_requests
    assert reason.startswith("all workers are dead")
    assert process.expect_deaths() == 2


async def test_a_worker_that_cannot_start_is_told_after_all_have_tried(process: Any, kit: Any) -> None:
    class Failing(kit.ScriptedEngine):
        async def start(self, context: EngineContext) -> EngineConfig:
            raise ConfigurationError("option --model has no folder")

    good = kit.ScriptedEngine()
    engines = iter([Failing(), good])
    fleet = WorkerFleet(process.context, 2, lambda each: create_worker(each, engine=next(engines)))
    process.workers.append(fleet)
    with pytest.raises(ConfigurationError, match="has no folder"):
        await fleet.start()
    assert [record.instance_id for record in await process.models()] == [fleet.workers[1].instance_id]
    await fleet.stop()
    await fleet.stop()
    assert await process.models() == []
    assert good.cleanups == 1
