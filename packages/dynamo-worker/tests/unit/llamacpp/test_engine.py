"""The llama.cpp engine on a real GGUF file: what it says, what it takes, what it refuses."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from gguf_model import MODEL
from tokenizers import Tokenizer

from dynamo_core.clock import SystemClock
from dynamo_core.engine import EngineConfig, EngineContext
from dynamo_core.enums import FinishReason
from dynamo_core.errors import CapacityExhaustedError, ConfigurationError, InvalidRequestError
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
)
from dynamo_core.telemetry import Metrics
from dynamo_core.tokens import pack_tokens, unpack_tokens
from dynamo_worker import ReferenceEngine
from dynamo_worker._llamacpp.engine import LlamaCppEngine

TOKENIZER = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
QUESTION = "<|im_start|>user\nWhat is the capital of Japan?<|im_end|>\n<|im_start|>assistant\n"
Started = tuple[LlamaCppEngine, EngineConfig]


def context() -> EngineContext:
    return EngineContext(InstanceId(7), SystemClock(), Metrics())


@pytest.fixture
async def started(gguf_file: Path) -> AsyncIterator[Started]:
    engine = LlamaCppEngine.from_args(["--model", str(gguf_file), "--max-model-len", "1024", "--num-threads", "1"])
    config = await engine.start(context())
    yield engine, config
    await engine.cleanup()


def request(name: str = "r", text: str = QUESTION, **fields: Any) -> GenerateRequest:
    base: dict[str, Any] = {
        "token_ids": pack_tokens(TOKENIZER.encode(text).ids),
        "sampling": SamplingOptions(temperature=0.0),
        "stop": StopConditions(max_tokens=40),
        "eos_token_ids": (2,),
    }
    return GenerateRequest(name, "tinylm", **{**base, **fields})


async def ask(engine: Any, item: GenerateRequest) -> list[GenerateChunk]:
    async with asyncio.timeout(30):
        return [chunk async for chunk in engine.generate(item, LocalRequestContext(item.request_id))]


def text(chunks: Sequence[GenerateChunk]) -> str:
    return TOKENIZER.decode([token for chunk in chunks for token in unpack_tokens(chunk.token_ids)])


async def test_the_card_says_what_the_file_says(started: Started) -> None:
    _, config = started
    assert (config.model, config.context_length, config.eos_token_ids) == ("tinylm", 1024, (2,))
    folder = Path(config.model_path)
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for sample in (QUESTION, "Grüße, 東京 1234!\n\n  x", "<tool_call>{}</tool_call>"):
        assert made.encode(sample).ids == TOKENIZER.encode(sample).ids
        assert made.decode(made.encode(sample).ids) == TOKENIZER.decode(TOKENIZER.encode(sample).ids)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    original = json.loads((MODEL / "tokenizer_config.json").read_text())
    assert {name: settings[name] for name in ("bos_token", "eos_token", "pad_token", "chat_template")} == {
        name: original[name] for name in ("bos_token", "eos_token", "pad_token", "chat_template")
    }


async def test_it_says_what_the_reference_engine_says(started: Started) -> None:
    reference = ReferenceEngine.from_args([])
    await reference.start(context())
    try:
        expected = await ask(reference, request())
    finally:
        await reference.cleanup()
    chunks = await ask(started[0], request())
    assert text(chunks) == text(expected)
    assert "Tokyo" in text(chunks)
    assert (chunks[-1].finish_reason, chunks[-1].stop_token_id) == (FinishReason.EOS, 2)


async def test_a_prefix_is_computed_once(started: Started) -> None:
    first = await ask(started[0], request("one"))
    second = await ask(started[0], request("two"))
    length = len(TOKENIZER.encode(QUESTION).ids)
    cached = [chunks[-1].usage.cached_tokens for chunks in (first, second) if chunks[-1].usage]
    assert cached == [0, length - 1]
    assert text(first) == text(second)


async def test_logprobs_are_the_models_own(started: Started) -> None:
    chunks = await ask(started[0], request(output=OutputOptions(logprobs=3)))
    entries = [entry for chunk in chunks for entry in chunk.logprobs]
    assert entries
    for entry in entries:
        assert len(entry.top) == 3
        assert entry.top[0].token_id == entry.token_id
        assert entry.top[0].logprob == entry.logprob <= 0
    chosen = await ask(started[0], request(output=OutputOptions(logprobs=0)))
    assert {entry.top for chunk in chosen for entry in chunk.logprobs} == {()}


@pytest.mark.parametrize(
    ("guided", "accepts"),
    [
        (GuidedDecoding(choice=("Paris", 'a "b"')), ("Paris", 'a "b"').__contains__),
        (GuidedDecoding(regex="[0-9]{3}/x"), lambda found: found[:3].isdigit() and found[3:] == "/x"),
        (GuidedDecoding(grammar='root ::= "yes" | "no"'), ("yes", "no").__contains__),
        (
            GuidedDecoding(
                json={
                    "type": "object",
                    "properties": {"n": {"enum": [1, 2]}},
                    "required": ["n"],
                    "additionalProperties": False,
                }
            ),
            lambda found: json.loads(found)["n"] in (1, 2),
        ),
    ],
)
async def test_constraints_bind(started: Started, guided: GuidedDecoding, accepts: Any) -> None:
    chunks = await ask(started[0], request(sampling=SamplingOptions(temperature=0.0, guided=guided)))
    assert accepts(text(chunks))


async def test_choices_differ(started: Started) -> None:
    sampling = SamplingOptions(temperature=1.5, seed=3, n=3)
    stop = StopConditions(max_tokens=12, ignore_eos=True)
    chunks = await ask(started[0], request(sampling=sampling, stop=stop))
    assert len({text([chunk for chunk in chunks if chunk.choice == choice]) for choice in range(3)}) == 3
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 36


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"sampling": SamplingOptions(allowed_token_ids=(5,))}, "allowed_token_ids"),
        ({"sampling": SamplingOptions(guided=GuidedDecoding(structural_tag={"a": 1}))}, "structural_tag"),
        ({"sampling": SamplingOptions(guided=GuidedDecoding(grammar="no grammar"))}, "llama.cpp refuses"),
        ({"routing": RoutingHints(lora="a")}, "lora"),
        ({"token_ids": pack_tokens([9999])}, "llama.cpp refuses"),
        ({"output": OutputOptions(logprobs=500)}, "logprobs"),
    ],
)
async def test_what_it_cannot_do_is_refused_by_name(started: Started, fields: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidRequestError, match=match):
        await ask(started[0], request(**fields))
    assert "Tokyo" in text(await ask(started[0], request("after")))


async def test_more_requests_than_slots_wait(started: Started) -> None:
    engine, _ = started
    running = [
        asyncio.ensure_future(ask(engine, request(f"r{index}", stop=StopConditions(max_tokens=300, ignore_eos=True))))
        for index in range(6)
    ]
    async with asyncio.timeout(20):
        while len(engine._tasks) < 6:
            await asyncio.sleep(0)
    load = engine.load()
    assert (load.active_requests, load.waiting_requests) == (4, 2)
    await engine.abort("r0")
    results = await asyncio.gather(*running)
    assert results[0][-1].finish_reason is FinishReason.CANCELLED
    assert [chunks[-1].finish_reason for chunks in results[1:]] == [FinishReason.LENGTH] * 5


async def test_a_full_cache_is_a_refusal(gguf_file: Path) -> None:
    flags = ["--model", str(gguf_file), "--max-model-len", "512", "--kv-cache-tokens", "512", "--num-threads", "1"]
    engine = LlamaCppEngine.from_args(flags)
    await engine.start(context())
    try:
        long = {"stop": StopConditions(max_tokens=300, ignore_eos=True)}
        asked = [ask(engine, request(f"r{index}", **long)) for index in range(4)]
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert any(isinstance(result, CapacityExhaustedError) for result in results)
        assert "Tokyo" in text(await ask(engine, request("after")))
    finally:
        await engine.cleanup()


async def test_the_tokenizer_may_come_from_a_folder(gguf_file: Path) -> None:
    engine = LlamaCppEngine.from_args(["--model", str(gguf_file), "--tokenizer", str(MODEL), "--num-threads", "1"])
    config = await engine.start(context())
    await engine.cleanup()
    assert config.model_path == str(MODEL)
    assert (MODEL / "tokenizer.json").is_file()


async def test_files_that_are_no_model(tmp_path: Path, gguf_file: Path) -> None:
    with pytest.raises(ConfigurationError, match="--model"):
        LlamaCppEngine.from_args(["--model", str(tmp_path / "none.gguf")])
    with pytest.raises(ConfigurationError, match="--tokenizer"):
        LlamaCppEngine.from_args(["--model", str(gguf_file), "--tokenizer", str(tmp_path)])
    whole = gguf_file.read_bytes()
    for name, content in {
        "text": b"hello",
        "cut": whole[:20_000],
        "old": whole[:4] + b"\x01\0\0\0" + whole[8:],
    }.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        engine = LlamaCppEngine.from_args(["--model", str(path)])
        with pytest.raises(ConfigurationError, match="GGUF"):
            await engine.start(context())
        await engine.cleanup()


async def test_weights_that_are_missing(tmp_path: Path, gguf_file: Path) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(gguf_file.read_bytes()[:-100_000])
    engine = LlamaCppEngine.from_args(["--model", str(path)])
    with pytest.raises(ConfigurationError, match="cannot load"):
        await engine.start(context())
    await engine.cleanup()


async def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, gguf_file: Path) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    engine = LlamaCppEngine.from_args(["--model", str(gguf_file)])
    with pytest.raises(ConfigurationError, match=r"dynamo-worker\[llamacpp\]"):
        await engine.start(context())
    await engine.cleanup()
