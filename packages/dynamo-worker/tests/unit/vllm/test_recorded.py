"""The adapter on what real vLLM gave: ``tests/slow/record_vllm.py`` wrote it down."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_vllm
import pytest

from dynamo_core.clock import SystemClock
from dynamo_core.engine import EngineContext
from dynamo_core.enums import FinishReason, Tier
from dynamo_core.errors import InvalidRequestError
from dynamo_core.ids import InstanceId
from dynamo_core.kv import BlockDescriptor
from dynamo_core.load import ForwardPassMetrics
from dynamo_core.noop import LocalRequestContext
from dynamo_core.requests import (
    GenerateChunk,
    GenerateRequest,
    GuidedDecoding,
    OutputOptions,
    SamplingOptions,
    StopConditions,
)
from dynamo_core.telemetry import Metrics
from dynamo_core.tokens import BlockHasher, pack_tokens, unpack_hashes, unpack_tokens
from dynamo_worker._kv_relay.events import decode_batch
from dynamo_worker._kv_relay.translator import EventTranslator
from dynamo_worker._vllm._params import ParamsBuilder, raise_if_refused
from dynamo_worker._vllm._statistics import METRIC_PREFIX, EngineStatistics
from dynamo_worker._vllm.engine import VllmEngine

RECORDINGS = sorted((Path(__file__).parent / "recorded").glob("vllm-*.json"))


@pytest.fixture(params=RECORDINGS, ids=lambda path: path.stem)
def recorded(request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads(request.param.read_text())


def revived(value: Any) -> Any:
    """A recorded object again; token ids of log-probabilities are numbers again."""
    if isinstance(value, list):
        return [revived(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value and all(key.isdecimal() for key in value):
        return {int(key): revived(item) for key, item in value.items()}
    return SimpleNamespace(**{key: revived(item) for key, item in value.items()})


async def replay(
    recorded: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> list[GenerateChunk]:
    """Return what the adapter makes of a recorded request."""
    llm = fake_vllm.install(monkeypatch)
    (run,) = [item for item in recorded["requests"] if item["name"] == name]

    async def generate(*_: Any, **__: Any) -> AsyncIterator[Any]:
        for result in run["results"]:
            yield revived(result)

    monkeypatch.setattr(llm, "generate", generate)
    engine = VllmEngine.from_args(["--model", "org/fake"])
    await engine.start(EngineContext(InstanceId(7), SystemClock(), Metrics()))
    stop = options.pop("stop", StopConditions(max_tokens=4, ignore_eos=True))
    item = GenerateRequest(name, "m", pack_tokens(recorded["prompt"]), stop=stop, **options)
    chunks = [chunk async for chunk in engine.generate(item, LocalRequestContext(name))]
    await engine.cleanup()
    return chunks


def tokens(chunks: Sequence[GenerateChunk], choice: int = 0) -> list[int]:
    return [token for chunk in chunks if chunk.choice == choice for token in unpack_tokens(chunk.token_ids)]


def given(recorded: dict[str, Any], name: str, choice: int = 0) -> list[int]:
    (run,) = [item for item in recorded["requests"] if item["name"] == name]
    parts = [part for result in run["results"] for part in result["outputs"] if part["index"] == choice]
    return [token for part in parts for token in part["token_ids"]]


async def test_tokens_logprobs_and_cached_tokens(recorded: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = OutputOptions(logprobs=2)
    first = await replay(recorded, "greedy", monkeypatch, output=wanted)
    again = await replay(recorded, "again", monkeypatch, output=wanted)
    assert tokens(first) == tokens(again) == given(recorded, "greedy")
    assert [chunks[-1].usage.cached_tokens for chunks in (first, again) if chunks[-1].usage] == [0, 64]
    entries = [entry for chunk in first for entry in chunk.logprobs]
    assert [entry.token_id for entry in entries] == [entry.top[0].token_id for entry in entries] == tokens(first)
    assert all(len(entry.top) == 2 for entry in entries)


async def test_choices(recorded: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = await replay(recorded, "choices", monkeypatch, sampling=SamplingOptions(seed=7, n=2))
    for choice in (0, 1):
        assert tokens(chunks, choice) == given(recorded, "choices", choice)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8


async def test_a_stop_token_is_no_output(recorded: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (token,) = given(recorded, "stop")
    stop = StopConditions(max_tokens=4, ignore_eos=True, stop_token_ids=(token,))
    (chunk,) = await replay(recorded, "stop", monkeypatch, stop=stop)
    assert (chunk.finish_reason, chunk.stop_token_id, len(chunk.token_ids)) == (FinishReason.STOP, token, 0)


def test_events_name_the_blocks_that_a_router_hashes(recorded: dict[str, Any]) -> None:
    heard: list[tuple[str, Any]] = []

    class Sink:
        def stored(self, blocks: Sequence[BlockDescriptor], *, tier: Tier = Tier.DEVICE, lora: str = "") -> None:
            heard.append(("stored", (tier, [(block.position, block.local_hash) for block in blocks])))

        def removed(self, sequence_hashes: Sequence[int], *, tier: Tier = Tier.DEVICE) -> None:
            heard.append(("removed", tier))

        def cleared(self) -> None:
            heard.append(("cleared", None))

    translator = EventTranslator(Sink(), 32)
    for *_, payload in recorded["kv_events"]:
        batch = decode_batch(bytes.fromhex(payload))
        assert batch.num_unknown == 0
        translator.apply(batch)
    prompt = recorded["prompt"]
    forward, backward = (
        list(enumerate(unpack_hashes(BlockHasher(32).hash_tokens(pack_tokens(items)).local)))
        for items in (prompt, prompt[::-1])
    )
    stored = [(Tier.DEVICE, forward), (Tier.DEVICE, backward)]
    assert [item for kind, item in heard if kind == "stored"] == stored
    assert [kind for kind, _ in heard] == ["stored", "cleared", "stored"]


def test_load_and_forward_passes(recorded: dict[str, Any]) -> None:
    statistics, passes = EngineStatistics(), list[ForwardPassMetrics]()
    statistics.bind(EngineContext(InstanceId(7), SystemClock(), Metrics()), total_blocks=8, block_size=32)
    statistics.listen(passes.append)
    for item in recorded["statistics"]:
        statistics.record(revived(item), None, engine_idx=0, mm_cache_stats=None)
        assert 0 <= statistics.load(0).kv_used_blocks <= 8
    load = statistics.load(0)
    assert max(item["num_running_reqs"] for item in recorded["statistics"]) == 2  # the request with two choices
    assert load.active_requests == recorded["statistics"][-1]["num_running_reqs"]
    prefills = [item.scheduled.sum_prefill_tokens for item in passes if item.scheduled.num_prefill_requests]
    assert prefills[:2] == [70, 6], "the second request has 64 tokens from the cache"
    assert max(item.scheduled.num_decode_requests for item in passes) == 2
    assert all(item.wall_time_s > 0 for item in passes)
    assert load.cache_hit_rate is not None
    assert 0 < load.cache_hit_rate < 1


def test_vllms_metrics_have_its_prefix(recorded: dict[str, Any]) -> None:
    assert {"vllm:num_requests_running", "vllm:kv_cache_usage_perc", "vllm:prompt_tokens"} <= set(recorded["metrics"])
    assert all(name.startswith(METRIC_PREFIX) for name in recorded["metrics"])


def test_refusals_are_the_callers_fault(recorded: dict[str, Any]) -> None:
    for item in recorded["refusals"]:
        error: type[Exception] = Exception
        for name in reversed(item["classes"][: item["classes"].index("Exception")]):
            error = type(name, (error,), {})
        with pytest.raises(InvalidRequestError, match="vLLM refuses"):
            raise_if_refused(error(item["message"]))


def test_every_field_that_is_sent_is_one_of_vllms(recorded: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm.install(monkeypatch)
    import vllm

    sent: dict[str, Any] = {}
    monkeypatch.setattr(vllm, "SamplingParams", lambda **given: sent.update(given))
    builder = ParamsBuilder(vllm, context_length=100, is_prefill=True)
    sampling = SamplingOptions(guided=GuidedDecoding(regex="a"), seed=1)
    builder.sampling(GenerateRequest("r", "m", pack_tokens([1]), sampling=sampling), [2])
    assert sent.keys() <= set(recorded["sampling_fields"])
    assert set(GuidedDecoding.__struct_fields__) - {"backend"} <= set(recorded["constraint_fields"])
    needed = {"model", "kv_events_config", "runner", "disable_log_stats", "enable_logging_iteration_details"}
    assert needed <= set(recorded["argument_fields"])
