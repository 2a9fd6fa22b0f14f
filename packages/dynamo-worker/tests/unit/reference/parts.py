"""Builders for the tests of this folder: engine cores, requests, small random models."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynamo_core.clock import SystemClock
from dynamo_core.engine import EngineContext
from dynamo_core.enums import FinishReason, Tier
from dynamo_core.errors import DynamoError
from dynamo_core.ids import InstanceId
from dynamo_core.kv import BlockDescriptor
from dynamo_core.requests import GenerateChunk, GenerateRequest, SamplingOptions, StopConditions, Usage
from dynamo_core.telemetry import Metrics
from dynamo_core.tokens import pack_tokens, unpack_tokens
from dynamo_worker._reference._assembly import load_engine
from dynamo_worker._reference._core import ActiveRequest, EngineCore, Output
from dynamo_worker._reference._events import BlockEvents
from dynamo_worker._reference._settings import BUNDLED_MODELS, ReferenceSettings
from dynamo_worker._reference.engine import ReferenceEngine

TINYLM = BUNDLED_MODELS / "tinylm"
GREEDY = SamplingOptions(temperature=0.0)


def build_core(events: BlockEvents | None = None, connector: Any = None, **options: Any) -> EngineCore:
    events = events or BlockEvents()
    core = load_engine(ReferenceSettings(**options), [events], connector).cores[0]
    if connector is not None:
        events.bind(connector, core.cache)
    return core


def generate_request(
    tokens: Sequence[int],
    *,
    max_tokens: int | None = 8,
    sampling: SamplingOptions = GREEDY,
    request_id: str = "r",
    ignore_eos: bool = True,
    stop: StopConditions | None = None,
    **fields: Any,
) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id,
        model="tinylm",
        token_ids=pack_tokens(tokens),
        sampling=sampling,
        stop=stop or StopConditions(max_tokens=max_tokens, ignore_eos=ignore_eos),
        **fields,
    )


class Answer:
    """What one request gave, choice by choice."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.reasons: dict[int, FinishReason] = {}
        self.chunks: list[GenerateChunk] = []
        self.usage: Usage | None = None
        self.error: DynamoError | None = None

    def take(self, item: GenerateChunk | DynamoError) -> None:
        if isinstance(item, DynamoError):
            self.error = item
            return
        assert self.usage is None, "a chunk came after the usage"
        self.chunks.append(item)
        tokens = self.tokens.setdefault(item.choice, [])
        tokens.extend(unpack_tokens(item.token_ids))
        if item.finish_reason is not None:
            assert item.choice not in self.reasons
            self.reasons[item.choice] = item.finish_reason
        self.usage = item.usage


class CoreRun:
    """Runs requests through a core, checking the pool after every step."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.answers: dict[ActiveRequest, Answer] = {}
        self.num_preempted = 0

    def submit(self, request: GenerateRequest, seed: int = 0) -> Answer:
        active = self.core.activate(request, request.sampling.seed or seed)
        self.answers[active] = Answer()
        self.core.add(active)
        return self.answers[active]

    def step(self) -> None:
        self.num_preempted += self.core.step().num_preempted
        self.collect()
        self.core.pool.check_integrity()

    def collect(self) -> None:
        outputs: list[Output] = self.core.take_outputs()
        for active, item in outputs:
            self.answers[active].take(item)

    def finish(self) -> None:
        while self.core.has_work:
            self.step()
        self.collect()
        assert self.core.pool.num_used_blocks == 0, "blocks leaked"


def answer(core: EngineCore, request: GenerateRequest, seed: int = 0) -> Answer:
    run = CoreRun(core)
    found = run.submit(request, seed)
    run.finish()
    return found


class RecordingSink:
    """KV events as tuples."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Tier, list[int]]] = []

    def stored(self, blocks: Sequence[BlockDescriptor], *, tier: Tier = Tier.DEVICE, lora: str = "") -> None:
        self.events.append(("stored", tier, [block.sequence_hash for block in blocks]))

    def removed(self, sequence_hashes: Sequence[int], *, tier: Tier = Tier.DEVICE) -> None:
        self.events.append(("removed", tier, list(sequence_hashes)))

    def cleared(self) -> None:
        self.events.append(("cleared", Tier.DEVICE, []))


class CallContext:
    """A request context that a test can stop."""

    def __init__(self, request_id: str = "r") -> None:
        self.headers: dict[str, str] = {}
        self.request_id = request_id
        self._stop = asyncio.Event()
        self._callbacks: list[Any] = []

    @property
    def stopped(self) -> bool:
        return self._stop.is_set()

    def remaining_s(self) -> float | None:
        return None

    async def wait_stopped(self) -> None:
        await self._stop.wait()

    def on_stop(self, callback: Any) -> None:
        if self.stopped:
            callback()
        else:
            self._callbacks.append(callback)

    def stop(self) -> None:
        self._stop.set()
        for callback in self._callbacks:
            callback()


def engine_context(**fields: Any) -> EngineContext:
    return EngineContext(InstanceId(7), SystemClock(), Metrics(), **fields)


async def collect(engine: ReferenceEngine, request: GenerateRequest, context: CallContext | None = None) -> Answer:
    found = Answer()
    async for chunk in engine.generate(request, context or CallContext(request.request_id)):
        found.take(chunk)
    return found


BASE_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 101,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}


def write_model(folder: Path, *, dtype: str = "F32", shards: int = 1, **changes: Any) -> Path:
    """Write a random model in Hugging Face layout."""
    config = {**BASE_CONFIG, **changes}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(1)
    tensors = {
        name: (random.standard_normal(shape) * (1.0 if "norm" in name else shape[-1] ** -0.5)).astype(np.float32)
        for name, shape in tensor_shapes(config).items()
    }
    names = list(tensors)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, dtype)
        return folder
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        mine = names[shard::shards]
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        write_safetensors(folder / file, {name: tensors[name] for name in mine}, dtype)
        weight_map |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
                "self_attn.q_proj": (queries, hidden),
                "self_attn.k_proj": (keys, hidden),
                "self_attn.v_proj": (keys, hidden),
                "self_attn.o_proj": (hidden, queries),
                "mlp.gate_proj": (inner, hidden),
                "mlp.up_proj": (inner, hidden),
                "mlp.down_proj": (hidden, inner),
            }.items()
        }
    return shapes


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], dtype: str = "F32") -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, tensor in tensors.items():
        raw = encode(tensor, dtype)
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def encode(tensor: np.ndarray, dtype: str) -> bytes:
    if dtype == "BF16":
        return (tensor.view(np.uint32) >> 16).astype("<u2").tobytes()
    return tensor.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()
