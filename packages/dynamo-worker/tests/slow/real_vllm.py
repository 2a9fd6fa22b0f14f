"""The vLLM adapter on real vLLM, on a CPU, with the package's own model: ``dyn slow vllm`` runs this file.

vLLM takes its time to start, so one engine of vLLM's serves most tests; the adapter is made and started anew for each.
"""

from __future__ import annotations

import asyncio
import json
import operator
import os
import sys
from array import array
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import vllm
from tokenizers import Tokenizer
from vllm.v1.engine.async_llm import AsyncLLM

import dynamo_worker
from dynamo_core.clock import SystemClock
from dynamo_core.content import tokens_part
from dynamo_core.engine import Engine, EngineContext
from dynamo_core.enums import FinishReason, Modality, ModelType, Tier
from dynamo_core.errors import InvalidRequestError, NotFoundError
from dynamo_core.ids import InstanceId, WorkerId
from dynamo_core.kv import BlockDescriptor
from dynamo_core.load import ForwardPassMetrics
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
from dynamo_core.testing import EngineConformance
from dynamo_core.tokens import BlockHasher, pack_tokens, unpack_hashes, unpack_tokens
from dynamo_worker import ReferenceEngine
from dynamo_worker._vllm.engine import VllmEngine

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "reference"))

from adapters import write_adapter
from dense_oracle import DenseModel

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MODEL = Path(dynamo_worker.__file__).parent / "models" / "tinylm"
BLOCK_SIZE = 32
ARGUMENTS = {
    "enforce_eager": True,
    "dtype": "float32",
    "block_size": BLOCK_SIZE,
    "num_gpu_blocks_override": 96,
    "max_model_len": 1024,
    "max_num_seqs": 16,
    "enable_lora": True,
    "max_lora_rank": 8,
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}
PROMPT = [3 + 7 * index % 900 for index in range(100)]


class KeptLlm:
    """Gives every adapter the one real ``AsyncLLM``, and its statistics to the adapter that came last."""

    def __init__(self) -> None:
        self.llm: Any = None
        self._make = AsyncLLM.from_engine_args
        self._logger: Any = None
        self._shut_down: Any = None

    def from_engine_args(self, arguments: Any, stat_loggers: Sequence[Any] = ()) -> Any:
        if arguments.runner == "pooling":
            return self._make(arguments, stat_loggers=list(stat_loggers))
        self._logger = stat_loggers[0]
        if self.llm is None:
            self.llm = self._make(arguments, stat_loggers=[lambda config, index: _Forward(self, config, index)])
            self._shut_down, self.llm.shutdown = self.llm.shutdown, lambda: None
        return self.llm

    def logger(self, config: Any, index: int) -> Any:
        return self._logger(config, index)

    def close(self) -> None:
        if self.llm is not None:
            self._shut_down()


class _Forward:
    def __init__(self, kept: KeptLlm, config: Any, index: int) -> None:
        self._kept, self._of = kept, (config, index)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kept.logger(*self._of), name)


class Reports:
    """A sink of KV events."""

    def __init__(self) -> None:
        self.blocks: dict[int, BlockDescriptor] = {}
        self.clears = 0

    def stored(self, blocks: Sequence[BlockDescriptor], *, tier: Tier = Tier.DEVICE, lora: str = "") -> None:
        assert tier is Tier.DEVICE
        self.blocks |= {block.sequence_hash: block for block in blocks}

    def removed(self, sequence_hashes: Sequence[int], *, tier: Tier = Tier.DEVICE) -> None:
        for name in sequence_hashes:
            self.blocks.pop(name, None)

    def cleared(self) -> None:
        self.blocks.clear()
        self.clears += 1


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("vllm")
    addresses = ("--kv-events-endpoint", f"ipc://{folder}/ev", "--kv-events-replay-endpoint", f"ipc://{folder}/re")
    return ["--model", str(MODEL), "--vllm-args", json.dumps(ARGUMENTS), *addresses]


@pytest.fixture(scope="module", autouse=True)
def kept() -> Iterator[KeptLlm]:
    print(f"\nvLLM {vllm.__version__}")
    made = KeptLlm()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AsyncLLM, "from_engine_args", made.from_engine_args)
        yield made
    made.close()


class TestRealVllm(EngineConformance):
    factory = VllmEngine
    patience_s = 240.0

    @pytest.fixture(autouse=True)
    def _flags(self, flags: list[str]) -> None:
        self._arguments = flags

    def make_engine(self) -> Engine:
        return VllmEngine.from_args(self._arguments)

    # Greedy continuations pass; a sampled one draws anew.
    @pytest.mark.xfail(reason="vLLM's seeded generator counts draws, not positions", strict=False)
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize("accepted", [1, 3, 7])
    async def test_continuation_gives_the_rest(self, accepted: int, temperature: float) -> None:
        await super().test_continuation_gives_the_rest(accepted, temperature)


