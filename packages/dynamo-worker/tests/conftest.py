"""One process on the memory planes and a fake clock, and an engine that does what a test tells it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

import pytest

from dynamo_core.component import ComponentContext, HealthBoard
from dynamo_core.discovery import INSTANCES_PREFIX, MODELS_PREFIX, Instance, ModelRecord
from dynamo_core.engine import ChunkSink, EngineConfig, EngineContext
from dynamo_core.enums import FinishReason
from dynamo_core.errors import DynamoError
from dynamo_core.events import EventEnvelope, KvEventBatch, KvEventQuery, SequenceGap
from dynamo_core.ids import EndpointId, InstanceId, WorkerId
from dynamo_core.memory import MemoryDiscovery, MemoryEventBus, MemoryRequestPlane
from dynamo_core.planes import Call, CallOptions, Subscription, Topic
from dynamo_core.requests import GenerateChunk, GenerateRequest, StopConditions
from dynamo_core.streams import call_unary
from dynamo_core.telemetry import Metrics
from dynamo_core.testing import FakeClock
from dynamo_core.tokens import pack_tokens, unpack_tokens
from dynamo_core.wire import GENERATE_CHUNK, GENERATE_REQUEST, INSTANCE, KV_EVENT_BATCH, KV_EVENT_QUERY, MODEL_RECORD
from dynamo_worker import Worker, WorkerSettings, create_worker

Script = Callable[[GenerateRequest, ChunkSink], None]


class Reply:
    """What a caller of ``generate`` has received so far."""

    def __init__(self, *, grant: bool = True) -> None:
        self.chunks: list[GenerateChunk] = []
        self.items = 0
        self.error: DynamoError | None = None
        self.done = asyncio.Event()
        self.call: Call | None = None
        self._grant = grant

    def on_items(self, items: Sequence[bytes]) -> None:
        self.items += len(items)
        self.chunks.extend(GENERATE_CHUNK.decode(item) for item in items)
        if self._grant and self.call is not None:
            self.call.grant(len(items))

    def on_end(self, error: DynamoError | None) -> None:
        self.error = error
        self.done.set()

    @property
    def tokens(self) -> list[int]:
        return [token for chunk in self.chunks for token in unpack_tokens(chunk.token_ids)]

    @property
    def finish(self) -> FinishReason | None:
        return self.chunks[-1].finish_reason if self.chunks else None

    def of_choice(self, choice: int) -> list[int]:
        return [token for chunk in self.chunks if chunk.choice == choice for token in unpack_tokens(chunk.token_ids)]


class ScriptedEngine:
    """Keeps every request's sink for the test to push to; ``script`` runs on submit."""

    def __init__(self, script: Script | None = None, config: EngineConfig | None = None) -> None:
        self.script = script
        self.config = config if config is not None else EngineConfig("scripted")
        self.sinks: dict[str, ChunkSink] = {}
        self.requests: dict[str, GenerateRequest] = {}
        self.aborted: list[str] = []
        self.drained = False
        self.cleanups = 0

    async def start(self, context: EngineContext) -> EngineConfig:
        return self.config

    def submit(self, request: GenerateRequest, sink: ChunkSink) -> None:
        self.requests[request.request_id] = request
        self.sinks[request.request_id] = sink
        if self.script is not None:
            self.script(request, sink)

    async def generate(self, request: GenerateRequest, context: Any) -> AsyncIterator[GenerateChunk]:
        raise AssertionError("the host prefers submit")
        yield GenerateChunk()

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    async def drain(self) -> None:
        self.drained = True

    async def cleanup(self) -> None:
        self.cleanups += 1

    def push(self, request_id: str, token: int, index: int, **rest: Any) -> None:
        self.sinks[request_id].push(GenerateChunk(pack_tokens([token]), index, **rest))

    def finish(self, request_id: str, index: int, reason: FinishReason = FinishReason.LENGTH) -> None:
        self.sinks[request_id].push(GenerateChunk(first_index=index, finish_reason=reason))


