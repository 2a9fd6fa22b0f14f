"""The SGLang adapter against a stand-in for its public API."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import fake_sglang
import pytest

from dynamo_core.clock import SystemClock
from dynamo_core.engine import Engine, EngineContext
from dynamo_core.enums import FinishReason
from dynamo_core.errors import ConfigurationError, InvalidRequestError, UnavailableError
from dynamo_core.ids import InstanceId
from dynamo_core.noop import LocalRequestContext
from dynamo_core.requests import (
    GenerateChunk,
    GenerateRequest,
    GuidedDecoding,
    OutputOptions,
    RoutingHints,
    SamplingOptions,
    StopConditions,
    TopLogprob,
)
from dynamo_core.telemetry import Metrics
from dynamo_core.testing import EngineConformance
from dynamo_core.tokens import pack_tokens
from dynamo_worker._sglang._translation import ChoiceReader, sampling_params
from dynamo_worker._sglang.engine import SglangEngine


class TestSglangContract(EngineConformance):
    factory = SglangEngine
    incremental = False

    @pytest.fixture(autouse=True)
    def _fake(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_sglang.install(monkeypatch)
        monkeypatch.setattr(fake_sglang.Engine, "incremental", self.incremental)

    def make_engine(self) -> Engine:
        return SglangEngine.from_args(["--model", "org/fake"])


class TestIncrementalStreaming(TestSglangContract):
    incremental = True


@pytest.fixture
async def start(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    fake_sglang.install(monkeypatch)
    engines: list[SglangEngine] = []

    async def begin(*flags: str) -> tuple[SglangEngine, Any, Any]:
        engine = SglangEngine.from_args(["--model", "org/fake", *flags])
        engines.append(engine)
        config = await engine.start(EngineContext(InstanceId(7), SystemClock(), Metrics()))
        return engine, fake_sglang.Engine.made[-1], config

    yield begin
    for engine in engines:
        await engine.cleanup()


def request(**fields: Any) -> GenerateRequest:
    base: dict[str, Any] = {"token_ids": pack_tokens([5, 6, 7]), "stop": StopConditions(max_tokens=4, ignore_eos=True)}
    return GenerateRequest("r1", "fake", **{**base, **fields})


async def ask(engine: SglangEngine, item: GenerateRequest) -> list[GenerateChunk]:
    return [chunk async for chunk in engine.generate(item, LocalRequestContext(item.request_id))]


async def test_the_card_and_the_events(start: Any) -> None:
    engine, library, config = await start("--sglang-args", '{"mem_fraction_static": 0.5}')
    assert (config.model, config.context_length, config.kv_block_size) == ("fake", 600, 16)
    assert config.runtime_config.total_kv_blocks == 100
    assert library.arguments["mem_fraction_static"] == 0.5
    events = json.loads(library.arguments["kv_events_config"])
    assert (events["publisher"], events["topic"]) == ("zmq", "kv-events")
    assert await engine.clear_kv_blocks() == 100
    await engine.cleanup()
    assert library.is_shut_down


async def test_options_reach_sglang(start: Any) -> None:
    engine, library, _ = await start()
    sampling = SamplingOptions(temperature=0.5, top_k=3, seed=3, n=2, logit_bias={7: 1.0})
    stop = StopConditions(max_tokens=6, min_tokens=2, stop_token_ids=(9,))
    routing = RoutingHints(lora="a", cache_salt="s", dp_rank=0)
    await ask(engine, request(sampling=sampling, stop=stop, eos_token_ids=(2,), routing=routing))
    first, second = library.calls
    params = first["sampling_params"]
    assert (params["top_k"], params["max_new_tokens"], params["min_new_tokens"]) == (3, 6, 2)
    assert (params["stop_token_ids"], params["logit_bias"]) == ([2, 9], {"7": 1.0})
    assert [call["sampling_params"]["sampling_seed"] for call in (first, second)] == [3, 4]
    assert (first["lora_path"], first["cache_salt"], first["routed_dp_rank"]) == ("a", "s", 0)


async def test_equal_choices_are_computed_once(start: Any) -> None:
    engine, library, _ = await start()
    chunks = await ask(engine, request(sampling=SamplingOptions(temperature=0.0, n=3)))
    assert len(library.calls) == 1
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12


@pytest.mark.parametrize("incremental", [False, True])
async def test_logprobs(start: Any, monkeypatch: pytest.MonkeyPatch, incremental: bool) -> None:
    monkeypatch.setattr(fake_sglang.Engine, "incremental", incremental)
    engine, _, _ = await start()
    chunks = await ask(engine, request(output=OutputOptions(logprobs=1)))
    entries = [entry for chunk in chunks for entry in chunk.logprobs]
    assert len(entries) == 4
    assert all(entry.top == (TopLogprob(7, -0.5),) and entry.logprob == -1.0 for entry in entries)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.cached_tokens == 1


async def test_an_abort_reaches_sglang(start: Any) -> None:
    engine, library, _ = await start()
    running = asyncio.ensure_future(ask(engine, request(stop=StopConditions(max_tokens=500, ignore_eos=True))))
    async with asyncio.timeout(10):
        while not library.calls:
            await asyncio.sleep(0)
    await engine.abort("r1")
    assert (await running)[-1].finish_reason is FinishReason.CANCELLED
    assert library.aborted == ["r1-0-0"]


@pytest.mark.parametrize(
    ("guided", "expected"),
    [
        (GuidedDecoding(json={"type": "object"}), {"json_schema": '{"type": "object"}'}),
        (GuidedDecoding(regex="a+"), {"regex": "a+"}),
        (GuidedDecoding(choice=("a.b", "c")), {"regex": r"(a\.b|c)"}),
        (GuidedDecoding(grammar="root ::= x"), {"ebnf": "root ::= x"}),
        (GuidedDecoding(structural_tag={"a": 1}), {"structural_tag": '{"a": 1}'}),
    ],
)
def test_constraints(guided: GuidedDecoding, expected: dict[str, str]) -> None:
    params = sampling_params(request(sampling=SamplingOptions(guided=guided)), [], choice=0, max_tokens=3)
    assert {name: params[name] for name in expected} == expected


async def test_refusals(start: Any) -> None:
    engine, _, _ = await start()
    with pytest.raises(InvalidRequestError, match="temperature"):
        await ask(engine, request(sampling=SamplingOptions(temperature=-1.0)))
    with pytest.raises(InvalidRequestError, match="allowed_token_ids"):
        await ask(engine, request(sampling=SamplingOptions(allowed_token_ids=(1,))))
    meta = {"completion_tokens": 0, "finish_reason": {"type": "abort", "message": "too long", "status_code": 400}}
    with pytest.raises(InvalidRequestError, match="too long"):
        ChoiceReader(request(), 0).read({"output_ids": [], "meta_info": meta})
    meta["finish_reason"] = {"type": "abort", "message": "lost", "status_code": 503}
    with pytest.raises(UnavailableError):
        ChoiceReader(request(), 0).read({"output_ids": [], "meta_info": meta})


async def test_wrong_arguments_and_a_missing_library_are_named(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="no_such_argument"):
        await start("--sglang-args", '{"no_such_argument": 1}')
    monkeypatch.setitem(sys.modules, "sglang", None)
    with pytest.raises(ConfigurationError, match="pip install sglang"):
        await start()
