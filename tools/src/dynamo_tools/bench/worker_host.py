"""What the engine host costs: per token at 64 streams, over the same engine called directly, and under the mock."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager

from dynamo_core.clock import SystemClock
from dynamo_core.component import ComponentContext
from dynamo_core.engine import ChunkSink, Engine, EngineConfig, EngineContext
from dynamo_core.enums import FinishReason
from dynamo_core.errors import DynamoError
from dynamo_core.memory import MemoryDiscovery, MemoryEventBus, MemoryRequestPlane
from dynamo_core.planes import Call, CallOptions, RequestContext, RequestPlane
from dynamo_core.requests import GenerateChunk, GenerateRequest, Usage
from dynamo_core.telemetry import Metrics
from dynamo_core.tokens import pack_tokens
from dynamo_core.wire import GENERATE_REQUEST
from dynamo_tools.bench import Options
from dynamo_tools.bench.figure import Figure
from dynamo_tools.bench.worker_engine import (
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    prompt,
    run_requests,
    start_engine,
    token_request,
)
from dynamo_worker import MockEngine, MockSettings, ReferenceEngine, Worker, WorkerSettings, create_worker

STREAMS = 64
_TOKENS_A_STREAM = 500
_CREDIT = 1 << 20
_PAIRED_TURNS = ("direct", "host", "host", "direct") * 2


class BurstEngine:
    """Says one token to every stream in each turn of the event loop: nothing but the host takes time."""

    def __init__(self) -> None:
        self._sinks: list[tuple[GenerateRequest, ChunkSink]] = []

    async def start(self, context: EngineContext) -> EngineConfig:
        """Nothing to load."""
        return EngineConfig("burst")

    def submit(self, request: GenerateRequest, sink: ChunkSink) -> None:
        """Begin with the last stream."""
        self._sinks.append((request, sink))
        if len(self._sinks) == STREAMS:
            self.pushing = asyncio.ensure_future(self._push(self._sinks))
            self._sinks = []

    async def generate(self, request: GenerateRequest, context: RequestContext) -> AsyncIterator[GenerateChunk]:
        """The host pushes."""
        raise AssertionError("the host takes the push form")
        yield GenerateChunk()

    async def abort(self, request_id: str) -> None:
        """Every stream ends by itself."""

    async def drain(self) -> None:
        """Every stream ends by itself."""

    async def cleanup(self) -> None:
        """Nothing to release."""

    async def _push(self, sinks: Sequence[tuple[GenerateRequest, ChunkSink]]) -> None:
        token = pack_tokens([7])
        for index in range(_TOKENS_A_STREAM):
            for _, sink in sinks:
                sink.push(GenerateChunk(token, index))
            await asyncio.sleep(0)
        for _, sink in sinks:
            usage = Usage(PROMPT_TOKENS, _TOKENS_A_STREAM)
            sink.push(GenerateChunk(first_index=_TOKENS_A_STREAM, finish_reason=FinishReason.LENGTH, usage=usage))


class Counter:
    """A receiver, and a sink, that only counts."""

    def __init__(self) -> None:
        self.items = 0
        self.ended = asyncio.Event()
        self.error: DynamoError | None = None
        self.call: Call | None = None

    def on_items(self, items: Sequence[bytes]) -> None:
        """Count what comes through the plane."""
        self.items += len(items)

    def on_end(self, error: DynamoError | None) -> None:
        """Note the end."""
        self.error = error
        self.ended.set()

    def push(self, chunk: GenerateChunk) -> None:
        """Count what comes from an engine."""
        self.items += 1
        if chunk.usage is not None:
            self.ended.set()

    def fail(self, error: DynamoError) -> None:
        """Note the end."""
        self.on_end(error)


@asynccontextmanager
async def hosted(engine: Engine) -> AsyncGenerator[tuple[RequestPlane, Worker]]:
    """Yield a worker on memory planes."""
    discovery, plane, bus = MemoryDiscovery(), MemoryRequestPlane(), MemoryEventBus()
    context = ComponentContext("bench", discovery, plane, bus, Metrics(), SystemClock(), spawn=asyncio.create_task)
    settings = WorkerSettings(canary_idle_s=0, engine_request_limit=4 * STREAMS)
    worker = create_worker(context, settings, engine=engine)
    await worker.start()
    try:
        yield plane, worker
    finally:
        await worker.stop()
        await plane.close()


async def host_figures(options: Options) -> list[Figure]:
    """Measure the host."""
    return [
        await _per_token(options.runs),
        await _mock_rate(options.runs),
        await _reference_overhead(options.runs),
    ]


async def _per_token(runs: int) -> Figure:
    direct = [await _cpu_us_direct(BurstEngine()) for _ in range(runs + 1)][1:]
    async with hosted(BurstEngine()) as (plane, worker):
        values: list[float] = []
        for _ in range(runs + 1):
            cpu = time.process_time()
            await _through(plane, worker, [token_request(prompt(PROMPT_TOKENS), _TOKENS_A_STREAM)] * STREAMS)
            values.append((time.process_time() - cpu) / (STREAMS * _TOKENS_A_STREAM) * 1e6)
    base = statistics.median(direct)
    return Figure.of(
        "host_cpu_per_token_64_streams",
        [value - base for value in values[1:]],
        unit="us CPU",
        better="lower",
        limit_value=5.0,
    )


async def _cpu_us_direct(engine: BurstEngine) -> float:
    counters = [Counter() for _ in range(STREAMS)]
    cpu = time.process_time()
    for counter in counters:
        engine.submit(token_request(prompt(PROMPT_TOKENS), _TOKENS_A_STREAM), counter)
    for counter in counters:
        await counter.ended.wait()
    return (time.process_time() - cpu) / (STREAMS * _TOKENS_A_STREAM) * 1e6


async def _mock_rate(runs: int) -> Figure:
    settings = MockSettings(speedup_ratio=1e6, max_num_seqs=256, kv_block_size=16, total_kv_blocks=65536)
    async with hosted(MockEngine(settings)) as (plane, worker):
        rates: list[float] = []
        for _ in range(runs + 1):
            requests = [token_request(prompt(PROMPT_TOKENS), _TOKENS_A_STREAM) for _ in range(2 * STREAMS)]
            cpu = time.process_time()
            await _through(plane, worker, requests)
            rates.append(len(requests) * _TOKENS_A_STREAM / (time.process_time() - cpu))
    return Figure.of("mock_through_host", rates[1:], unit="tokens/CPU-s", better="higher", limit_value=300_000.0)


async def _reference_overhead(runs: int) -> Figure:
    """Compare pairs of the same batch, taken in turns and in both orders, so that drift of the machine falls out."""
    engine = await start_engine()
    shares: list[float] = []
    async with hosted(ReferenceEngine.from_args([])) as (plane, worker):
        for _ in range(runs + 1):
            spent = {"direct": 0.0, "host": 0.0}
            for side in _PAIRED_TURNS:
                batch = _batch()
                cpu = time.process_time()
                await (run_requests(engine, batch) if side == "direct" else _through(plane, worker, batch))
                spent[side] += time.process_time() - cpu
            shares.append((spent["host"] / spent["direct"] - 1) * 100)
    await engine.cleanup()
    shares = shares[1:]
    return Figure.of("host_overhead_reference_batch_16", shares, unit="% CPU", better="lower", limit_value=3.0)


def _batch() -> list[GenerateRequest]:
    return [token_request(prompt(PROMPT_TOKENS), OUTPUT_TOKENS) for _ in range(16)]


async def _through(plane: RequestPlane, worker: Worker, requests: Sequence[GenerateRequest]) -> None:
    counters = [Counter() for _ in requests]
    for number, (request, counter) in enumerate(zip(requests, counters, strict=True)):
        payload = GENERATE_REQUEST.encode(request)
        options = CallOptions(f"{request.request_id}-{number}", credit_items=_CREDIT)
        counter.call = await plane.open(worker.address, worker.endpoint, payload, counter, options)
    for counter in counters:
        await counter.ended.wait()
        if counter.error is not None:
            raise counter.error