@pytest.fixture
async def engine(flags: list[str]) -> AsyncIterator[VllmEngine]:
    made = VllmEngine.from_args(flags)
    await made.start(EngineContext(InstanceId(7), SystemClock(), Metrics()))
    yield made
    await made.cleanup()


def request(name: str, tokens: Sequence[int] = PROMPT, **fields: Any) -> GenerateRequest:
    base: dict[str, Any] = {
        "sampling": SamplingOptions(temperature=0.0),
        "stop": StopConditions(max_tokens=8, ignore_eos=True),
    }
    return GenerateRequest(name, "tinylm", pack_tokens(tokens), **{**base, **fields})


async def ask(engine: Any, item: GenerateRequest) -> list[GenerateChunk]:
    return [chunk async for chunk in engine.generate(item, LocalRequestContext(item.request_id))]


def tokens(chunks: Sequence[GenerateChunk]) -> list[int]:
    return [token for chunk in chunks for token in unpack_tokens(chunk.token_ids)]


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def test_events_name_the_blocks_that_a_router_hashes(engine: VllmEngine) -> None:
    await engine.clear_kv_blocks()
    reports = Reports()
    engine.set_kv_event_sink(reports)
    prompt = [token + 1 for token in PROMPT]
    first = await ask(engine, request("first", prompt))
    local = unpack_hashes(BlockHasher(BLOCK_SIZE).hash_tokens(pack_tokens(prompt)).local)
    await until(lambda: len(reports.blocks) >= len(local))
    by_position = {block.position: block.local_hash for block in reports.blocks.values()}
    assert [by_position[index] for index in range(3)] == list(local)
    second = await ask(engine, request("second", prompt))
    assert tokens(first) == tokens(second)
    assert [chunks[-1].usage.cached_tokens for chunks in (first, second) if chunks[-1].usage] == [0, 96]
    await engine.clear_kv_blocks()
    await ask(engine, request("next", prompt[:BLOCK_SIZE]))  # vLLM tells events with its next step
    await until(lambda: len(reports.blocks) <= 1)
    assert reports.clears


async def test_a_salt_keeps_tenants_apart(engine: VllmEngine) -> None:
    await ask(engine, request("one", routing=RoutingHints(cache_salt="a")))
    other = await ask(engine, request("two", routing=RoutingHints(cache_salt="b")))
    same = await ask(engine, request("three", routing=RoutingHints(cache_salt="a")))
    assert [chunks[-1].usage.cached_tokens for chunks in (other, same) if chunks[-1].usage] == [0, 96]


async def test_constraints_bind(engine: VllmEngine) -> None:
    tokenizer = engine._llm.get_tokenizer()
    for guided, accept in (
        (GuidedDecoding(choice=("Paris", "Tokyo")), lambda text: text in ("Paris", "Tokyo")),
        (GuidedDecoding(regex="[0-9]{3}x"), lambda text: text[:3].isdigit() and text[3:] == "x"),
        (
            GuidedDecoding(
                json={
                    "type": "object",
                    "properties": {"n": {"enum": [1, 2]}},
                    "required": ["n"],
                    "additionalProperties": False,
                }
            ),
            lambda text: json.loads(text)["n"] in (1, 2),
        ),
    ):
        item = request(
            "guided",
            sampling=SamplingOptions(temperature=0.0, guided=guided),
            stop=StopConditions(max_tokens=200),
            eos_token_ids=(2,),
        )
        chunks = await ask(engine, item)
        assert chunks[-1].finish_reason in (FinishReason.EOS, FinishReason.STOP)
        assert accept(tokenizer.decode(tokens(chunks)))


async def test_logprobs(engine: VllmEngine) -> None:
    chunks = await ask(engine, request("logprobs", output=OutputOptions(logprobs=3)))
    entries = [entry for chunk in chunks for entry in chunk.logprobs]
    assert [entry.token_id for entry in entries] == tokens(chunks)
    for entry in entries:
        assert entry.top[0].token_id == entry.token_id
        assert [item.logprob for item in entry.top] == sorted((item.logprob for item in entry.top), reverse=True)


async def test_what_vllm_refuses_is_the_callers_fault(engine: VllmEngine) -> None:
    with pytest.raises(InvalidRequestError, match="vLLM refuses"):
        await ask(engine, request("bad", sampling=SamplingOptions(temperature=-1.0)))
    with pytest.raises(InvalidRequestError, match="vLLM refuses"):
        await ask(engine, request("bad", sampling=SamplingOptions(guided=GuidedDecoding(regex="(["))))


