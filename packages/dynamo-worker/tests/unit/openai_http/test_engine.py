from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from dynamo_core.content import text_part
from dynamo_core.enums import FinishReason, ModelInput
from dynamo_core.errors import (
    CapacityExhaustedError,
    ConfigurationError,
    DynamoError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    UnavailableError,
)
from dynamo_core.noop import LocalRequestContext
from dynamo_core.requests import (
    GenerateChunk,
    GenerateRequest,
    GuidedDecoding,
    OutputOptions,
    SamplingOptions,
    StopConditions,
    TopLogprob,
)
from dynamo_core.tokens import pack_tokens, unpack_tokens

VLLM_METRICS = """# HELP vllm:cache_config_info Information
vllm:cache_config_info{block_size="16",cache_dtype="auto",num_gpu_blocks="96"} 1.0
vllm:num_requests_running{engine="0",model_name="fake"} 3.0
vllm:num_requests_waiting{engine="0",model_name="fake"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="fake"} 0.25
"""


def request(**fields: Any) -> GenerateRequest:
    base: dict[str, Any] = {
        "token_ids": pack_tokens([5, 6, 7]),
        "sampling": SamplingOptions(temperature=0.0),
        "stop": StopConditions(max_tokens=6, ignore_eos=True),
    }
    return GenerateRequest("r1", "fake", **{**base, **fields})


async def ask(engine: Any, item: GenerateRequest) -> list[GenerateChunk]:
    context = LocalRequestContext(item.request_id)
    return [chunk async for chunk in engine.generate(item, context)]


def tokens(chunks: list[GenerateChunk]) -> list[int]:
    return [token for chunk in chunks for token in unpack_tokens(chunk.token_ids)]


