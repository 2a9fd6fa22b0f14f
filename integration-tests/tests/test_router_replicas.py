"""Router replicas over real sockets: they count each other's bookings, and one that replaces another begins warm."""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from dynamo_core import plugins
from dynamo_core.cards import ModelCard
from dynamo_core.clock import SystemClock
from dynamo_core.component import ComponentContext
from dynamo_core.discovery import Instance, ModelRecord
from dynamo_core.events import BlockRemoved, BlocksCleared, BlockStored, KvEvent, KvEventBatch
from dynamo_core.ids import EndpointId, WorkerId
from dynamo_core.planes import KV_EVENTS, Publisher, RequestContext, ResponseSink, Topic
from dynamo_core.routing import RequestOutcome, RouterScope, RoutingRequest
from dynamo_core.telemetry import Metrics
from dynamo_core.tokens import chain_hashes, pack_hashes
from dynamo_core.wire import INSTANCE, KV_EVENT_BATCH, KV_EVENT_QUERY, MODEL_RECORD

ENDPOINT = EndpointId("ns", "backend", "generate")
QUERY = EndpointId("ns", "backend", "worker_kv_indexer_query")
CARD = ModelCard("m", kv_block_size=16)
SESSIONS, BLOCKS = 48, 24
WINDOW = 240


@asynccontextmanager
async def process(folder: Path) -> AsyncGenerator[ComponentContext]:
    """The planes of one process: files for discovery, TCP for requests, ZMQ for events."""
    clock, tasks = SystemClock(), list[asyncio.Task[None]]()
    discovery = plugins.load("discoveries", "file")(f"file://{folder}", clock=clock, options={})
    plane = plugins.load("request_planes", "tcp")("tcp://127.0.0.1:0", clock=clock, options={})
    await discovery.start()
    await plane.start()
    bus = plugins.load("event_buses", "zmq")("zmq://127.0.0.1:0", discovery=discovery, clock=clock, options={})
    await bus.start()

    def spawn(work: Coroutine[Any, Any, None], /, *, name: str) -> asyncio.Task[None]:
        tasks.append(asyncio.create_task(work, name=name))
        return tasks[-1]

    try:
        yield ComponentContext("ns", discovery, plane, bus, Metrics(), clock, spawn)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for part in (bus, plane, discovery):
            await part.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


class Worker:
    """A worker's cache: a few sessions' prompts, the least recently used one evicted whole."""

    def __init__(self, number: int, publisher: Publisher) -> None:
        self.worker = WorkerId(number)
        self.last_id = 0
        self._publisher = publisher
        self._kept: OrderedDict[int, list[int]] = OrderedDict()

    def serve(self, session: int, local: list[int]) -> int:
        """Compute a prompt; returns how many of its blocks were cached."""
        cached = len(self._kept.get(session, ()))
        self._kept[session] = chain_hashes(local)
        self._kept.move_to_end(session)
        if not cached:
            self._publish(lambda number: stored(number, local))
        if len(self._kept) > 20:
            _, gone = self._kept.popitem(last=False)
            self._publish(lambda number: BlockRemoved(number, pack_hashes(gone)))
        return cached

    def dump(self) -> KvEventBatch:
        events = [stored(self.last_id, local_blocks(session)) for session in self._kept]
        return KvEventBatch(self.worker, (BlocksCleared(self.last_id), *events), 16, full_dump=True)

    def _publish(self, make: Callable[[int], KvEvent]) -> None:
        self.last_id += 1
        self._publisher.publish(KV_EVENT_BATCH.encode(KvEventBatch(self.worker, (make(self.last_id),), 16)))


def local_blocks(session: int) -> list[int]:
    return [session << 32 | position for position in range(1, BLOCKS + 1)]


def stored(number: int, local: list[int]) -> BlockStored:
    return BlockStored(number, pack_hashes(chain_hashes(local)), pack_hashes(local))


async def start_workers(context: ComponentContext, count: int) -> dict[WorkerId, Worker]:
    publisher = await context.event_bus.publisher(Topic.of(KV_EVENTS, ENDPOINT))
    workers = {WorkerId(number): Worker(number, publisher) for number in range(1, count + 1)}

    async def answer(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        sink.send(KV_EVENT_BATCH.encode(workers[KV_EVENT_QUERY.decode(payload).worker].dump()))

    served = await context.request_plane.serve(QUERY, answer)
    for worker in workers:
        record = ModelRecord(ENDPOINT, worker.instance_id, CARD)
        query = Instance(QUERY, worker.instance_id, served.address)
        instance = Instance(ENDPOINT, worker.instance_id, "tcp://127.0.0.1:1")
        await context.discovery.put(record.key, MODEL_RECORD.encode(record))
        await context.discovery.put(query.key, INSTANCE.encode(query))
        await context.discovery.put(instance.key, INSTANCE.encode(instance))
    return workers


@asynccontextmanager
async def router(context: ComponentContext, workers: int) -> AsyncGenerator[Any]:
    made = plugins.load("routers", "kv")(context, RouterScope(ENDPOINT, CARD, "kv", {"replica_sync": True}))
    await made.start()
    try:
        await until(lambda: len(made.workers()) == workers)
        await until(lambda: all(mode.value == "exact" for mode in made.index_modes().values()))
        yield made
    finally:
        await made.stop()


async def hit_rate(made: Any, workers: dict[WorkerId, Worker], rng: random.Random, requests: int) -> float:
    """Send requests of random sessions through a router; returns the share of blocks that were cached."""
    hits = 0
    for _ in range(requests):
        session = rng.randrange(SESSIONS)
        local = local_blocks(session)
        request = RoutingRequest("r", block_size=16, prompt_tokens=16 * BLOCKS, local_hashes=pack_hashes(local))
        decision = await made.select(request)
        hits += workers[decision.worker].serve(session, local)
        made.first_token(decision.reservation)
        made.complete(decision.reservation, RequestOutcome(decision.decision_id))
        await until(lambda: made.indexer.stream(decision.worker).last_id == workers[decision.worker].last_id)  # noqa: B023 - awaited before the next turn
    return hits / (requests * BLOCKS)


async def test_a_replaced_replica_begins_warm(tmp_path: Path) -> None:
    rng = random.Random(1)
    async with process(tmp_path) as fleet:
        workers = await start_workers(fleet, 4)
        async with process(tmp_path) as first, router(first, 4) as old:
            await hit_rate(old, workers, rng, WINDOW)
            before = await hit_rate(old, workers, rng, WINDOW)
        async with process(tmp_path) as second, router(second, 4) as new:
            after = await hit_rate(new, workers, rng, WINDOW)
    assert before > 0.9
    assert after > before - 0.02


async def test_replicas_count_each_other_over_real_sockets(tmp_path: Path) -> None:
    async with process(tmp_path) as fleet:
        await start_workers(fleet, 2)
        async with process(tmp_path) as one, process(tmp_path) as two, router(one, 2) as left:
            request = RoutingRequest("r", block_size=16, prompt_tokens=64, local_hashes=pack_hashes(local_blocks(1)))
            early = await left.select(request)
            async with router(two, 2) as right:
                await until(lambda: sum(load.projected.active_requests for load in right.loads()) == 1)
                late = await right.select(request)
                await until(lambda: left.loads() == right.loads())
                left.complete(early.reservation, RequestOutcome(early.decision_id))
                right.complete(late.reservation, RequestOutcome(late.decision_id))
                await until(lambda: all(load.projected.active_requests == 0 for load in left.loads() + right.loads()))
