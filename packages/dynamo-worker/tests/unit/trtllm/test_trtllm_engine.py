"""The TensorRT-LLM adapter against a stand-in for its LLM API."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import fake_trtllm
import pytest

from dynamo_core.clock import SystemClock
from dynamo_core.engine import Engine, EngineContext
from dynamo_core.enums import FinishReason, Tier
from dynamo_core.errors import ConfigurationError, InvalidRequestError
from dynamo_core.ids import InstanceId, WorkerId
from dynamo_core.kv import BlockDescriptor
from dynamo_core.load import ForwardPassMetrics
from dynamo_core.noop import LocalRequestContext
from dynamo_core.requests import (
    GenerateChunk,
    GenerateRequest,
    GuidedDecoding,
    OutputOptions,
    PrefillResult,
    RoutingHints,
    SamplingOptions,
    StopConditions,
    TopLogprob,
)
from dynamo_core.telemetry import Metrics
from dynamo_core.testing import EngineConformance
from dynamo_core.tokens import BlockHasher, pack_tokens, unpack_hashes, unpack_tokens
from dynamo_worker._trtllm._translation import constraint
from dynamo_worker._trtllm.engine import TrtllmEngine

FLAGS = ["--model", "org/fake", "--poll-timeout-s", "0.05"]
LENGTH = ["--trtllm-args", '{"max_seq_len": 600, "kv_cache_config": {"tokens_per_block": 4}}']


class TestTrtllmContract(EngineConformance):
    factory = TrtllmEngine

    @pytest.fixture(autouse=True)
    def _fake(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_trtllm.install(monkeypatch)

    def make_engine(self) -> Engine:
        return TrtllmEngine.from_args([*FLAGS, *LENGTH])


@pytest.fixture
async def start(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    fake_trtllm.install(monkeypatch)
    engines: list[TrtllmEngine] = []

    async def begin(*flags: str) -> tuple[TrtllmEngine, Any, Any]:
        engine = TrtllmEngine.from_args([*FLAGS, *(flags or LENGTH)])
        engines.append(engine)
        config = await engine.start(EngineContext(InstanceId(7), SystemClock(), Metrics()))
        return engine, fake_trtllm.LLM.made[-1], config

    yield begin
    for engine in engines:
        await engine.cleanup()


def request(**fields: Any) -> GenerateRequest:
    base: dict[str, Any] = {"token_ids": pack_tokens([5, 6, 7]), "stop": StopConditions(max_tokens=4, ignore_eos=True)}
    return GenerateRequest("r1", "fake", **{**base, **fields})


async def ask(engine: TrtllmEngine, item: GenerateRequest) -> list[GenerateChunk]:
    return [chunk async for chunk in engine.generate(item, LocalRequestContext(item.request_id))]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_the_card_and_the_arguments(start: Any) -> None:
    engine, llm, config = await start()
    assert (config.model, config.context_length, config.kv_block_size) == ("fake", 600, 4)
    assert (config.runtime_config.max_num_seqs, config.runtime_config.max_num_batched_tokens) == (8, 8192)
    cache = llm.arguments["kv_cache_config"]
    assert (cache.enable_block_reuse, cache.event_buffer_max_size) == (True, 16_384)
    assert llm.arguments["enable_iter_perf_stats"]
    await engine.cleanup()
    assert llm.is_shut_down


async def test_the_context_length_is_the_models(start: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 77}))
    _, _, config = await start("--model", str(tmp_path))
    assert (config.context_length, config.model_path, config.kv_block_size) == (77, str(tmp_path), 32)
    with pytest.raises(ConfigurationError, match="max_seq_len"):
        await start("--model", "org/unknown")


async def test_options_reach_the_library(start: Any) -> None:
    engine, llm, _ = await start()
    sampling = SamplingOptions(temperature=0.5, top_k=3, seed=3, n=2, min_p=0.1, presence_penalty=0.25)
    stop = StopConditions(max_tokens=6, min_tokens=2, stop_token_ids=(9,))
    await ask(engine, request(sampling=sampling, stop=stop, eos_token_ids=(2,), routing=RoutingHints(cache_salt="s")))
    (prompt, first, options), (_, second, _), *later = llm.calls
    assert (prompt, options) == ([5, 6, 7], {"cache_salt": "s"})
    assert (first.temperature, first.top_k, first.top_p, first.min_p, first.presence_penalty) == (
        0.5,
        3,
        1.0,
        0.1,
        0.25,
    )
    assert (first.repetition_penalty, first.frequency_penalty, first.logprobs) == (None, None, None)
    assert (first.end_id, first.bad_token_ids, first.min_tokens, first.max_tokens) == (-1, [2, 9], None, 2)
    assert [len(tokens) for tokens, _, _ in later] == [5, 5], "each goes on from what it has"
    assert {(params.end_id, *params.stop_token_ids, params.max_tokens) for _, params, _ in later} == {(2, 9, 4)}
    assert later[0][1].seed not in (3, 4)
    assert [first.seed, second.seed] == [3, 4]


async def test_one_end_token_is_held_back_by_the_library(start: Any) -> None:
    engine, llm, _ = await start()
    await ask(engine, request(stop=StopConditions(max_tokens=6, min_tokens=2), eos_token_ids=(2,)))
    ((_, params, _),) = llm.calls
    assert (params.end_id, params.min_tokens, params.stop_token_ids, params.bad_token_ids) == (2, 2, None, None)


async def test_greedy_is_what_the_library_takes_for_it(start: Any) -> None:
    engine, llm, _ = await start()
    chunks = await ask(engine, request(sampling=SamplingOptions(temperature=0.0, n=3)))
    ((_, params, _),) = llm.calls
    assert params.is_greedy
    assert (params.end_id, params.ignore_eos, params.pad_id) == (-1, True, 0)
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.completion_tokens, chunks[-1].usage.cached_tokens) == (12, 1)


async def test_the_token_that_ends_the_output_is_no_part_of_it(start: Any) -> None:
    engine, _, _ = await start()
    free = await ask(engine, request())
    tokens = [token for chunk in free for token in unpack_tokens(chunk.token_ids)]
    for ends, reason in (({"eos_token_ids": (tokens[2],)}, FinishReason.EOS), ({}, FinishReason.STOP)):
        stop = StopConditions(max_tokens=4, stop_token_ids=() if ends else (1, tokens[2]))
        chunks = await ask(engine, request(stop=stop, **ends))
        assert [token for chunk in chunks for token in unpack_tokens(chunk.token_ids)] == tokens[:2]
        assert (chunks[-1].finish_reason, chunks[-1].stop_token_id) == (reason, tokens[2])


@pytest.mark.parametrize(("wanted", "top"), [(0, ()), (1, (TopLogprob(7, -0.5),))])
async def test_logprobs(start: Any, wanted: int, top: tuple[TopLogprob, ...]) -> None:
    engine, llm, _ = await start()
    chunks = await ask(engine, request(output=OutputOptions(logprobs=wanted)))
    entries = [entry for chunk in chunks for entry in chunk.logprobs]
    assert [(entry.logprob, entry.top) for entry in entries] == [(-1.0, top)] * 4
    assert llm.calls[0][1].logprobs == 1


async def test_an_abort_reaches_the_library(start: Any) -> None:
    engine, llm, _ = await start()
    running = asyncio.ensure_future(ask(engine, request(stop=StopConditions(max_tokens=500, ignore_eos=True))))
    await until(lambda: bool(llm.calls))
    await engine.abort("r1")
    assert (await running)[-1].finish_reason is FinishReason.CANCELLED
    assert llm.aborted == 1


@pytest.mark.parametrize(
    ("guided", "expected"),
    [
        (GuidedDecoding(json={"type": "object"}), {"json": {"type": "object"}}),
        (GuidedDecoding(regex="a+"), {"regex": "a+"}),
        (GuidedDecoding(choice=("a.b", "c")), {"regex": r"(a\.b|c)"}),
        (GuidedDecoding(grammar="root ::= x"), {"grammar": "root ::= x"}),
        (GuidedDecoding(structural_tag={"a": 1}), {"structural_tag": '{"a": 1}'}),
    ],
)
async def test_constraints(start: Any, guided: GuidedDecoding, expected: dict[str, Any]) -> None:
    assert constraint(guided) == expected
    engine, llm, _ = await start()
    await ask(engine, request(sampling=SamplingOptions(temperature=0.0, guided=guided)))
    assert llm.calls[0][1].guided_decoding == fake_trtllm.GuidedDecodingParams(**expected)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"sampling": SamplingOptions(allowed_token_ids=(1,))}, "allowed_token_ids"),
        ({"sampling": SamplingOptions(logit_bias={1: 2.0})}, "logit_bias"),
        ({"sampling": SamplingOptions(temperature=-1.0)}, "temperature"),
        ({"sampling": SamplingOptions(guided=GuidedDecoding(whitespace_pattern=" "))}, "whitespace_pattern"),
        ({"handoff": PrefillResult({})}, "hand-off"),
        ({"routing": RoutingHints(lora="a")}, "lora"),
    ],
)
async def test_what_it_cannot_do_is_refused_by_name(start: Any, fields: dict[str, Any], match: str) -> None:
    engine, _, _ = await start()
    with pytest.raises(InvalidRequestError, match=match):
        await ask(engine, request(**fields))


async def test_iterations_are_load_and_forward_passes(start: Any) -> None:
    engine, _, _ = await start()
    passes: list[ForwardPassMetrics] = []
    engine.set_forward_pass_listener(passes.append)
    running = asyncio.ensure_future(ask(engine, request(stop=StopConditions(max_tokens=500, ignore_eos=True))))
    await until(lambda: engine.load().active_requests > 0)
    load = engine.load()
    await engine.abort("r1")
    await running
    assert (load.active_requests, load.waiting_requests, load.cache_hit_rate) == (1, 2, 0.25)
    assert (load.kv_used_blocks, load.kv_total_blocks, engine.load().active_requests) == (4, 96, 0)
    first, second, *_ = passes
    assert (first.worker, first.wall_time_s, first.queued.num_prefill_requests) == (
        WorkerId(InstanceId(7), 0),
        0.004,
        2,
    )
    assert (first.scheduled.num_prefill_requests, first.scheduled.sum_prefill_tokens) == (1, 3)
    assert (second.scheduled.num_decode_requests, second.scheduled.sum_decode_kv_tokens) == (1, 128)


class Reports:
    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def stored(self, blocks: Sequence[BlockDescriptor], *, tier: Tier = Tier.DEVICE, lora: str = "") -> None:
        self.heard += [("stored", block.sequence_hash, block.position, block.local_hash, tier) for block in blocks]

    def removed(self, sequence_hashes: Sequence[int], *, tier: Tier = Tier.DEVICE) -> None:
        self.heard.append(("removed", *sequence_hashes, tier))

    def cleared(self) -> None:
        self.heard.append(("cleared",))


def stored(parent: int | None, *blocks: tuple[int, Sequence[int]], level: int = 0) -> dict[str, Any]:
    made = [
        {
            "type": "stored_block",
            "block_hash": name,
            "tokens": [{"type": "unique_token", "token_id": token, "token_extra_id": 0} for token in tokens],
            "cache_level": level,
            "priority": 35,
        }
        for name, tokens in blocks
    ]
    return {"type": "stored", "parent_hash": parent, "blocks": made}


async def test_events(start: Any) -> None:
    engine, llm, _ = await start()
    reports = Reports()
    engine.set_kv_event_sink(reports)
    tokens = list(range(100, 110))
    level = {"type": "event_diff", "new_value": 1, "old_value": 0}
    for number, data in enumerate(
        [
            {"type": "created", "num_blocks_per_cache_level": [96, 0]},
            stored(None, (-1, tokens[:4]), (12, tokens[4:8]), (13, tokens[8:])),
            {"type": "updated", "block_hash": 12, "cache_level": level, "priority": None},
            {"type": "removed", "block_hashes": [12, 99]},
            stored(55, (56, tokens[:4])),
        ]
    ):
        llm.events.put_nowait({"event_id": number, "data": data, "window_size": 600})
    llm.events.put_nowait({"event_id": 5, "data": {"type": "removed", "block_hashes": [-1]}, "window_size": 128})
    llm.events.put_nowait({"event_id": 7, "data": stored(None, (8, tokens[:4])), "window_size": 600})
    await until(lambda: len(reports.heard) == 7)
    first, second = unpack_hashes(BlockHasher(4).hash_tokens(pack_tokens(tokens[:8])).local)
    name = (1 << 64) - 1
    assert reports.heard == [
        ("stored", name, 0, first, Tier.DEVICE),
        ("stored", 12, 1, second, Tier.DEVICE),
        ("stored", 12, 1, second, Tier.HOST),
        ("removed", 12, Tier.DEVICE),
        ("removed", 12, Tier.HOST),
        ("cleared",),
        ("stored", 8, 0, first, Tier.DEVICE),
    ]


async def test_an_event_of_another_form_is_left_out(start: Any) -> None:
    engine, llm, _ = await start()
    reports = Reports()
    engine.set_kv_event_sink(reports)
    llm.events.put_nowait({"event_id": 0, "data": {"type": "stored"}})
    llm.events.put_nowait({"event_id": 1, "data": stored(None, (8, [1, 2, 3, 4]))})
    await until(lambda: len(reports.heard) == 1)


async def test_wrong_arguments_and_a_missing_library_are_named(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="no_such_argument"):
        await start("--trtllm-args", '{"no_such_argument": 1}')
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    with pytest.raises(ConfigurationError, match="pip install tensorrt-llm"):
        await start()
