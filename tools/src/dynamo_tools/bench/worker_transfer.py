"""KV transfer between two processes of one host: a prefill worker process, and a decode worker in this one."""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from dynamo_core import plugins
from dynamo_core.clock import SystemClock
from dynamo_core.component import ComponentContext
from dynamo_core.discovery import INSTANCES_PREFIX, Discovery, Instance
from dynamo_core.enums import FinishReason
from dynamo_core.memory import MemoryEventBus
from dynamo_core.planes import RequestPlane
from dynamo_core.requests import GenerateChunk, GenerateRequest
from dynamo_core.streams import open_stream
from dynamo_core.telemetry import Metrics
from dynamo_core.wire import GENERATE_CHUNK, GENERATE_REQUEST, INSTANCE
from dynamo_tools.bench import Options
from dynamo_tools.bench.figure import Figure
from dynamo_tools.bench.worker_engine import prompt, token_request
from dynamo_worker import ReferenceEngine, Worker, WorkerSettings, create_worker

PROMPT_TOKENS = 1025
BLOCK_TOKENS = 16
LAYERS, HEADS, HEAD_DIM = 8, 8, 128
TOKEN_BYTES = LAYERS * 2 * HEADS * HEAD_DIM * 4
MOVED_BYTES = (PROMPT_TOKENS - 1) * TOKEN_BYTES
_HIDDEN, _INNER, _VOCABULARY = 64, 64, 2112
_START_LIMIT_S = 60.0
_TRIES = 3


async def transfer_figures(options: Options) -> list[Figure]:
    """Measure both ways of moving KV, beside a copy in memory of the same size."""
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="dynamo-bench-") as folder:
        write_model(Path(folder) / "model")
        for name, flags in (("shared_memory", ()), ("tcp", ("--no-kv-shared-memory",))):
            (Path(folder) / name).mkdir()
            async with _pair(Path(folder) / name, Path(folder) / "model", flags) as (plane, prefill, decode, engine):
                await _transfer_gb_s(plane, prefill, decode, engine)
                values: list[float] = []
                copied: list[float] = []
                for _ in range(options.runs):  # in turns: both see the same machine
                    copied.append(_memcpy_gb_s(MOVED_BYTES))
                    values.append(await _transfer_gb_s(plane, prefill, decode, engine))
            figures.extend(_figures(name, values, copied))
    return figures


def _figures(name: str, values: Sequence[float], copied: Sequence[float]) -> list[Figure]:
    limit = statistics.median(copied)
    shares = [100 * value / copy for value, copy in zip(values, copied, strict=True)]
    return [
        Figure.of(
            f"kv_transfer_{name}",
            values,
            unit="GB/s",
            better="higher",
            rival="memcpy in one process",
            rival_value=limit,
            limit_value=limit,
        ),
        Figure.of(f"kv_transfer_{name}_to_memcpy", shares, unit="%", better="higher", limit_value=100.0),
    ]


async def _transfer_gb_s(plane: RequestPlane, prefill: Instance, decode: Worker, engine: ReferenceEngine) -> float:
    """Time a request whose prompt must be moved, less the same one whose prompt is there; the best of a few of each."""
    moved: list[float] = []
    held: list[float] = []
    for _ in range(_TRIES):
        await engine.clear_kv_blocks()
        request = token_request([token % _VOCABULARY for token in prompt(PROMPT_TOKENS)], 1)
        for found in (moved, held):
            [prefilled] = await _ask(plane, prefill, request)
            found.append(await _timed(plane, decode, msgspec.structs.replace(request, handoff=prefilled.handoff)))
    return MOVED_BYTES / (min(moved) - min(held)) / 1e9


async def _timed(plane: RequestPlane, decode: Worker, request: GenerateRequest) -> float:
    instance = Instance(decode.endpoint, decode.instance_id, decode.address)
    began = time.perf_counter()
    chunks = await _ask(plane, instance, request)
    took = time.perf_counter() - began
    usage = chunks[-1].usage
    if usage is None or usage.cached_tokens != PROMPT_TOKENS - 1:
        raise RuntimeError(f"the prompt was not moved whole: {usage}")
    return took