async def test_a_server_with_a_local_model_folder_gets_token_prompts(start: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    _, _, config = await start(root=str(tmp_path))
    assert (config.model, config.model_input, config.model_path) == ("fake", ModelInput.TOKENS, str(tmp_path))
    assert config.context_length == 600


async def test_without_a_folder_somebody_else_must_tokenise(start: Any) -> None:
    fake, engine, config = await start(root="org/model")
    assert config.model_input is ModelInput.TEXT
    chunks = await ask(engine, request(token_ids=pack_tokens(()), parts=(text_part("ab"), text_part("c"))))
    assert fake.bodies[0]["prompt"] == "abc"
    assert "".join(chunk.text or "" for chunk in chunks).split()[0].startswith("w")
    assert (chunks[-1].finish_reason, chunks[-1].usage.completion_tokens) == (FinishReason.LENGTH, 6)


async def test_tokens_in_text_out(start: Any) -> None:
    """Servers that take token ids but return text, as our own frontend and llama-server do."""
    fake, engine, config = await start("--input", "tokens", form="text")
    assert (config.model_input, config.runtime_config.runtime_data["output"]) == (ModelInput.TOKENS, "text")
    chunks = await ask(engine, request())
    assert fake.bodies[0]["prompt"] == [5, 6, 7]
    assert not tokens(chunks)
    assert len("".join(chunk.text or "" for chunk in chunks).split()) == 6
    with pytest.raises(InvalidRequestError, match="logprobs"):
        await ask(engine, request(output=OutputOptions(logprobs=1)))


async def test_asking_for_tokens_of_a_text_server_is_refused(start: Any) -> None:
    with pytest.raises(ConfigurationError, match="--input text"):
        await start("--input", "tokens", takes_tokens=False)


async def test_options_are_passed_on_under_their_names(start: Any) -> None:
    fake, engine, _ = await start("--input", "tokens")
    sampling = SamplingOptions(
        temperature=0.5,
        top_k=4,
        min_p=0.1,
        seed=3,
        repetition_penalty=1.2,
        logit_bias={7: 1.5},
        guided=GuidedDecoding(regex="a+"),
    )
    await ask(engine, request(sampling=sampling, stop=StopConditions(max_tokens=3, min_tokens=2), eos_token_ids=(2,)))
    body = fake.bodies[0]
    sent = {name: body[name] for name in ("temperature", "top_k", "min_p", "seed", "max_tokens", "min_tokens")}
    assert sent == {"temperature": 0.5, "top_k": 4, "min_p": 0.1, "seed": 3, "max_tokens": 3, "min_tokens": 2}
    assert body["stop_token_ids"] == [2]
    assert body["logit_bias"] == {"7": 1.5}
    assert body["structured_outputs"] == {"regex": "a+"}
    assert "presence_penalty" not in body
    assert fake.headers[0]["x-request-id"] == "r1"


async def test_logprobs_come_by_token_id(start: Any) -> None:
    _, engine, _ = await start("--input", "tokens")
    chunks = await ask(engine, request(output=OutputOptions(logprobs=2)))
    entries = [entry for chunk in chunks for entry in chunk.logprobs]
    assert [entry.token_id for entry in entries] == tokens(chunks)
    assert entries[0].logprob == -0.5
    assert entries[0].top == (TopLogprob(entries[0].token_id, -0.5), TopLogprob(7, -1.5))


async def test_equal_choices_are_asked_for_once(start: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    fake, engine, _ = await start(root=str(tmp_path))
    chunks = await ask(engine, request(sampling=SamplingOptions(temperature=0.0, n=3)))
    assert "n" not in fake.bodies[-1]
    outputs = [tokens([chunk for chunk in chunks if chunk.choice == choice]) for choice in range(3)]
    assert outputs == [outputs[0]] * 3
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3 * len(outputs[0]) == 18


async def test_cached_tokens_are_the_servers(start: Any) -> None:
    _, engine, _ = await start("--input", "tokens")
    chunks = await ask(engine, request(token_ids=pack_tokens(range(5, 25))))
    assert chunks[-1].usage.cached_tokens == 10


@pytest.mark.parametrize(
    ("status", "kind", "reason"),
    [
        (400, InvalidRequestError, "request.invalid_argument"),
        (404, NotFoundError, "request.not_found"),
        (429, CapacityExhaustedError, "capacity.worker_overloaded"),
        (503, CapacityExhaustedError, "capacity.worker_overloaded"),
        (500, InternalError, "backend.unknown"),
    ],
)
async def test_a_refusal_keeps_its_meaning(start: Any, status: int, kind: type[DynamoError], reason: str) -> None:
    fake, engine, _ = await start("--input", "tokens")
    fake.fail_status = status
    with pytest.raises(kind) as caught:
        await ask(engine, request())
    assert caught.value.reason == reason
    assert "no, thanks" in caught.value.message + caught.value.diagnostic


async def test_a_lost_connection_lets_another_worker_go_on(start: Any) -> None:
    fake, engine, _ = await start("--input", "tokens")
    fake.cut_after = 3
    with pytest.raises(UnavailableError) as caught:
        await ask(engine, request())
    assert caught.value.reason == "backend.disconnected"
    assert caught.value.migratable


async def test_a_dead_server_cannot_be_connected(start: Any) -> None:
    fake, engine, _ = await start("--input", "tokens")
    await fake.close()
    with pytest.raises(UnavailableError) as caught:
        await ask(engine, request())
    assert caught.value.reason == "backend.cannot_connect"


async def test_an_error_inside_the_stream_ends_the_request(start: Any) -> None:
    fake, engine, _ = await start("--input", "tokens")
    fake.fail_event = True
    with pytest.raises(InternalError) as caught:
        await ask(engine, request())
    assert "out of memory" in caught.value.diagnostic


async def test_abort_closes_the_connection(start: Any) -> None:
    fake, engine, _ = await start("--input", "tokens")
    fake.hold_after = 2
    running = asyncio.ensure_future(ask(engine, request(stop=StopConditions(max_tokens=400, ignore_eos=True))))
    await asyncio.wait_for(fake.silent.wait(), 10)
    await engine.abort("r1")
    chunks = await asyncio.wait_for(running, 10)
    assert chunks[-1].finish_reason is FinishReason.CANCELLED
    await asyncio.wait_for(fake.left.wait(), 10)
    await asyncio.wait_for(engine.drain(), 10)


async def test_load_is_read_from_the_servers_metrics(start: Any) -> None:
    _, engine, config = await start("--input", "tokens", metrics=VLLM_METRICS)
    assert config.runtime_config.total_kv_blocks == 96
    async with asyncio.timeout(10):
        while engine.load().active_requests != 3:
            await asyncio.sleep(0)
    load = engine.load()
    assert (load.kv_used_blocks, load.kv_total_blocks, load.waiting_requests) == (24, 96, 2)


async def test_a_server_that_never_comes_up_is_named() -> None:
    from dynamo_core.engine import EngineContext
    from dynamo_core.ids import InstanceId
    from dynamo_core.telemetry import Metrics
    from dynamo_core.testing import FakeClock
    from dynamo_worker._openai_http.engine import OpenAIHttpEngine

    clock = FakeClock()
    engine = OpenAIHttpEngine.from_args(["--url", "http://127.0.0.1:9", "--startup-timeout-s", "2"])
    try:
        with pytest.raises(UnavailableError, match="did not come up"):
            await clock.run(engine.start(EngineContext(InstanceId(1), clock, Metrics())))
    finally:
        await engine.cleanup()


async def test_behind_the_host(start: Any, process: Any, kit: Any) -> None:
    fake, engine, _ = await start("--input", "tokens")
    await engine.cleanup()
    from dynamo_worker._openai_http.engine import OpenAIHttpEngine

    await process.worker(OpenAIHttpEngine.from_args(["--url", fake.url, "--input", "tokens"]))
    (record,) = await process.models()
    assert record.card.name == "fake"
    reply = await process.open(kit.request("through", [5, 6, 7], max_tokens=5))
    await asyncio.wait_for(reply.done.wait(), 10)
    assert (reply.error, len(reply.tokens), reply.finish) == (None, 5, FinishReason.LENGTH)
