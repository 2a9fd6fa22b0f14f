"""The reference engine on prompts that come again, with and without a host tier."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field

from dynamo_core.clock import SystemClock
from dynamo_core.engine import EngineContext
from dynamo_core.errors import DynamoError
from dynamo_core.ids import InstanceId
from dynamo_core.requests import GenerateChunk, GenerateRequest, SamplingOptions, StopConditions
from dynamo_core.telemetry import Metrics
from dynamo_core.tokens import pack_tokens, unpack_tokens
from dynamo_kvbm import create_connector
from dynamo_worker._reference.engine import ReferenceEngine

DEVICE_BLOCKS = 256
BLOCK_TOKENS = 16
SESSIONS = 16
PROMPT_TOKENS = 4 * DEVICE_BLOCKS * BLOCK_TOKENS // SESSIONS
OUTPUT_TOKENS = 8


@dataclass
class Round:
    """The second time that every prompt is asked.

    Attributes:
        mean_s: Mean seconds to the first token.
        outputs: Tokens of every answer.
    """

    mean_s: float
    outputs: list[list[int]]


@dataclass
class _Sink:
    first_s: float = 0.0
    tokens: list[int] = field(default_factory=list[int])
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def push(self, chunk: GenerateChunk) -> None:
        self.first_s = self.first_s or time.perf_counter()
        self.tokens += unpack_tokens(chunk.token_ids)
        if chunk.usage is not None:
            self.ended.set()

    def fail(self, error: DynamoError) -> None:
        raise error


async def first_tokens() -> tuple[Round, Round]:
    """Return the rounds with and without a host tier, prompt beside prompt, so that both have the same machine."""
    engines = [await _started(with_tier=True), await _started(with_tier=False)]
    rng = random.Random(5)
    prompts = [[rng.randrange(3, 2048) for _ in range(PROMPT_TOKENS)] for _ in range(SESSIONS)]
    for prompt in prompts:
        for engine in engines:
            await _ask(engine, prompt)
    answers = [[await _ask(engine, prompt) for engine in engines] for prompt in prompts]
    for engine in engines:
        await engine.cleanup()
    with_tier, without = (
        Round(sum(wait for wait, _ in column) / SESSIONS, [tokens for _, tokens in column])
        for column in zip(*answers, strict=True)
    )
    return with_tier, without


async def _started(*, with_tier: bool) -> ReferenceEngine:
    metrics = Metrics()
    options = {"host_blocks": 8 * DEVICE_BLOCKS}
    connector = create_connector(options=options, clock=SystemClock(), metrics=metrics) if with_tier else None
    engine = ReferenceEngine.from_args(["--num-blocks", str(DEVICE_BLOCKS), "--max-model-len", "2048"])
    await engine.start(EngineContext(InstanceId(1), SystemClock(), metrics, kv_connector=connector))
    return engine


async def _ask(engine: ReferenceEngine, prompt: list[int]) -> tuple[float, list[int]]:
    sink = _Sink()
    request = GenerateRequest(
        request_id=str(id(sink)),
        model="tinylm",
        token_ids=pack_tokens(prompt),
        sampling=SamplingOptions(temperature=0.0),
        stop=StopConditions(max_tokens=OUTPUT_TOKENS, ignore_eos=True),
    )
    started = time.perf_counter()
    engine.submit(request, sink)
    await sink.ended.wait()
    return sink.first_s - started, sink.tokens
