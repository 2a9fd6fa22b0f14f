"""The llama.cpp engine on a model that converses: ``dyn slow llamacpp`` fetches it and runs this file."""

from __future__ import annotations

import asyncio
import json
import os
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import xllamacpp
from tokenizers import Tokenizer

from dynamo_core.clock import SystemClock
from dynamo_core.engine import Engine, EngineConfig, EngineContext
from dynamo_core.enums import FinishReason
from dynamo_core.ids import InstanceId
from dynamo_core.noop import LocalRequestContext
from dynamo_core.requests import GenerateChunk, GenerateRequest, SamplingOptions, StopConditions
from dynamo_core.telemetry import Metrics
from dynamo_core.testing import EngineConformance
from dynamo_core.tokens import pack_tokens, unpack_tokens
from dynamo_worker._llamacpp.engine import LlamaCppEngine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MODEL = Path(os.environ["DYNAMO_SLOW_GGUF"])
FLAGS = ["--model", str(MODEL), "--max-model-len", "512", "--max-num-seqs", "4"]
SAMPLES = [
    "Hello, world!",
    "In 1984 it cost $12.50.",
    "Grüße aus 東京 \N{GRINNING FACE}\n\n\tx  y",
    "def f(a):\n    return a_b",
]
Started = tuple[LlamaCppEngine, EngineConfig]


class TestRealModel(EngineConformance):
    factory = LlamaCppEngine
    patience_s = 120.0

    def make_engine(self) -> Engine:
        return LlamaCppEngine.from_args(FLAGS)

    # Greedy continuations pass; a sampled one draws anew.
    @pytest.mark.xfail(reason="llama.cpp's seeded generator counts draws, not positions", strict=False)
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize("accepted", [1, 3, 7])
    async def test_continuation_gives_the_rest(self, accepted: int, temperature: float) -> None:
        await super().test_continuation_gives_the_rest(accepted, temperature)


@pytest.fixture
async def started() -> AsyncIterator[Started]:
    engine = LlamaCppEngine.from_args(FLAGS)
    config = await engine.start(EngineContext(InstanceId(7), SystemClock(), Metrics()))
    yield engine, config
    await engine.cleanup()


async def ask(engine: LlamaCppEngine, prompt: list[int]) -> list[GenerateChunk]:
    stop = StopConditions(max_tokens=40)
    item = GenerateRequest("r", "m", pack_tokens(prompt), sampling=SamplingOptions(temperature=0.0), stop=stop)
    async with asyncio.timeout(120):
        return [chunk async for chunk in engine.generate(item, LocalRequestContext("r"))]


async def test_it_answers_a_question(started: Started) -> None:
    engine, config = started
    tokenizer = Tokenizer.from_file(str(Path(config.model_path) / "tokenizer.json"))
    assert "messages" in json.loads((Path(config.model_path) / "tokenizer_config.json").read_text())["chat_template"]
    question = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    chunks = await ask(engine, tokenizer.encode(question, add_special_tokens=False).ids)
    text = tokenizer.decode([token for chunk in chunks for token in unpack_tokens(chunk.token_ids)])
    print(text)
    assert "Paris" in text
    assert chunks[-1].finish_reason in (FinishReason.EOS, FinishReason.LENGTH)


async def test_the_tokenizer_is_llama_cpps(started: Started) -> None:
    tokenizer = Tokenizer.from_file(str(Path(started[1].model_path) / "tokenizer.json"))
    params = xllamacpp.CommonParams()
    params.model.path = str(MODEL)
    params.n_ctx = 256
    params.warmup = False
    server = xllamacpp.Server(params)
    server.handle_completions({"prompt": [0], "max_tokens": 1})
    for sample in SAMPLES:
        found = _post(f"{server.listening_address}/tokenize", {"content": sample, "add_special": False})
        assert tokenizer.encode(sample, add_special_tokens=False).ids == found["tokens"]


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    sent = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(sent, timeout=30) as answer:
        return json.load(answer)