async def _ask(plane: RequestPlane, instance: Instance, request: GenerateRequest) -> list[GenerateChunk]:
    payload = GENERATE_REQUEST.encode(request)
    async with await open_stream(plane, instance.address, instance.endpoint, payload) as stream:
        chunks = [GENERATE_CHUNK.decode(item) async for item in stream]
    if chunks[-1].finish_reason is not FinishReason.LENGTH:
        raise RuntimeError(f"the request ended as {chunks[-1].finish_reason}")
    return chunks


@asynccontextmanager
async def _pair(
    discovery_folder: Path, model: Path, flags: Sequence[str]
) -> AsyncGenerator[tuple[RequestPlane, Instance, Worker, ReferenceEngine]]:
    clock = SystemClock()
    discovery: Discovery = plugins.load("discoveries", "file")(f"file://{discovery_folder}", clock=clock, options={})
    plane: RequestPlane = plugins.load("request_planes", "tcp")("tcp://127.0.0.1:0", clock=clock, options={})
    engine_flags = ["--model", str(model), "--num-blocks", "256", "--block-size", str(BLOCK_TOKENS)]
    process = _start_prefill(discovery_folder, [*flags, *engine_flags])
    engine = ReferenceEngine.from_args(engine_flags)
    context = ComponentContext(
        "dynamo", discovery, plane, MemoryEventBus(), Metrics(), clock, spawn=asyncio.create_task
    )
    settings = WorkerSettings(role="decode", canary_idle_s=0, kv_shared_memory=not flags, local_prefill=False)
    worker = create_worker(context, settings, engine=engine)
    try:
        await discovery.start()
        await plane.start()
        await worker.start()
        yield plane, await _found(discovery), worker, engine
    finally:
        await worker.stop()
        await plane.close()
        await discovery.close()
        process.terminate()
        await asyncio.to_thread(process.wait)


def _start_prefill(discovery_folder: Path, flags: Sequence[str]) -> subprocess.Popen[bytes]:
    planes = ["--discovery", f"file://{discovery_folder}", "--request-plane", "tcp://127.0.0.1:0"]
    command = [sys.executable, "-m", "dynamo_runtime", "worker", *planes, "--event-bus", "zmq://127.0.0.1:0"]
    return subprocess.Popen(
        [*command, "--role", "prefill", *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


async def _found(discovery: Discovery) -> Instance:
    async with asyncio.timeout(_START_LIMIT_S):
        while True:
            for record in await discovery.list(INSTANCES_PREFIX):
                instance = INSTANCE.decode(record.value)
                if (instance.endpoint.component, instance.endpoint.endpoint) == ("prefill", "generate"):
                    return instance
            await asyncio.sleep(0.05)


def _memcpy_gb_s(size: int) -> float:
    source, target = bytearray(size), memoryview(bytearray(size))
    target[:] = source
    began = time.perf_counter()
    target[:] = source
    return size / (time.perf_counter() - began) / 1e9


def write_model(folder: Path) -> None:
    """Write a model of few weights and much KV: 64 KiB a token."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": _HIDDEN,
        "intermediate_size": _INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": _VOCABULARY,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    wide, layer = HEADS * HEAD_DIM, "model.layers.{}."
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (_VOCABULARY, _HIDDEN),
        "model.norm.weight": (_HIDDEN,),
    }
    for index in range(LAYERS):
        name = layer.format(index)
        shapes |= {f"{name}self_attn.{part}_proj.weight": (wide, _HIDDEN) for part in "qkv"}
        shapes |= {f"{name}mlp.{part}_proj.weight": (_INNER, _HIDDEN) for part in ("gate", "up")}
        shapes[f"{name}self_attn.o_proj.weight"] = (_HIDDEN, wide)
        shapes[f"{name}mlp.down_proj.weight"] = (_HIDDEN, _INNER)
        shapes |= {f"{name}{part}_layernorm.weight": (_HIDDEN,) for part in ("input", "post_attention")}
    _write_safetensors(folder / "model.safetensors", shapes)


def _write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header: dict[str, object] = {}
    body = bytearray()
    for name, shape in shapes.items():
        count = math.prod(shape)
        values = [(index * 2654435761 % 1000 - 500) / 5000 for index in range(count)]
        begin = len(body)
        body += struct.pack(f"<{count}f", *values)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, len(body)]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
