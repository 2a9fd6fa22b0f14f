"""The OpenAI-HTTP engine in front of a real llama-server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import xllamacpp

from dynamo_core.clock import SystemClock
from dynamo_core.content import text_part
from dynamo_core.engine import EngineConfig, EngineContext
from dynamo_core.enums import FinishReason, ModelInput
from dynamo_core.errors import InvalidRequestError
from dynamo_core.ids import InstanceId
from dynamo_core.noop import LocalRequestContext
from dynamo_core.requests import GenerateChunk, GenerateRequest, SamplingOptions, StopConditions
from dynamo_core.telemetry import Metrics
from dynamo_worker._openai_http.engine import OpenAIHttpEngine

QUESTION = "<|im_start|>user\nWhat is the capital of Japan?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def url(gguf_file: Path) -> Iterator[str]:
    params = xllamacpp.CommonParams()
    params.model.path = str(gguf_file)
    params.n_ctx = 2048
    params.n_parallel = 2
    params.kv_unified = True
    params.endpoint_metrics = True
    params.warmup = False
    params.verbosity = -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    server.handle_completions({"prompt": [0], "max_tokens": 1})
    yield server.listening_address


@pytest.fixture
async def sidecar(url: str) -> AsyncIterator[tuple[OpenAIHttpEngine, EngineConfig]]:
    engine = OpenAIHttpEngine.from_args(["--url", url, "--load-interval-s", "0.05"])
    config = await engine.start(EngineContext(InstanceId(7), SystemClock(), Metrics()))
    yield engine, config
    await engine.cleanup()


def request(name: str, text: str = QUESTION, **fields: Any) -> GenerateRequest:
    base: dict[str, Any] = {"sampling": SamplingOptions(temperature=0.0), "stop": StopConditions(max_tokens=40)}
    return GenerateRequest(name, "tinylm", parts=(text_part(text),), **{**base, **fields})


async def ask(engine: OpenAIHttpEngine, item: GenerateRequest) -> list[GenerateChunk]:
    async with asyncio.timeout(30):
        return [chunk async for chunk in engine.generate(item, LocalRequestContext(item.request_id))]


async def test_it_serves_what_llama_server_says(sidecar: tuple[OpenAIHttpEngine, EngineConfig]) -> None:
    engine, config = sidecar
    assert config.model_input is ModelInput.TEXT
    chunks = await ask(engine, request("one"))
    assert "Tokyo" in "".join(chunk.text or "" for chunk in chunks)
    assert chunks[-1].finish_reason is FinishReason.STOP
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 1
    again = await ask(engine, request("two"))
    assert again[-1].usage is not None
    assert again[-1].usage.cached_tokens > 0


async def test_leaving_frees_the_slot(sidecar: tuple[OpenAIHttpEngine, EngineConfig]) -> None:
    engine, _ = sidecar
    stop = StopConditions(max_tokens=1900, ignore_eos=True)
    running = asyncio.ensure_future(ask(engine, request("long", stop=stop)))
    async with asyncio.timeout(20):
        while not engine.load().active_requests:
            await asyncio.sleep(0.01)
    await engine.abort("long")
    assert (await running)[-1].finish_reason is FinishReason.CANCELLED
    async with asyncio.timeout(20):
        while engine.load().active_requests:
            await asyncio.sleep(0.01)


async def test_what_the_server_refuses_is_the_callers_fault(sidecar: tuple[OpenAIHttpEngine, EngineConfig]) -> None:
    with pytest.raises(InvalidRequestError):
        await ask(sidecar[0], request("long", "word " * 4000))
