"""Data-parallel ranks: one set of weights, KV and queues apart."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from parts import CallContext, RecordingSink, collect, engine_context, generate_request

from dynamo_core.errors import ConfigurationError, ConflictError, InvalidRequestError
from dynamo_core.load import ForwardPassMetrics
from dynamo_core.requests import RoutingHints, SamplingOptions
from dynamo_worker._reference._metrics import KV_BLOCKS
from dynamo_worker._reference.engine import ReferenceEngine

PROMPT = list(range(3, 53))


@pytest.fixture
async def engine() -> AsyncIterator[ReferenceEngine]:
    engine = ReferenceEngine.from_args(["--data-parallel-size", "3"])
    config = await engine.start(engine_context())
    assert config.runtime_config.data_parallel_size == 3
    yield engine
    await engine.cleanup()


def on_rank(rank: int | None, request_id: str = "r", **fields: Any) -> Any:
    return generate_request(PROMPT, request_id=request_id, routing=RoutingHints(dp_rank=rank), **fields)


async def test_each_rank_has_its_own_cache_events_and_load(engine: ReferenceEngine) -> None:
    sinks = [RecordingSink() for _ in range(3)]
    for rank, sink in enumerate(sinks):
        engine.set_kv_event_sink(sink, dp_rank=rank)
    passes: list[ForwardPassMetrics] = []
    engine.set_forward_pass_listener(passes.append)
    first = await collect(engine, on_rank(1))
    again = await collect(engine, on_rank(1))
    other = await collect(engine, on_rank(2))
    assert first.tokens == again.tokens == other.tokens
    assert [answer.usage.cached_tokens for answer in (first, again, other) if answer.usage] == [0, 48, 0]
    assert [bool(sink.events) for sink in sinks] == [False, True, True]
    assert {item.worker.dp_rank for item in passes} == {1, 2}
    assert [engine.load(dp_rank=rank).cache_hit_rate is None for rank in range(3)] == [True, False, False]


async def test_requests_without_a_rank_are_spread(engine: ReferenceEngine) -> None:
    passes: list[ForwardPassMetrics] = []
    engine.set_forward_pass_listener(passes.append)
    await asyncio.gather(*(collect(engine, on_rank(None, f"r{number}")) for number in range(6)))
    assert {item.worker.dp_rank for item in passes} == {0, 1, 2}


async def test_a_rank_that_is_not_there_is_refused(engine: ReferenceEngine) -> None:
    with pytest.raises(InvalidRequestError, match=r"dp_rank 3 is not one of 0\.\.2"):
        await collect(engine, on_rank(3))


async def test_draws_without_a_seed_differ_between_ranks(engine: ReferenceEngine) -> None:
    hot = SamplingOptions(temperature=2.0)
    found = [(await collect(engine, on_rank(rank, sampling=hot, max_tokens=16))).tokens[0] for rank in range(3)]
    assert len({tuple(tokens) for tokens in found}) == 3


async def test_abort_drain_clear_sleep_and_wake_reach_all_ranks(engine: ReferenceEngine) -> None:
    streams = [engine.generate(on_rank(rank, "same", max_tokens=2000), CallContext("same")) for rank in range(3)]
    for stream in streams:
        await anext(stream)
    with pytest.raises(ConflictError, match="3 requests run"):
        await engine.sleep(2)
    await engine.abort("same")
    for stream in streams:
        assert [chunk.finish_reason async for chunk in stream][-1].value == "cancelled"
    for rank in range(3):
        await collect(engine, on_rank(rank))
    assert await engine.clear_kv_blocks() >= 9
    await engine.sleep(2)
    await engine.wake()
    expected = (await collect(engine, on_rank(0))).tokens
    assert [(await collect(engine, on_rank(rank))).tokens for rank in (1, 2)] == [expected] * 2
    await engine.drain()


async def test_blocks_are_counted_over_all_ranks() -> None:
    context = engine_context()
    engine = ReferenceEngine.from_args(["--data-parallel-size", "2"])
    await engine.start(context)
    try:
        for rank in (1, 0):
            await collect(engine, on_rank(rank))
        cached = context.metrics.registry.get_sample_value(KV_BLOCKS, {"state": "cached"})
    finally:
        await engine.cleanup()
    assert cached == 2 * (len(PROMPT) // 16)


async def test_a_block_manager_serves_one_rank() -> None:
    engine = ReferenceEngine.from_args(["--data-parallel-size", "2"])
    with pytest.raises(ConfigurationError, match="--kv-connector"):
        await engine.start(engine_context(kv_connector=object()))
    await engine.cleanup()
