"""Speed of the reference engine through its public contract.

Run it with ``uv run python packages/dynamo-worker/bench/reference_bench.py [--runs N]``. The main figure is work per
second of CPU (user and system, all threads of the process), which a busy machine disturbs least; work per second of
wall time stands beside it. Each is the best of the runs.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Iterator

from dynamo_core.clock import SystemClock
from dynamo_core.engine import EngineContext
from dynamo_core.errors import DynamoError
from dynamo_core.ids import InstanceId
from dynamo_core.requests import GenerateChunk, GenerateRequest, SamplingOptions, StopConditions
from dynamo_core.telemetry import Metrics
from dynamo_core.tokens import pack_tokens
from dynamo_worker._reference.engine import ReferenceEngine

PROMPT_TOKENS = 32
OUTPUT_TOKENS = 128
PREFIX_TOKENS = 1800
SUFFIX_TOKENS = 200

_random = random.Random(0)


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


def _tokens(count: int) -> list[int]:
    return [_random.randrange(3, 2048) for _ in range(count)]


def _request(prompt: list[int], max_tokens: int, identity: Iterator[int]) -> GenerateRequest:
    return GenerateRequest(
        request_id=str(next(identity)),
        model="tinylm",
        token_ids=pack_tokens(prompt),
        sampling=SamplingOptions(temperature=0.0),
        stop=StopConditions(max_tokens=max_tokens, ignore_eos=True),
    )


async def _run(engine: ReferenceEngine, requests: list[GenerateRequest]) -> tuple[float, list[Timer]]:
    timers = [Timer() for _ in requests]
    start = time.perf_counter()
    for item, timer in zip(requests, timers, strict=True):
        engine.submit(item, timer)
    for timer in timers:
        await timer.ended.wait()
    return start, timers


async def decode_rates(engine: ReferenceEngine, batch: int, identity: Iterator[int]) -> tuple[float, float]:
    """Tokens per CPU-second and per second of wall time, from submission to the last token."""
    requests = [_request(_tokens(PROMPT_TOKENS), OUTPUT_TOKENS, identity) for _ in range(batch)]
    cpu = time.process_time()
    start, timers = await _run(engine, requests)
    count = batch * OUTPUT_TOKENS
    return count / (time.process_time() - cpu), count / (max(timer.last_s for timer in timers) - start)


async def first_token_seconds(
    engine: ReferenceEngine, prompt: list[int], identity: Iterator[int]
) -> tuple[float, float]:
    """CPU and wall seconds of a lone request's first token."""
    cpu = time.process_time()
    start, (timer,) = await _run(engine, [_request(prompt, 1, identity)])
    return time.process_time() - cpu, timer.first_s - start


async def measure(runs: int) -> None:
    """Print every figure."""
    engine = ReferenceEngine.from_args([])
    began = time.perf_counter()
    await engine.start(EngineContext(InstanceId(1), SystemClock(), Metrics()))
    _say(f"start                    {time.perf_counter() - began:7.3f} s wall")
    identity = iter(range(1 << 30))
    rates: dict[int, float] = {}
    for batch in (1, 4, 16, 64):
        cpu, wall = zip(*[await decode_rates(engine, batch, identity) for _ in range(runs)], strict=True)
        rates[batch] = max(cpu)
        _say(f"decode, batch {batch:2}         {max(cpu):7.0f} tokens/CPU-s (min {min(cpu):.0f}), wall {max(wall):.0f}")
    _say(f"batch 16 to batch 1      {rates[16] / rates[1]:7.2f} x by CPU")
    cold: list[tuple[float, float]] = []
    warm: list[tuple[float, float]] = []
    for _ in range(runs):
        prefix = _tokens(PREFIX_TOKENS)
        cold.append(await first_token_seconds(engine, prefix + _tokens(SUFFIX_TOKENS), identity))
        warm.append(await first_token_seconds(engine, prefix + _tokens(SUFFIX_TOKENS), identity))
    for name, found in (("cold", cold), ("90 % cached", warm)):
        cpu_ms, wall_ms = (min(column) * 1e3 for column in zip(*found, strict=True))
        _say(f"first token, {name:11} {cpu_ms:7.2f} ms CPU, {wall_ms:.2f} ms wall")
    _say(f"cold to 90 % cached      {min(cold)[0] / min(warm)[0]:7.2f} x by CPU")
    await engine.cleanup()


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def main() -> None:
    """Read the number of runs and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    asyncio.run(measure(parser.parse_args().runs))


if __name__ == "__main__":
    main()
