"""What the llama.cpp engine says its slots hold, against what real llama.cpp then does not compute again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dynamo_core.clock import SystemClock
from dynamo_core.engine import EngineContext
from dynamo_core.enums import FinishReason, Tier
from dynamo_core.ids import InstanceId
from dynamo_core.kv import BlockDescriptor
from dynamo_core.noop import LocalRequestContext
from dynamo_core.requests import GenerateChunk, GenerateRequest, SamplingOptions, StopConditions
from dynamo_core.telemetry import Metrics
from dynamo_core.tokens import BlockHasher, pack_tokens, unpack_hashes
from dynamo_worker._llamacpp.engine import LlamaCppEngine

BLOCK_SIZE = 8
HASHER = BlockHasher(BLOCK_SIZE)


class Index:
    """What a router would know."""

    def __init__(self) -> None:
        self.blocks: dict[int, BlockDescriptor] = {}

    def stored(self, blocks: Sequence[BlockDescriptor], *, tier: Tier = Tier.DEVICE, lora: str = "") -> None:
        for block in blocks:
            assert block.sequence_hash not in self.blocks, "told once"
            assert block.parent_hash is None or block.parent_hash in self.blocks, "parents first"
            self.blocks[block.sequence_hash] = block

    def removed(self, sequence_hashes: Sequence[int], *, tier: Tier = Tier.DEVICE) -> None:
        for name in sequence_hashes:
            del self.blocks[name]
            assert all(block.parent_hash != name for block in self.blocks.values()), "children first"

    def cleared(self) -> None:
        raise AssertionError("nothing clears it")

    def predicted(self, prompt: Sequence[int]) -> int:
        names = unpack_hashes(HASHER.hash_tokens(pack_tokens(prompt)).sequence)
        count = next((at for at, name in enumerate(names) if name not in self.blocks), len(names))
        return count * BLOCK_SIZE


async def begin(gguf_file: Path, *flags: str) -> tuple[LlamaCppEngine, Any]:
    common = ["--model", str(gguf_file), "--max-model-len", "512", "--num-threads", "1", "--max-num-seqs", "3"]
    engine = LlamaCppEngine.from_args([*common, "--kv-block-size", str(BLOCK_SIZE), *flags])
    return engine, await engine.start(EngineContext(InstanceId(7), SystemClock(), Metrics()))


@pytest.fixture
async def started(gguf_file: Path) -> AsyncIterator[tuple[LlamaCppEngine, Index]]:
    engine, config = await begin(gguf_file)
    assert config.kv_block_size == BLOCK_SIZE
    index = Index()
    engine.set_kv_event_sink(index)
    yield engine, index
    await engine.cleanup()


async def ask(engine: LlamaCppEngine, prompt: Sequence[int], name: str = "r", **stop: Any) -> list[GenerateChunk]:
    limits = StopConditions(**{"max_tokens": 4, "ignore_eos": True, **stop})
    item = GenerateRequest(name, "m", pack_tokens(prompt), sampling=SamplingOptions(temperature=0.0), stop=limits)
    async with asyncio.timeout(30):
        return [chunk async for chunk in engine.generate(item, LocalRequestContext(name))]


def cached(chunks: Sequence[GenerateChunk]) -> int:
    assert chunks[-1].usage is not None
    return chunks[-1].usage.cached_tokens


async def test_predictions_hold_within_a_block(started: tuple[LlamaCppEngine, Index]) -> None:
    engine, index = started
    source = random.Random(5)
    families = [[source.randrange(3, 900) for _ in range(120)] for _ in range(4)]
    hits = 0
    for _ in range(40):
        prompt = [*source.choice(families)[: source.randrange(4, 120)], *([source.randrange(3, 900)] * 5)]
        predicted, found = index.predicted(prompt), cached(await ask(engine, prompt))
        assert predicted - 1 <= found < predicted + BLOCK_SIZE
        hits += predicted > 0
        assert index.predicted(prompt) == len(prompt) // BLOCK_SIZE * BLOCK_SIZE
    assert hits > 10
    assert len(index.blocks) <= 3 * 130 // BLOCK_SIZE


async def test_requests_at_once_leave_only_what_is_true(started: tuple[LlamaCppEngine, Index]) -> None:
    engine, index = started
    source = random.Random(6)
    prefix = [source.randrange(3, 900) for _ in range(64)]
    prompts = [[*prefix, *([10 + number] * 20)] for number in range(7)]
    await asyncio.gather(*(ask(engine, prompt, f"r{number}") for number, prompt in enumerate(prompts)))
    for prompt in prompts:
        predicted, found = index.predicted(prompt), cached(await ask(engine, prompt))
        assert predicted - 1 <= found < predicted + BLOCK_SIZE


async def test_an_aborted_request_claims_nothing_that_is_not_there(started: tuple[LlamaCppEngine, Index]) -> None:
    engine, index = started
    prompt = [3 + 7 * number % 900 for number in range(300)]
    for wait_for_output in (False, True):
        running = asyncio.ensure_future(ask(engine, prompt, "long", max_tokens=200))
        async with asyncio.timeout(30):
            while not len(engine._tasks) or (wait_for_output and not index.predicted(prompt)):
                await asyncio.sleep(0)
        await engine.abort("long")
        assert (await running)[-1].finish_reason is FinishReason.CANCELLED
        predicted = index.predicted(prompt)
        assert predicted - 1 <= cached(await ask(engine, prompt))
        prompt = prompt[::-1]


@pytest.mark.parametrize("flags", [("--kv-cache-tokens", "600"), ("--prompt-cache-mib", "16")])
async def test_where_slots_lose_tokens_untold_there_are_no_events(gguf_file: Path, flags: tuple[str, str]) -> None:
    engine, config = await begin(gguf_file, *flags)
    index = Index()
    engine.set_kv_event_sink(index)
    try:
        assert config.kv_block_size == 0
        await ask(engine, list(range(3, 60)))
        assert index.blocks == {}
    finally:
        await engine.cleanup()
