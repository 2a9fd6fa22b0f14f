"""The engine contract: life cycle, streaming, abort, drain, events, load, block access."""

import asyncio
from typing import Any

import pytest
from dense_oracle import DenseModel
from host_tier import HostTier
from parts import CallContext, RecordingSink, build_core, collect, engine_context, generate_request

from dynamo_core.enums import FinishReason
from dynamo_core.errors import (
    CapacityExhaustedError,
    DynamoError,
    InvalidRequestError,
    UnavailableError,
)
from dynamo_core.load import ForwardPassMetrics
from dynamo_core.requests import GenerateChunk, SamplingOptions
from dynamo_core.tokens import BlockHasher, pack_tokens, unpack_hashes, unpack_tokens
from dynamo_worker._reference.engine import ReferenceEngine

PROMPT = list(range(40, 90))
HASHES = list(unpack_hashes(BlockHasher(16).hash_tokens(pack_tokens(PROMPT)).sequence))


class Started:
    """``async with`` an engine."""

    def __init__(self, *args: str, **context: Any) -> None:
        self.engine = ReferenceEngine.from_args(args)
        self.context = engine_context(**context)

    async def __aenter__(self) -> ReferenceEngine:
        self.config = await self.engine.start(self.context)
        return self.engine

    async def __aexit__(self, *_: object) -> None:
        await self.engine.cleanup()


class ListSink:
    def __init__(self) -> None:
        self.chunks: list[GenerateChunk] = []
        self.error: DynamoError | None = None
        self.ended = asyncio.Event()

    def push(self, chunk: GenerateChunk) -> None:
        self.chunks.append(chunk)
        if chunk.usage is not None:
            self.ended.set()

    def fail(self, error: DynamoError) -> None:
        self.error = error
        self.ended.set()


async def idle(engine: ReferenceEngine) -> None:
    async with asyncio.timeout(10):
        while engine.load().kv_used_blocks or engine.load().active_requests or engine.load().waiting_requests:
            await asyncio.sleep(0)


async def test_start_describes_the_model() -> None:
    started = Started("--served-model-name", "m", "--block-size", "32", "--num-blocks", "200")
    async with started:
        config = started.config
    assert (config.model, config.context_length, config.kv_block_size) == ("m", 4096, 32)
    assert config.eos_token_ids == (2, 0)
    assert config.runtime_config.total_kv_blocks == 200
    assert "logprobs" in config.capabilities


async def test_concurrent_streams_are_each_greedy(oracle: DenseModel) -> None:
    prompts = [PROMPT[i : i + 20] for i in range(12)]
    async with Started("--max-num-seqs", "5") as engine:
        found = await asyncio.gather(*(collect(engine, generate_request(p, request_id=str(p))) for p in prompts))
    for prompt, item in zip(prompts, found, strict=True):
        oracle.assert_greedy(prompt, item.tokens[0])


async def test_submit_pushes_what_generate_yields() -> None:
    async with Started() as engine:
        sink = ListSink()
        engine.submit(generate_request(PROMPT), sink)
        await asyncio.wait_for(sink.ended.wait(), 10)
        pulled = await collect(engine, generate_request(PROMPT))
    assert [token for chunk in sink.chunks for token in unpack_tokens(chunk.token_ids)] == pulled.tokens[0]


async def test_stopping_the_context_ends_with_cancelled() -> None:
    async with Started() as engine:
        context = CallContext()
        found: list[GenerateChunk] = []
        async for chunk in engine.generate(generate_request(PROMPT, max_tokens=2000), context):
            found.append(chunk)
            if len(found) == 3:
                context.stop()
        assert found[-1].finish_reason is FinishReason.CANCELLED
        assert found[-1].usage is not None
        assert len(found) < 2000
        await idle(engine)


async def test_a_context_that_is_already_stopped_computes_nothing() -> None:
    async with Started() as engine:
        context = CallContext()
        context.stop()
        found = await collect(engine, generate_request(PROMPT), context)
        assert (found.tokens[0], found.reasons[0]) == ([], FinishReason.CANCELLED)


async def test_closing_the_iterator_frees_the_request() -> None:
    async with Started() as engine:
        stream = engine.generate(generate_request(PROMPT, max_tokens=2000), CallContext())
        await anext(stream)
        await stream.aclose()
        await idle(engine)


async def test_abort_ends_every_attempt_of_the_id() -> None:
    async with Started() as engine:
        sinks = [ListSink(), ListSink()]
        for sink in sinks:
            engine.submit(generate_request(PROMPT, max_tokens=2000, request_id="same"), sink)
        await engine.abort("unknown")
        await engine.abort("same")
        for sink in sinks:
            await asyncio.wait_for(sink.ended.wait(), 10)
            assert sink.chunks[-1].finish_reason is FinishReason.CANCELLED
        await idle(engine)


async def test_a_refused_request_reaches_no_sink() -> None:
    async with Started("--max-waiting-requests", "1", "--max-num-seqs", "1") as engine:
        sink = ListSink()
        with pytest.raises(InvalidRequestError, match="token_ids"):
            engine.submit(generate_request([5000]), sink)
        for _ in range(2):
            engine.submit(generate_request(PROMPT, max_tokens=500), ListSink())
        with pytest.raises(CapacityExhaustedError) as caught:
            engine.submit(generate_request(PROMPT), sink)
        assert caught.value.reason == "capacity.worker_overloaded"
        assert caught.value.migratable
        assert not sink.ended.is_set()


