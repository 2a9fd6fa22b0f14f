"""One process's planes, and workers on them that publish and answer like real ones."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest

from dynamo_core.cards import ModelCard
from dynamo_core.clock import SystemClock
from dynamo_core.component import ComponentContext
from dynamo_core.discovery import Instance, ModelRecord
from dynamo_core.events import BlocksCleared, BlockStored, KvEventBatch
from dynamo_core.ids import EndpointId
from dynamo_core.memory import MemoryDiscovery, MemoryEventBus, MemoryRequestPlane
from dynamo_core.planes import KV_EVENTS, LOAD, Topic
from dynamo_core.telemetry import Metrics
from dynamo_core.tokens import BlockHasher, pack_tokens
from dynamo_core.wire import INSTANCE, KV_EVENT_BATCH, KV_EVENT_QUERY, MODEL_RECORD

ENDPOINT = EndpointId("ns", "backend", "generate")
QUERY = EndpointId("ns", "backend", "worker_kv_indexer_query")
CARD = ModelCard("m", kv_block_size=4)
PROMPT = pack_tokens(range(40))


class Fleet:
    """One process's planes, and workers that publish and answer like real ones."""

    def __init__(self):
        self.discovery = MemoryDiscovery()
        self.plane = MemoryRequestPlane()
        self.bus = MemoryEventBus()
        self.tasks = []
        self.failure = None
        self.queries = []
        self.context = ComponentContext(
            namespace="ns",
            discovery=self.discovery.peer(),
            request_plane=self.plane.peer(),
            event_bus=self.bus.peer(),
            metrics=Metrics(),
            clock=SystemClock(),
            spawn=self.spawn,
        )
        self.cache = {}

    def spawn(self, coroutine, *, name):
        task = asyncio.create_task(coroutine, name=name)
        self.tasks.append(task)
        return task

    async def start(self):
        for part in (self.discovery, self.plane, self.bus):
            await part.start()
        for part in (self.context.discovery, self.context.request_plane, self.context.event_bus):
            await part.start()
        self.events = await self.bus.publisher(Topic.of(KV_EVENTS, ENDPOINT))
        self.loads = await self.bus.publisher(Topic.of(LOAD, ENDPOINT))

    async def add(self, number, card=CARD, *, answers=True):
        if card is not None:
            record = ModelRecord(ENDPOINT, number, card)
            await self.discovery.put(record.key, MODEL_RECORD.encode(record))
        if answers:
            served = await self.plane.serve(QUERY, self.answer)
            query = Instance(QUERY, number, served.address)
            await self.discovery.put(query.key, INSTANCE.encode(query))
        instance = Instance(ENDPOINT, number, "mem://x")
        await self.discovery.put(instance.key, INSTANCE.encode(instance))
        return instance

    async def answer(self, payload, context, sink):
        query = KV_EVENT_QUERY.decode(payload)
        self.queries.append(query)
        if self.failure is not None:
            raise self.failure
        last, events = self.cache.get(query.worker, (0, ()))
        if query.first is None:
            batch = KvEventBatch(query.worker, (BlocksCleared(last), *events), 4, full_dump=True)
        else:
            batch = KvEventBatch(query.worker, events[query.first - 1 : query.last], 4)
        sink.send(KV_EVENT_BATCH.encode(batch))

    def publish(self, worker, *events, **fields):
        batch = KvEventBatch(worker, events, **{"block_size": 4, **fields})
        self.events.publish(KV_EVENT_BATCH.encode(batch))

    @staticmethod
    async def until(condition):
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.001)

    @staticmethod
    def stored(event_id, first=0, count=10):
        hashes = BlockHasher(4).hash_tokens(PROMPT)
        low, high = first * 8, (first + count) * 8
        parent = int.from_bytes(hashes.sequence[low - 8 : low], "little") if first else None
        return BlockStored(event_id, hashes.sequence[low:high], hashes.local[low:high], parent)


@asynccontextmanager
async def running_fleet():
    planes = Fleet()
    await planes.start()
    try:
        yield planes
    finally:
        for task in planes.tasks:
            task.cancel()
        await asyncio.gather(*planes.tasks, return_exceptions=True)
        for part in (planes.context.event_bus, planes.context.request_plane, planes.context.discovery):
            await part.close()
        for part in (planes.bus, planes.plane, planes.discovery):
            await part.close()


@pytest.fixture
async def planes():
    async with running_fleet() as fleet:
        yield fleet
