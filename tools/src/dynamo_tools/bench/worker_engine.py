"""The reference engine through its public contract: batches, prefix hits, abort."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from dynamo_core.clock import SystemClock
from dynamo_core.engine import EngineContext
from dynamo_core.errors import DynamoError
from dynamo_core.ids import InstanceId
from dynamo_core.load import ForwardPassMetrics
from dynamo_core.requests import GenerateChunk, GenerateRequest, SamplingOptions, StopConditions
from dynamo_core.telemetry import Metrics
from dynamo_core.tokens import pack_tokens
from dynamo_tools.bench import Options
from dynamo_tools.bench.figure import Figure
from dynamo_tools.bench.worker_torch import torch_rate
from dynamo_worker import ReferenceEngine

PROMPT_TOKENS = 32
OUTPUT_TOKENS = 128
PREFIX_TOKENS = 1800
SUFFIX_TOKENS = 200
_VOCABULARY = 2048
_STEPS_BEFORE_ABORT = 8

_random = random.Random(0)
_ids = itertools.count()


class Timer:
    """A sink that notes when a request's first and last chunk came."""

    def __init__(self) -> None:
        self.first_s = 0.0
        self.last_s = 0.0
        self.ended = asyncio.Event()

    def push(self, chunk: GenerateChunk) -> None:
        """Note the time."""
        self.first_s = self.first_s or time.perf_counter()
        if chunk.usage is not None:
            self.last_s = time.perf_counter()
            self.ended.set()

    def fail(self, error: DynamoError) -> None:
        """A benchmark of failures measures nothing."""
        raise error


def prompt(count: int) -> list[int]:
    """Return random token ids."""
    return [_random.randrange(3, _VOCABULARY) for _ in range(count)]


def token_request(tokens: Sequence[int], max_tokens: int) -> GenerateRequest:
    """Return a greedy request that runs to its last token."""
    return GenerateRequest(
        request_id=f"bench-{next(_ids)}",
        model="",
        token_ids=pack_tokens(tokens),
        sampling=SamplingOptions(temperature=0.0),
        stop=StopConditions(max_tokens=max_tokens, ignore_eos=True),
    )


async def start_engine(*flags: str) -> ReferenceEngine:
    """Return a started engine."""
    engine = ReferenceEngine.from_args(list(flags))
    await engine.start(EngineContext(InstanceId(1), SystemClock(), Metrics()))
    return engine


async def run_requests(engine: ReferenceEngine, requests: Sequence[GenerateRequest]) -> tuple[float, list[Timer]]:
    """Run requests together; return when they began, and their times."""
    timers = [Timer() for _ in requests]
    began = time.perf_counter()
    for request, timer in zip(requests, timers, strict=True):
        engine.submit(request, timer)
    for timer in timers:
        await timer.ended.wait()
    return began, timers


async def engine_figures(options: Options) -> list[Figure]:
    """Measure the engine."""
    engine = await start_engine()
    try:
        return [
            *await _decode(engine, options),
            await _prefix_hit(engine, options.runs),
            await _abort(engine, options.runs),
        ]
    finally:
        await engine.cleanup()


async def _decode(engine: ReferenceEngine, options: Options) -> list[Figure]:
    rates: dict[int, list[float]] = {1: [], 16: []}
    for _ in range(options.runs + 1):
        for batch, found in rates.items():
            found.append(await _decode_rate(engine, batch))
    single, batched = rates[1][1:], rates[16][1:]  # the first round only warms up
    ratios = [many / one for many, one in zip(batched, single, strict=True)]
    return [
        await _beside_torch("reference_decode_batch_1", single, 1, options),
        await _beside_torch("reference_decode_batch_16", batched, 16, options),
        Figure.of("reference_batch_16_to_1", ratios, unit="x", better="higher", limit_value=16.0),
    ]


async def _beside_torch(name: str, rates: Sequence[float], batch: int, options: Options) -> Figure:
    rival = await asyncio.to_thread(
        torch_rate,
        options.cache,
        Path(str(resources.files("dynamo_worker"))) / "models" / "tinylm",
        batch=batch,
        prompt_tokens=PROMPT_TOKENS,
        output_tokens=OUTPUT_TOKENS,
        runs=options.runs,
    )
    return Figure.of(
        name, rates, unit="tokens/CPU-s", better="higher", rival="PyTorch, one CPU thread", rival_value=rival
    )


async def _decode_rate(engine: ReferenceEngine, batch: int) -> float:
    requests = [token_request(prompt(PROMPT_TOKENS), OUTPUT_TOKENS) for _ in range(batch)]
    cpu = time.process_time()
    await run_requests(engine, requests)
    return batch * OUTPUT_TOKENS / (time.process_time() - cpu)


async def _prefix_hit(engine: ReferenceEngine, runs: int) -> Figure:
    ratios: list[float] = []
    for _ in range(runs):
        prefix = prompt(PREFIX_TOKENS)
        cold, warm = [await _first_token_s(engine, prefix + prompt(SUFFIX_TOKENS)) for _ in range(2)]
        ratios.append(cold / warm)
    return Figure.of("reference_prefix_hit_90_ttft_ratio", ratios, unit="x", better="higher", limit_value=10.0)


async def _first_token_s(engine: ReferenceEngine, tokens: Sequence[int]) -> float:
    began, (timer,) = await run_requests(engine, [token_request(tokens, 1)])
    return timer.first_s - began


async def _abort(engine: ReferenceEngine, runs: int) -> Figure:
    """Count the engine steps that begin after an abort and still see the request's blocks."""
    steps: list[float] = []
    passes: list[ForwardPassMetrics] = []
    under_way = asyncio.Event()

    def on_pass(metrics: ForwardPassMetrics) -> None:
        passes.append(metrics)
        if len(passes) == _STEPS_BEFORE_ABORT:
            under_way.set()

    engine.set_forward_pass_listener(on_pass)
    for _ in range(runs):
        request, timer = token_request(prompt(PROMPT_TOKENS), 1000), Timer()
        passes.clear()
        under_way.clear()
        engine.submit(request, timer)
        await under_way.wait()
        await engine.abort(request.request_id)
        passes.clear()
        await timer.ended.wait()
        steps.append(float(len(passes)))
    return Figure.of("reference_abort_to_free", steps, unit="steps", better="lower", limit_value=0.0)
