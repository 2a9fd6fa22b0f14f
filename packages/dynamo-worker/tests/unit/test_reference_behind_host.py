"""The reference engine, which steps on a thread of its own, behind the host."""

from __future__ import annotations

import asyncio
from typing import Any

from dynamo_core.enums import FinishReason, Modality, ModelType
from dynamo_core.events import BlockStored
from dynamo_core.ids import WorkerId
from dynamo_core.noop import LocalRequestContext
from dynamo_core.requests import SamplingOptions, StopConditions
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
