"""The reference engine, which steps on a thread of its own, behind the host."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dynamo_core.enums import FinishReason, Modality, ModelType
from dynamo_core.events import BlockStored
from dynamo_core.ids import WorkerId
from dynamo_core.noop import LocalRequestContext
from dynamo_core.requests import RoutingHints, SamplingOptions, StopConditions
from dynamo_core.tokens import unpack_tokens
from dynamo_worker import ReferenceEngine

PROMPT = list(range(100, 140))


async def test_tokens_usage_and_kv_events_come_through(process: Any, kit: Any) -> None:
    engine = ReferenceEngine.from_args(["--num-blocks", "256", "--max-model-len", "512"])
    worker = await process.worker(engine)
    stop = StopConditions(max_tokens=12, ignore_eos=True)
    greedy = kit.request("through", PROMPT, stop=stop, sampling=SamplingOptions(temperature=0.0))
    reply = await process.open(greedy)
    await asyncio.wait_for(reply.done.wait(), 30)
    assert reply.error is None
    assert reply.finish is FinishReason.LENGTH
    direct = [
        token
        async for chunk in engine.generate(greedy, LocalRequestContext("through"))
        for token in unpack_tokens(chunk.token_ids)
    ]
    assert reply.tokens == direct
    again = await process.open(kit.request("again", PROMPT, stop=stop, sampling=SamplingOptions(temperature=0.0)))
    await asyncio.wait_for(again.done.wait(), 30)
    assert again.chunks[-1].usage.cached_tokens == 32
    batch = await process.query(WorkerId(worker.instance_id))
    assert sum(len(event) for event in batch.events if isinstance(event, BlockStored)) >= 2
    (record,) = await process.models()
    assert record.card.kv_block_size == batch.block_size == 16


async def test_cancelling_frees_the_request(process: Any, kit: Any) -> None:
    engine = ReferenceEngine.from_args(["--num-blocks", "256", "--max-model-len", "512"])
    await process.worker(engine)
    stop = StopConditions(max_tokens=400, ignore_eos=True)
    reply = await process.open(kit.request("long", PROMPT, stop=stop))
    reply.call.cancel()
    await asyncio.wait_for(reply.done.wait(), 30)
    assert reply.finish is FinishReason.CANCELLED
    await asyncio.wait_for(engine.drain(), 30)
    assert engine.load().active_requests == 0


async def test_embeddings_come_through(process: Any, kit: Any) -> None:
    await process.worker(ReferenceEngine.from_args(["--num-blocks", "256", "--max-model-len", "512"]))
    (record,) = await process.models()
    assert ModelType.EMBEDDING in record.card.model_types
    reply = await process.open(kit.request("embed", PROMPT, modality=Modality.EMBEDDING))
    await asyncio.wait_for(reply.done.wait(), 30)
    assert reply.error is None
    (chunk,) = reply.chunks
    assert (chunk.finish_reason, chunk.parts[0].shape) == (FinishReason.STOP, (128,))
    assert chunk.usage.prompt_tokens == len(PROMPT)


async def test_ranks_have_caches_and_events_of_their_own(process: Any, kit: Any) -> None:
    small = ["--num-blocks", "256", "--max-model-len", "512", "--data-parallel-size", "2"]
    worker = await process.worker(ReferenceEngine.from_args(small))
    (record,) = await process.models()
    assert record.card.runtime_config.data_parallel_size == 2
    stop = StopConditions(max_tokens=1, ignore_eos=True)
    for name, rank, cached in (("a", 0, 0), ("b", 1, 0), ("c", 1, 32)):
        reply = await process.open(kit.request(name, PROMPT, stop=stop, routing=RoutingHints(dp_rank=rank)))
        await asyncio.wait_for(reply.done.wait(), 30)
        assert (reply.error, reply.chunks[-1].usage.cached_tokens) == (None, cached)
    for rank in (0, 1):
        batch = await process.query(WorkerId(worker.instance_id, rank))
        assert batch.worker == WorkerId(worker.instance_id, rank)
        assert sum(len(event) for event in batch.events if isinstance(event, BlockStored)) == 2


@pytest.mark.parametrize("level", [1, 2])
async def test_a_real_engine_sleeps_and_answers_alike_when_it_wakes(process: Any, kit: Any, level: int) -> None:
    await process.worker(ReferenceEngine.from_args(["--num-blocks", "256", "--max-model-len", "512"]))
    stop, routes = StopConditions(max_tokens=8, ignore_eos=True), process.context.admin_routes
    replies: list[Any] = []
    for name in ("before", "after"):
        reply = await process.open(kit.request(name, PROMPT, stop=stop, sampling=SamplingOptions(seed=4)))
        await asyncio.wait_for(reply.done.wait(), 30)
        replies.append(reply)
        if name == "before":
            assert (await asyncio.wait_for(routes["sleep"]({"level": level}), 30))["sleep_level"] == level
            assert await process.models() == []
            refused = await process.open(kit.request("asleep", PROMPT, stop=stop))
            await asyncio.wait_for(refused.done.wait(), 30)
            assert refused.error.reason == "backend.draining"
            await asyncio.wait_for(routes["wake"]({}), 30)
            assert len(await process.models()) == 1
    assert replies[0].tokens == replies[1].tokens
    assert replies[1].chunks[-1].usage.cached_tokens == 0, "its cache was given back"
