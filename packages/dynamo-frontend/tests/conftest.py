"""A whole deployment in one process: memory planes, scripted workers, and a client without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httptools
import pytest
from tokenizers import Tokenizer

from dynamo_core import ComponentContext, EndpointId, ModelCard, SystemClock
from dynamo_core.cards import ModelRuntimeConfig
from dynamo_core.component import Health
from dynamo_core.discovery import Instance, Lease, ModelRecord
from dynamo_core.enums import FinishReason, HealthState
from dynamo_core.errors import DynamoError
from dynamo_core.memory import MemoryDiscovery, MemoryEventBus, MemoryRequestPlane
from dynamo_core.planes import RequestContext, ResponseSink
from dynamo_core.requests import GenerateChunk, GenerateRequest, TokenLogprob, TopLogprob, Usage
from dynamo_core.telemetry import Metrics
from dynamo_core.tokens import pack_tokens, unpack_tokens
from dynamo_core.wire import GENERATE_CHUNK, GENERATE_REQUEST, INSTANCE, MODEL_RECORD
from dynamo_frontend import Frontend, FrontendSettings
from dynamo_frontend._http.protocol import HttpProtocol

DATA = Path(__file__).parent / "data" / "tinylm"
ENDPOINT = EndpointId("test", "backend", "generate")
EOS = 2


@dataclass
class Script:
    """What a scripted worker answers, and how it breaks.

    ``crash_after`` counts tokens sent by all workers of the deployment; None never breaks.
    """

    output: list[int] = field(default_factory=list)
    per_chunk: int = 1
    crash_after: int | None = None
    fail_with: DynamoError | None = None
    before: Callable[[GenerateRequest], Awaitable[None]] | None = None
    sent: int = 0
    requests: list[GenerateRequest] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    stopped: int = 0
    raw: Callable[[GenerateRequest], Sequence[GenerateChunk]] | None = None


class ScriptedWorker:
    """Serves one endpoint by script."""

    def __init__(self, stack: Stack, instance_id: int) -> None:
        self.stack = stack
        self.instance_id = instance_id
        self.plane = stack.plane.peer()
        self.address = ""
        self.lease: Lease | None = None

    async def start(self, card: ModelCard) -> None:
        served = await self.plane.serve(ENDPOINT, self.handle, schema=GENERATE_REQUEST.schema)
        self.address = served.address
        self.lease = await self.stack.discovery.lease()
        instance = Instance(ENDPOINT, self.instance_id, served.address)
        record = ModelRecord(ENDPOINT, self.instance_id, card)
        await self.stack.discovery.put(instance.key, INSTANCE.encode(instance), lease=self.lease)
        await self.stack.discovery.put(record.key, MODEL_RECORD.encode(record), lease=self.lease)

    async def handle(self, payload: bytes, call: RequestContext, sink: ResponseSink) -> None:
        script = self.stack.script
        request = GENERATE_REQUEST.decode(payload)
        script.requests.append(request)
        script.headers.append(dict(call.headers))
        if script.fail_with is not None:
            error, script.fail_with = script.fail_with, None
            raise error
        if script.before is not None:
            await script.before(request)
        if script.raw is not None:
            for chunk in script.raw(request):
                sink.send(GENERATE_CHUNK.encode(chunk))
            return
        try:
            await self._play(request, call, sink)
        except asyncio.CancelledError:
            script.stopped += 1
            raise

    async def _play(self, request: GenerateRequest, call: RequestContext, sink: ResponseSink) -> None:
        script = self.stack.script
        limit = request.stop.max_tokens or 1 << 20
        output = script.output[:limit]
        reason = FinishReason.LENGTH if len(script.output) >= limit else FinishReason.EOS
        position = request.accepted_tokens
        prompt = request.prompt_tokens or len(unpack_tokens(request.token_ids))
        while True:
            await sink.wait_credit()
            if call.stopped:
                script.stopped += 1
                return
            batch = output[position : position + script.per_chunk]
            last = position + len(batch) >= len(output)
            for choice in range(request.sampling.n):
                final = last and choice == request.sampling.n - 1
                sink.send(
                    GENERATE_CHUNK.encode(self._chunk(request, choice, position, batch, prompt, last, final, reason))
                )
            position += len(batch)
            script.sent += len(batch)
            if script.crash_after is not None and script.sent >= script.crash_after:
                script.crash_after = None
                await asyncio.sleep(0)
                self.stack.plane.sever(self.address)
                await asyncio.Event().wait()
            if last:
                return
            await asyncio.sleep(0)

    def _chunk(self, request, choice, position, batch, prompt, last, final, reason) -> GenerateChunk:
        logprobs = ()
        if request.output.logprobs is not None:
            logprobs = tuple(
                TokenLogprob(token, -0.5 - token / 1000, (TopLogprob(token, -0.5 - token / 1000), TopLogprob(5, -3.0)))
                for token in batch
            )
        total = len(self.stack.script.output[: request.stop.max_tokens]) * request.sampling.n
        return GenerateChunk(
            token_ids=pack_tokens(batch),
            first_index=position,
            choice=choice,
            attempt=request.attempt,
            finish_reason=reason if last else None,
            stop_token_id=EOS if last and reason is FinishReason.EOS else None,
            usage=Usage(prompt, total, 7) if final else None,
            logprobs=logprobs,
        )


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """Data of all server-sent events; ``[DONE]`` stays text."""
        found = []
        for event in self.body.decode().split("\n\n"):
            for line in event.splitlines():
                if line.startswith("data: "):
                    data = line[6:]
                    found.append(data if data == "[DONE]" else json.loads(data))
        return found


class FakeTransport(asyncio.Transport):
    """A connection without a socket: what is written is parsed as responses."""

    def __init__(self) -> None:
        super().__init__()
        self.protocol: HttpProtocol | None = None
        self.written = bytearray()
        self.writes: list[bytes] = []
        self.closed = False
        self.aborted = False
        self.reading_paused = False
        self.replies: list[Reply] = []
        self.changed = asyncio.Event()
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[str, str] = {}
        self._body = bytearray()

    def set_write_buffer_limits(self, high=None, low=None) -> None:
        pass

    def get_extra_info(self, name, default=None):
        return default

    def write(self, data: bytes) -> None:
        self.written += data
        self.writes.append(bytes(data))
        self._parser.feed_data(data)
        self.changed.set()

    def pause_reading(self) -> None:
        self.reading_paused = True

    def resume_reading(self) -> None:
        self.reading_paused = False

    def close(self) -> None:
        self._lose()

    def abort(self) -> None:
        self.aborted = True
        self._lose()

    def is_closing(self) -> bool:
        return self.closed

    def _lose(self) -> None:
        if not self.closed:
            self.closed = True
            self.changed.set()
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    def on_message_begin(self) -> None:
        self._headers = {}
        self._body = bytearray()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode().lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() != 100:
            self.replies.append(Reply(self._parser.get_status_code(), self._headers, bytes(self._body)))

    async def wait(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


def raw_request(method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> bytes:
    lines = {"host": "test", **({"content-length": str(len(body))} if body else {}), **(headers or {})}
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items()) + "\r\n"
    return head.encode() + body


class Stack:
    """The deployment."""

    def __init__(self) -> None:
        self.plane = MemoryRequestPlane()
        self.discovery = MemoryDiscovery()
        self.bus = MemoryEventBus()
        self.script = Script()
        self.tokenizer = Tokenizer.from_file(str(DATA / "tokenizer.json"))
        self.workers: list[ScriptedWorker] = []
        self.frontend: Frontend | None = None
        self.tasks: list[asyncio.Task[None]] = []
        self.context: ComponentContext | None = None
        self.card = ModelCard(
            "tiny",
            model_path=str(DATA),
            context_length=4096,
            kv_block_size=16,
            aliases=("tiny-alias",),
            eos_token_ids=(EOS, 0),
            runtime_config=ModelRuntimeConfig(tool_call_parser="hermes", reasoning_parser="basic"),
        )

    def say(self, text: str) -> None:
        self.script.output = self.tokenizer.encode(text, add_special_tokens=False).ids

    def spawn(self, coroutine, *, name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self.tasks.append(task)
        return task

    async def start(self, *, workers: int = 1, **settings: Any) -> None:
        self.context = ComponentContext(
            "test", self.discovery, self.plane, self.bus, Metrics(), SystemClock(), self.spawn
        )
        self.context.health.register("test", lambda: Health(HealthState.READY))
        options = {"router": "round-robin", "http_port": 0, **settings}
        self.frontend = Frontend(self.context, FrontendSettings(**options))
        await self.frontend.start()
        for index in range(workers):
            await self.add_worker(index + 1)
        if workers:
            await self.ready()

    async def add_worker(self, instance_id: int, card: ModelCard | None = None) -> ScriptedWorker:
        worker = ScriptedWorker(self, instance_id)
        await worker.start(card or self.card)
        self.workers.append(worker)
        return worker

    async def ready(self, model: str = "tiny") -> None:
        async with asyncio.timeout(20):
            while model not in (await self.get("/ready")).json["models"]:
                await asyncio.sleep(0)

    async def stop(self) -> None:
        if self.frontend is not None:
            await self.frontend.drain(5.0)
            await self.frontend.stop()
        for worker in self.workers:
            await worker.plane.close()
        await self.plane.close()
        await self.discovery.close()
        await self.bus.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    def connect(self) -> FakeTransport:
        assert self.frontend is not None
        transport = FakeTransport()
        transport.protocol = self.frontend.server.new_connection()
        transport.protocol.connection_made(transport)
        return transport

    async def send(self, raw: bytes) -> Reply:
        transport = self.connect()
        transport.protocol.data_received(raw)
        await transport.wait(lambda: bool(transport.replies) or transport.closed)
        transport.protocol.close()
        await asyncio.sleep(0)
        return transport.replies[0]

    async def get(self, path: str) -> Reply:
        return await self.send(raw_request("GET", path))

    async def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Reply:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.send(raw_request("POST", path, data, headers))

    async def chat(self, content: str = "Hello", **fields: Any) -> Reply:
        body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "temperature": 0, **fields}
        return await self.post("/v1/chat/completions", body)

    async def complete(self, prompt: Any = "Hello", **fields: Any) -> Reply:
        body = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 100, **fields}
        return await self.post("/v1/completions", body)


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    found = Stack()
    yield found
    await found.stop()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DATA / "tokenizer.json"))


@pytest.fixture
def request_bytes() -> Callable[..., bytes]:
    return raw_request