async def test_an_abort_frees_the_blocks(engine: VllmEngine) -> None:
    running = asyncio.ensure_future(ask(engine, request("long", stop=StopConditions(max_tokens=900, ignore_eos=True))))
    await until(lambda: engine.load().active_requests == 1)
    await engine.abort("long")
    assert (await running)[-1].finish_reason is FinishReason.CANCELLED
    await ask(engine, request("after"))
    assert engine.load().active_requests == 0


async def test_steps_load_and_metrics_are_vllms_own(flags: list[str]) -> None:
    metrics, passes = Metrics(), list[ForwardPassMetrics]()
    engine = VllmEngine.from_args(flags)
    await engine.start(EngineContext(InstanceId(7), SystemClock(), metrics))
    engine.set_forward_pass_listener(passes.append)
    prompt = [token + 2 for token in PROMPT]
    for name in ("first", "second"):
        await ask(engine, request(name, prompt))
    await until(lambda: sum(item.scheduled.num_decode_requests for item in passes) >= 14)
    prefills = [item for item in passes if item.scheduled.num_prefill_requests]
    assert [item.scheduled.sum_prefill_tokens for item in prefills] == [100, 4], "the second has 96 from the cache"
    assert all(item.wall_time_s > 0 and item.worker == WorkerId(InstanceId(7), 0) for item in passes)
    decode = next(item for item in passes if not item.scheduled.num_prefill_requests)
    assert 96 <= decode.scheduled.sum_decode_kv_tokens <= 160
    assert 0 < (engine.load().cache_hit_rate or 0) < 1
    names = {family.name for family in metrics.registry.collect()}
    assert {"vllm:num_requests_running", "vllm:kv_cache_usage_perc", "vllm:time_to_first_token_seconds"} <= names
    asked = [
        sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "vllm:prompt_tokens_total"
    ]
    assert sum(asked) >= 200
    await engine.cleanup()
    assert list(metrics.registry.collect()) == []


async def test_an_adapter_answers_as_the_reference_engine_has_it(engine: VllmEngine, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", DenseModel(MODEL), seed=3)
    routing = RoutingHints(lora="mine")
    plain = tokens(await ask(engine, request("plain")))
    with pytest.raises(NotFoundError):
        await ask(engine, request("early", routing=routing))
    await engine.load_lora("mine", str(folder))
    assert await engine.list_loras() == ["mine"]
    adapted = tokens(await ask(engine, request("adapted", routing=routing)))
    assert tokens(await ask(engine, request("plain-again"))) == plain
    await engine.unload_lora("mine")
    assert await engine.list_loras() == []
    reference = ReferenceEngine.from_args([])
    await reference.start(EngineContext(InstanceId(7), SystemClock(), Metrics()))
    try:
        assert tokens(await ask(reference, request("plain"))) == plain
        await reference.load_lora("mine", str(folder))
        assert tokens(await ask(reference, request("adapted", routing=routing))) == adapted
    finally:
        await reference.cleanup()
    assert adapted != plain


async def test_embeddings(flags: list[str]) -> None:
    arguments = json.dumps({**ARGUMENTS, "runner": "pooling", "convert": "embed"})
    engine = VllmEngine.from_args(["--model", str(MODEL), "--no-kv-events", "--vllm-args", arguments])
    try:
        config = await engine.start(EngineContext(InstanceId(7), SystemClock(), Metrics()))
        assert config.model_types == (ModelType.EMBEDDING,)
        (chunk,) = await ask(engine, request("embed", modality=Modality.EMBEDDING))
        (part,) = chunk.parts
        assert (part.dtype, part.shape) == ("f32", (128,))
        assert chunk.usage is not None
        assert chunk.usage.prompt_tokens == len(PROMPT)
        with pytest.raises(InvalidRequestError):
            await ask(engine, request("text"))
    finally:
        await engine.cleanup()


async def test_embeddings_of_a_sentence_model() -> None:
    folder = Path(os.environ["DYNAMO_SLOW_SENTENCES"])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    arguments = {"runner": "pooling", "dtype": "float32", "enforce_eager": True, "max_model_len": 128}
    engine = VllmEngine.from_args(["--model", str(folder), "--no-kv-events", "--vllm-args", json.dumps(arguments)])
    sentences = ("A man is eating his lunch.", "Someone has a meal.", "The train to Kyoto leaves at noon.")
    parts = tuple(tokens_part(pack_tokens(tokenizer.encode(text).ids)) for text in sentences)
    try:
        await engine.start(EngineContext(InstanceId(7), SystemClock(), Metrics()))
        item = request("embed", (), modality=Modality.EMBEDDING, parts=parts)
        (chunk,) = await ask(engine, item)
    finally:
        await engine.cleanup()
    lunch, meal, train = (array("f", part.data) for part in chunk.parts)
    assert len(lunch) == 384
    close, far = (sum(map(operator.mul, lunch, other)) for other in (meal, train))
    print(f"similarity {close:.3f} to a paraphrase, {far:.3f} to another subject")
    assert close > far + 0.3
