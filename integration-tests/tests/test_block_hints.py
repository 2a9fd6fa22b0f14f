"""What requests say of their blocks decides what a real block manager behind a worker keeps and brings near."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

from dynamo_core.clock import SystemClock
from dynamo_core.component import ComponentContext, HealthBoard
from dynamo_core.enums import Tier
from dynamo_core.errors import DynamoError
from dynamo_core.kv import BlockHints
from dynamo_core.memory import MemoryDiscovery, MemoryEventBus, MemoryRequestPlane
from dynamo_core.planes import Call, CallOptions
from dynamo_core.requests import GenerateChunk, GenerateRequest, SamplingOptions, StopConditions
from dynamo_core.telemetry import Metrics
from dynamo_core.tokens import pack_tokens
from dynamo_core.wire import GENERATE_CHUNK, GENERATE_REQUEST
from dynamo_worker import Worker, WorkerSettings, create_worker

BLOCK_TOKENS = 16
PROMPT_BLOCKS = 3
DEADLINE_S = 60.0
# The device holds two prompts, so what a third finds again comes from below.
SMALL_DEVICE = ["--num-blocks", "6", "--max-model-len", "96", "--block-size", str(BLOCK_TOKENS)]


class Reply:
    """The answer to one request."""

    def __init__(self) -> None:
        self.chunks: list[GenerateChunk] = []
        self.error: DynamoError | None = None
        self.started = asyncio.Event()
        self.done = asyncio.Event()

    def on_items(self, items: Sequence[bytes]) -> None:
        self.chunks += [GENERATE_CHUNK.decode(item) for item in items]
        self.started.set()

    def on_end(self, error: DynamoError | None) -> None:
        self.error = error
        self.done.set()

    async def cached_blocks(self) -> int:
        await asyncio.wait_for(self.done.wait(), DEADLINE_S)
        assert self.error is None
        usage = self.chunks[-1].usage
        assert usage is not None
        return usage.cached_tokens // BLOCK_TOKENS


class Host:
    """One worker on memory planes."""

    def __init__(self, plane: MemoryRequestPlane, worker: Worker, metrics: Metrics) -> None:
        self._plane = plane
        self._worker = worker
        self._metrics = metrics

    async def open(self, first: int, hints: BlockHints | None = None, max_tokens: int = 4) -> tuple[Reply, Call]:
        """Send a prompt that begins with a token of its own."""
        request = GenerateRequest(
            f"request-{first}",
            "tinylm",
            pack_tokens([first + position for position in range(PROMPT_BLOCKS * BLOCK_TOKENS + 2)]),
            sampling=SamplingOptions(temperature=0.0),
            stop=StopConditions(max_tokens=max_tokens, ignore_eos=True),
            block_hints=hints,
        )
        reply = Reply()
        options = CallOptions(request.request_id, None, credit_items=1024)
        payload = GENERATE_REQUEST.encode(request)
        return reply, await self._plane.open(self._worker.address, self._worker.endpoint, payload, reply, options)

    async def ask(self, first: int, hints: BlockHints | None = None) -> int:
        """Send a prompt and return how many of its blocks were found."""
        reply, _ = await self.open(first, hints)
        return await reply.cached_blocks()

    def blocks(self, name: str, tier: Tier) -> int:
        return int(self._metrics.registry.get_sample_value(f"dynamo_kvbm_{name}", {"tier": tier.value}) or 0)


@contextlib.asynccontextmanager
async def started(engine_args: list[str], **connector: object) -> AsyncGenerator[Host]:
    clock = SystemClock()
    metrics = Metrics()
    plane, discovery, bus = MemoryRequestPlane(clock=clock), MemoryDiscovery(), MemoryEventBus(clock=clock)
    context = ComponentContext(
        namespace="test",
        discovery=discovery,
        request_plane=plane,
        event_bus=bus,
        clock=clock,
        metrics=metrics,
        spawn=lambda work, name: asyncio.ensure_future(work),
        health=HealthBoard(),
        request_stop=lambda reason: None,
    )
    settings = WorkerSettings(canary_idle_s=0.0, kv_connector="kvbm", kv_connector_options=connector)
    worker = create_worker(context, settings, engine_args=engine_args)
    await plane.start()
    await worker.start()
    try:
        yield Host(plane, worker, metrics)
    finally:
        await worker.stop()
        for part in (plane, bus, discovery):
            await part.close()


async def test_the_blocks_of_an_ended_session_go_first() -> None:
    goes_on, unknown, ended = 100, 300, 500
    async with started(SMALL_DEVICE, host_blocks=9, eviction="hinted", offload="register", admission="always") as host:
        await host.ask(goes_on, BlockHints(next_turn_s=600.0))
        await host.ask(unknown)
        await host.ask(ended, BlockHints(session_ended=True))
        assert host.blocks("used_blocks", Tier.HOST) == 9
        await host.ask(700)
        assert [await host.ask(goes_on), await host.ask(unknown)] == [PROMPT_BLOCKS] * 2
        assert await host.ask(ended) == 0, "it was used last, and yet it made room"


async def test_a_tenant_s_scan_leaves_the_others_blocks() -> None:
    options = {"host_blocks": 9, "host_quotas": {"scan": 3}, "offload": "register", "admission": "always"}
    async with started(SMALL_DEVICE, **options) as host:
        await host.ask(100)
        for first in range(300, 1300, 200):
            await host.ask(first, BlockHints(tenant="scan"))
        assert await host.ask(100) == PROMPT_BLOCKS
        assert host.blocks("used_blocks", Tier.HOST) == 6


async def test_a_request_that_waited_finds_its_blocks_on_the_host(tmp_path: Path) -> None:
    one_at_a_time = ["--num-blocks", "128", "--max-model-len", "2048", "--max-num-seqs", "1"]
    options = {"host_blocks": 256, "disk_dir": str(tmp_path), "disk_blocks": 64, "model": "tinylm@1"}
    async with started(one_at_a_time, **options, offload="register", disk_offload="register") as host:
        await host.ask(100)
    async with started(one_at_a_time, **options, admission="always") as host:
        assert (host.blocks("used_blocks", Tier.DISK), host.blocks("used_blocks", Tier.HOST)) == (PROMPT_BLOCKS, 0)
        running, call = await host.open(900, max_tokens=1900)
        await asyncio.wait_for(running.started.wait(), DEADLINE_S)
        waiting, _ = await host.open(100)
        async with asyncio.timeout(DEADLINE_S):
            while host.blocks("used_blocks", Tier.HOST) < PROMPT_BLOCKS:
                await asyncio.sleep(0.005)
        assert not waiting.started.is_set()
        call.cancel()
        assert await waiting.cached_blocks() == PROMPT_BLOCKS
        assert host.blocks("onboarded_blocks_total", Tier.HOST) == PROMPT_BLOCKS
        assert host.blocks("onboarded_blocks_total", Tier.DISK) == PROMPT_BLOCKS, "read once, ahead of the pass"