async def test_drain_finishes_what_runs_and_refuses_the_rest() -> None:
    async with Started() as engine:
        sink = ListSink()
        engine.submit(generate_request(PROMPT, max_tokens=30), sink)
        draining = asyncio.create_task(engine.drain())
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError) as caught:
            engine.submit(generate_request(PROMPT), ListSink())
        assert caught.value.reason == "backend.draining"
        await asyncio.wait_for(draining, 10)
        assert sink.chunks[-1].finish_reason is FinishReason.LENGTH


async def test_cleanup_fails_what_still_runs_and_may_come_twice() -> None:
    started = Started()
    async with started as engine:
        sink = ListSink()
        engine.submit(generate_request(PROMPT, max_tokens=3000), sink)
    await asyncio.wait_for(sink.ended.wait(), 10)
    assert sink.error is not None
    assert sink.error.reason == "backend.engine_shutdown"
    assert sink.error.migratable
    await started.engine.cleanup()
    with pytest.raises(UnavailableError):
        started.engine.submit(generate_request(PROMPT), ListSink())


async def test_cleanup_before_start_does_nothing() -> None:
    await ReferenceEngine.from_args([]).cleanup()


async def test_a_broken_step_fails_all_and_the_engine_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Started() as engine:
        assert engine._ranks is not None

        def broken() -> None:
            raise RuntimeError("scheduler bug")

        monkeypatch.setattr(engine._ranks.first.core.scheduler, "schedule", broken)
        sink = ListSink()
        engine.submit(generate_request(PROMPT), sink)
        await asyncio.wait_for(sink.ended.wait(), 10)
        assert sink.error is not None
        assert (sink.error.reason, sink.error.migratable) == ("backend.engine_shutdown", True)
        with pytest.raises(UnavailableError):
            engine.submit(generate_request(PROMPT), ListSink())


async def test_kv_events_name_the_blocks_of_the_shared_hash() -> None:
    engine = ReferenceEngine.from_args([])
    sink = RecordingSink()
    engine.set_kv_event_sink(sink)
    await engine.start(engine_context())
    try:
        await collect(engine, generate_request(PROMPT, max_tokens=2))
        assert [hashes for name, _, hashes in sink.events if name == "stored"] == [HASHES]
        assert await engine.clear_kv_blocks() == 3
        assert ("removed", sorted(HASHES)) == (sink.events[-1][0], sorted(sink.events[-1][2]))
        again = await collect(engine, generate_request(PROMPT, max_tokens=2))
        assert again.usage is not None
        assert again.usage.cached_tokens == 0
    finally:
        await engine.cleanup()


async def test_forward_passes_and_load_are_reported() -> None:
    engine = ReferenceEngine.from_args(["--max-num-batched-tokens", "16"])
    heard: list[ForwardPassMetrics] = []
    engine.set_forward_pass_listener(heard.append)
    await engine.start(engine_context())
    try:
        await collect(engine, generate_request(PROMPT, max_tokens=3))
        await idle(engine)
        load = engine.load()
    finally:
        await engine.cleanup()
    assert [item.scheduled.sum_prefill_tokens for item in heard] == [16, 16, 16, 2, 0, 0]
    assert [item.scheduled.num_decode_requests for item in heard] == [0, 0, 0, 0, 1, 1]
    assert all(item.wall_time_s > 0 and item.worker.instance_id == 7 for item in heard)
    assert (load.kv_total_blocks, load.kv_used_blocks, load.cache_hit_rate) == (1024, 0, 0.0)


async def test_blocks_move_between_engines_bit_for_bit() -> None:
    async with Started() as prefill, Started() as decode:
        first = await collect(prefill, generate_request(PROMPT))
        data = await prefill.export_blocks([*HASHES, 1])
        assert len(data) == 3
        assert {len(piece) for piece in data} == {prefill.block_access().layout.block_bytes}
        blocks = descriptors()
        assert await decode.import_blocks(blocks, data) == 3
        assert await decode.export_blocks(HASHES) == data
        second = await collect(decode, generate_request(PROMPT))
    assert second.tokens == first.tokens
    assert second.usage is not None
    assert second.usage.cached_tokens == 48


async def test_only_missing_blocks_need_to_move_and_orphans_are_not_taken() -> None:
    async with Started() as prefill, Started() as decode:
        await collect(prefill, generate_request(PROMPT))
        data = await prefill.export_blocks(HASHES)
        blocks = descriptors()
        assert await decode.import_blocks(blocks[1:], data[1:]) == 0
        assert await decode.import_blocks(blocks[:1], data[:1]) == 1
        assert await decode.import_blocks(blocks[1:], data[1:]) == 2
        assert await decode.import_blocks(blocks, data) == 3


async def test_blocks_of_another_shape_are_refused() -> None:
    async with Started() as engine:
        with pytest.raises(InvalidRequestError, match="10 bytes, a block has 32768"):
            await engine.import_blocks(descriptors()[:1], [b"0123456789"])
        assert engine.load().kv_used_blocks == 0


async def test_a_connector_is_bound_used_and_closed() -> None:
    tier = HostTier(100)
    async with Started(kv_connector=tier) as engine:
        await collect(engine, generate_request(PROMPT))
        assert set(HASHES) <= set(tier.blocks)
    assert tier.is_closed


async def test_unseeded_requests_differ_and_engines_of_one_seed_agree() -> None:
    request = generate_request(PROMPT, sampling=SamplingOptions(temperature=1.5), max_tokens=12)
    runs: list[list[list[int]]] = []
    for _ in range(2):
        async with Started("--seed", "3") as engine:
            runs.append([(await collect(engine, request)).tokens[0] for _ in range(2)])
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]


def descriptors() -> list[Any]:
    return build_core().activate(generate_request(PROMPT), 0).sequences[0].descriptors(3)
