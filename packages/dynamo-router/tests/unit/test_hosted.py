from __future__ import annotations

from contextlib import asynccontextmanager

import pytest

from dynamo_core.cards import LoraInfo, ModelCard, ModelRuntimeConfig
from dynamo_core.discovery import ModelRecord
from dynamo_core.enums import HealthState
from dynamo_core.errors import ConfigurationError, NotFoundError
from dynamo_core.ids import EndpointId, WorkerId
from dynamo_core.load import ReportedLoad, WorkerLoad
from dynamo_core.planes import KV_EVENTS, Topic
from dynamo_core.routing import Router, RouterScope, RoutingRequest
from dynamo_core.tokens import pack_tokens
from dynamo_core.wire import MODEL_RECORD, WORKER_LOAD
from dynamo_router import create_router
from dynamo_router._indexer import StreamState

ENDPOINT = EndpointId("ns", "backend", "generate")
CARD = ModelCard("m", kv_block_size=4)
PROMPT = pack_tokens(range(40))


@asynccontextmanager
async def routed(planes, card=CARD, policy="", **options):
    router = create_router(planes.context, RouterScope(ENDPOINT, card, policy, options))
    await router.start()
    try:
        yield router
    finally:
        await router.stop()
        await router.stop()


def depth(router, worker):
    return router.indexer.index.blocks_of(worker)


async def select(router):
    return await router.select(RoutingRequest("r", token_ids=PROMPT))


async def test_follows_discovery(planes):
    await planes.add(1)
    async with routed(planes) as router:
        assert isinstance(router, Router)
        assert router.workers() == [WorkerId(1)]
        two = await planes.add(
            2, ModelCard("m", kv_block_size=4, runtime_config=ModelRuntimeConfig(data_parallel_size=2))
        )
        await planes.until(lambda: router.workers() == [WorkerId(1), WorkerId(2, 0), WorkerId(2, 1)])
        await planes.discovery.delete(two.key)
        await planes.until(lambda: router.workers() == [WorkerId(1)])
        assert WorkerId(2) not in router.indexer.streams()


async def test_workers_of_another_set_are_left_out(planes):
    await planes.add(1, ModelCard("other", kv_block_size=4))
    await planes.add(2, None)
    lora = ModelRecord(ENDPOINT, 3, ModelCard("lora", kv_block_size=4, lora=LoraInfo("lora")), "lora")
    await planes.discovery.put(lora.key, MODEL_RECORD.encode(lora))
    await planes.add(3)
    async with routed(planes) as router:
        assert router.workers() == [WorkerId(2), WorkerId(3)]


async def test_a_new_worker_is_asked_for_its_cache_and_events_follow(planes):
    planes.cache[WorkerId(2)] = (5, (planes.stored(5, 0, 8),))
    await planes.add(1)
    await planes.add(2)
    async with routed(planes) as router:
        await planes.until(lambda: router.indexer.stream(WorkerId(2)).state is StreamState.LIVE)
        assert (await select(router)).overlap_blocks == 8
        planes.publish(WorkerId(2), planes.stored(6, 8, 2))
        await planes.until(lambda: depth(router, WorkerId(2)) == 10)
        await planes.until(lambda: router.health().state is HealthState.READY)


async def test_missed_events_are_fetched_from_the_worker(planes):
    await planes.add(1)
    async with routed(planes) as router:
        await planes.until(lambda: router.indexer.stream(WorkerId(1)).state is StreamState.LIVE)
        planes.cache[WorkerId(1)] = (3, (planes.stored(1, 0, 2), planes.stored(2, 2, 2), planes.stored(3, 4, 2)))
        planes.publish(WorkerId(1), planes.stored(1, 0, 2))
        await planes.until(lambda: depth(router, WorkerId(1)) == 2)
        planes.publish(WorkerId(1), planes.stored(3, 4, 2))
        await planes.until(lambda: depth(router, WorkerId(1)) == 6)
        assert planes.queries[-1].first == 2
        assert planes.queries[-1].last == 2


async def test_events_lost_on_the_bus_are_replayed(planes):
    await planes.add(1)
    async with routed(planes) as router:
        await planes.until(lambda: router.indexer.stream(WorkerId(1)).state is StreamState.LIVE)
        planes.bus.lose_next(Topic.of(KV_EVENTS, ENDPOINT), 1)
        planes.publish(WorkerId(1), planes.stored(1, 0, 2))
        planes.publish(WorkerId(1), planes.stored(2, 2, 2))
        await planes.until(lambda: depth(router, WorkerId(1)) == 4)


async def test_a_worker_that_cannot_answer_is_known_to_be_lossy_until_it_can(planes):
    planes.failure = NotFoundError("no such rank")
    await planes.add(1)
    async with routed(planes, recovery_attempts=2) as router:
        await planes.until(lambda: router.indexer.stream(WorkerId(1)).state is StreamState.LOSSY)
        assert router.health().state is HealthState.DEGRADED
        assert "no such rank" in router.health().reason
        assert (await select(router)).index_mode == "approximate"
        planes.failure = None
        planes.cache[WorkerId(1)] = (1, (planes.stored(1),))
        await planes.add(1)
        await planes.until(lambda: depth(router, WorkerId(1)) == 10)


async def test_refused_workers_and_events_are_visible(planes):
    await planes.add(1, answers=False)
    async with routed(planes, ModelCard("m", kv_block_size=4)) as router:
        planes.publish(WorkerId(9), planes.stored(1))
        planes.publish(WorkerId(1), planes.stored(1), block_size=16)
        planes.events.publish(b"junk")
        await planes.until(lambda: router.indexer.stream(WorkerId(1)).state is StreamState.REFUSED)
        assert "block size 16" in router.health().reason
        assert router.indexer.index.workers() == [WorkerId(1)]
        await planes.discovery.put("v1/instances/ns/backend/generate/5", b"junk")
        assert (await select(router)).worker == WorkerId(1)


async def test_takes_load_reports(planes):
    await planes.add(1)
    async with routed(planes) as router:
        report = ReportedLoad(kv_used_blocks=7, kv_total_blocks=10)
        planes.loads.publish(WORKER_LOAD.encode(WorkerLoad(WorkerId(1), report)))
        await planes.until(lambda: router.loads()[0].reported == report)


async def test_options_reach_settings_and_policy(planes):
    async with routed(planes, policy="kv", temperature=0.5, inhibit_s=9) as router:
        assert router.settings.inhibit_s == 9
        assert router.health().state is HealthState.DEGRADED
    async with routed(planes, policy="round-robin") as router:
        await planes.add(1)
        await planes.until(lambda: router.workers() == [WorkerId(1)])
        assert (await select(router)).policy == "round-robin"
    card = ModelCard("m", kv_block_size=4, router_config={"policy": "random"})
    await planes.add(2, card)
    async with routed(planes, card, temperature=0.5) as router:
        decision = await select(router)
        assert (decision.policy, decision.worker) == ("random", WorkerId(2))
    for options in ({"inhibit_s": -1}, {"nonsense": 1}):
        with pytest.raises(ConfigurationError, match=next(iter(options))):
            create_router(planes.context, RouterScope(ENDPOINT, CARD, "", options))


async def test_health_is_on_the_board_while_it_runs(planes):
    async with routed(planes) as router:
        assert planes.context.health.report() == {"router:ns.backend.generate:m": router.health()}
    assert planes.context.health.report() == {}