class Process:
    """A process with one or more workers."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.plane = MemoryRequestPlane(clock=self.clock)
        self.discovery = MemoryDiscovery()
        self.bus = MemoryEventBus(clock=self.clock)
        self.stop_requests: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.metrics = Metrics()
        self.context = ComponentContext(
            namespace="test",
            discovery=self.discovery,
            request_plane=self.plane,
            event_bus=self.bus,
            metrics=self.metrics,
            clock=self.clock,
            spawn=self._spawn,
            health=HealthBoard(),
            request_stop=self.stop_requests.append,
        )
        self.workers: list[Worker] = []

    async def worker(self, engine: Any, **settings: Any) -> Worker:
        """Start a worker around an engine; canaries are off unless asked for."""
        options = {"canary_idle_s": 0.0, **settings}
        worker = create_worker(self.context, WorkerSettings(**options), engine=engine)
        self.workers.append(worker)
        await worker.start()
        return worker

    async def close(self) -> None:
        for worker in self.workers:
            await worker.stop()
        for task in self.tasks:
            task.cancel()
        for result in await asyncio.gather(*self.tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result
        await self.plane.close()
        await self.bus.close()
        await self.discovery.close()

    def expect_deaths(self) -> int:
        """Let engines that have died so far not fail the process, and return how many there are."""
        deaths = [task for task in self.tasks if task.get_name().endswith(" death")]
        for task in deaths:
            self.tasks.remove(task)
            task.cancel()
        return len(deaths)

    async def open(
        self, request: GenerateRequest, *, credit: int = 256, grant: bool = True, deadline_s: float | None = None
    ) -> Reply:
        """Open a call to the first registered worker's generate endpoint."""
        reply = Reply(grant=grant)
        worker = self.workers[0]
        address = worker.address
        options = CallOptions(request.request_id, deadline_s, credit_items=credit)
        payload = GENERATE_REQUEST.encode(request)
        reply.call = await self.plane.open(address, worker.endpoint, payload, reply, options)
        await self.clock.settle()
        return reply

    async def ask(self, request: GenerateRequest, **options: Any) -> Reply:
        """Open a call and run the clock until it has ended."""
        reply = await self.open(request, **options)
        await self.clock.run(reply.done.wait())
        return reply

    async def instances(self) -> list[Instance]:
        return [INSTANCE.decode(record.value) for record in await self.discovery.list(INSTANCES_PREFIX)]

    async def models(self) -> list[ModelRecord]:
        return [MODEL_RECORD.decode(record.value) for record in await self.discovery.list(MODELS_PREFIX)]

    async def query(self, worker: WorkerId, first: int | None = None, last: int | None = None) -> KvEventBatch:
        (instance,) = [i for i in await self.instances() if i.endpoint.endpoint == "worker_kv_indexer_query"]
        payload = KV_EVENT_QUERY.encode(KvEventQuery(worker, first, last))
        item = await call_unary(self.plane, instance.address, instance.endpoint, payload)
        return KV_EVENT_BATCH.decode(item)

    async def subscribe(self, name: str, endpoint: EndpointId) -> Subscription:
        return await self.bus.subscribe(Topic.of(name, endpoint))

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    def _spawn(self, coroutine: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self.tasks.append(task)
        return task


def make_request(
    request_id: str = "r1", prompt: Sequence[int] = (1, 2, 3), *, max_tokens: int | None = 4, **rest: Any
) -> GenerateRequest:
    stop = rest.pop("stop", StopConditions(max_tokens=max_tokens))
    return GenerateRequest(request_id, "scripted", pack_tokens(prompt), stop=stop, **rest)


async def next_event(subscription: Subscription) -> EventEnvelope:
    event = await asyncio.wait_for(anext(aiter(subscription)), 5)
    assert not isinstance(event, SequenceGap)
    return event


class Kit:
    """Names that tests share, since test modules cannot import each other."""

    Process = Process
    Reply = Reply
    ScriptedEngine = ScriptedEngine
    request = staticmethod(make_request)
    next_event = staticmethod(next_event)
    instance_id = InstanceId(7)


@pytest.fixture
def kit() -> type[Kit]:
    return Kit


@pytest.fixture
async def process() -> AsyncIterator[Process]:
    made = Process()
    await made.discovery.start()
    await made.plane.start()
    await made.bus.start()
    yield made
    await made.close()
