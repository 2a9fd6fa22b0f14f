"""A worker process whose engine fails: the right error class, others unharmed, out of discovery if it cannot serve."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncGenerator, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from dynamo_core import plugins
from dynamo_core.clock import SystemClock
from dynamo_core.discovery import INSTANCES_PREFIX, Discovery, Instance
from dynamo_core.errors import BackendProtocolError, DeadlineExceededError, DynamoError, InternalError
from dynamo_core.planes import RequestPlane
from dynamo_core.requests import GenerateRequest, SamplingOptions, StopConditions
from dynamo_core.streams import open_stream
from dynamo_core.tokens import pack_tokens, unpack_tokens
from dynamo_core.wire import GENERATE_CHUNK, GENERATE_REQUEST, INSTANCE
from dynamo_integration_tests.stack import DynamoProcess

ENGINE = '''
"""The reference engine, but for requests whose name asks for a fault behind their fourth chunk."""

import asyncio

import msgspec

from dynamo_core.tokens import pack_tokens
from dynamo_worker import ReferenceEngine


class Faulty:
    def __init__(self, inner):
        self._inner = inner
        self._is_hanging = False
        for name in ("start", "abort", "drain", "cleanup"):
            setattr(self, name, getattr(inner, name))

    start = abort = drain = cleanup = None  # set for each object

    @classmethod
    def from_args(cls, args):
        return cls(ReferenceEngine.from_args(args))

    async def generate(self, request, context):
        fault, count = request.request_id.partition("-")[0], 0
        async for chunk in self._inner.generate(request, context):
            count += 1
            if fault == "hang" and count == 4:
                self._is_hanging = True
            if self._is_hanging:
                await asyncio.Event().wait()
            if count == 4 and fault == "memory":
                raise MemoryError("out of KV memory")
            if count == 4 and fault == "end":
                return
            yield BROKEN.get(fault if count == 4 else "", lambda chunk: chunk)(chunk)


BROKEN = {
    "negative": lambda chunk: msgspec.structs.replace(chunk, token_ids=(-1).to_bytes(4, "little", signed=True)),
    "index": lambda chunk: msgspec.structs.replace(chunk, first_index=chunk.first_index + 2),
    "choice": lambda chunk: msgspec.structs.replace(chunk, choice=1),
    "count": lambda chunk: msgspec.structs.replace(chunk, token_ids=pack_tokens([5] * 5000)),
}
'''
LIMITS = ("--stall-timeout-s", "1", "--probe-timeout-s", "1", "--lease-ttl-s", "2")
PLANE = "tcp://127.0.0.1:0?keepalive_interval_s=1&keepalive_timeout_s=1"
PATIENCE_S = 30.0


class Stack:
    """A worker with the faulty engine, and what a caller needs to reach it."""

    def __init__(self, process: DynamoProcess, discovery: Discovery, plane: RequestPlane) -> None:
        self.process = process
        self._discovery = discovery
        self._plane = plane

    async def instances(self) -> list[Instance]:
        """What discovery knows of the worker's generate endpoint."""
        found = [INSTANCE.decode(record.value) for record in await self._discovery.list(INSTANCES_PREFIX)]
        return [instance for instance in found if instance.endpoint.endpoint == "generate"]

    async def until_instances(self, count: int) -> None:
        """Wait until discovery knows so many."""
        async with asyncio.timeout(PATIENCE_S):
            while len(await self.instances()) != count:
                await asyncio.sleep(0.05)

    async def ask(self, instance: Instance, name: str, *, max_tokens: int = 40) -> list[int]:
        """Return the tokens of a request; raises what it ends with."""
        request = GenerateRequest(
            name,
            "tinylm",
            pack_tokens(range(100, 140)),
            sampling=SamplingOptions(temperature=0.0),
            stop=StopConditions(max_tokens=max_tokens, ignore_eos=True),
        )
        payload = GENERATE_REQUEST.encode(request)
        tokens: list[int] = []
        async with asyncio.timeout(PATIENCE_S):
            stream = await open_stream(self._plane, instance.address, instance.endpoint, payload)
            async with stream:
                async for item in stream:
                    tokens.extend(unpack_tokens(GENERATE_CHUNK.decode(item).token_ids))
        return tokens

    async def error(self, instance: Instance, name: str, *, max_tokens: int = 40) -> DynamoError:
        """Return the error that a request ends with."""
        with pytest.raises(DynamoError) as caught:
            await self.ask(instance, name, max_tokens=max_tokens)
        return caught.value


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the faulty engine as an installed distribution would."""
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "faulty_engine.py").write_text(ENGINE, encoding="utf-8")
    info = folder / "faulty_engine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty-engine\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[dynamo_core.engines]\nfaulty = faulty_engine:Faulty\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def shared(plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, DynamoProcess]]:
    """A worker for the faults that it survives, with the folder of its discovery."""
    folder = tmp_path_factory.mktemp("discovery")
    with started(folder, plugin) as process:
        yield folder, process


@contextlib.contextmanager
def started(folder: Path, plugin: Path) -> Generator[DynamoProcess]:
    planes = ["--discovery", f"file://{folder}", "--request-plane", PLANE, "--event-bus", "zmq://127.0.0.1:0"]
    flags = ["worker", *planes, "--engine", "faulty", *LIMITS]
    with DynamoProcess(flags, env={"PYTHONPATH": str(plugin)}) as process:
        process.wait_for("worker ready")
        yield process


@contextlib.asynccontextmanager
async def connected(folder: Path, process: DynamoProcess) -> AsyncGenerator[Stack]:
    clock = SystemClock()
    plane: Any = plugins.load("request_planes", "tcp")(PLANE, clock=clock, options={})
    discovery: Any = plugins.load("discoveries", "file")(f"file://{folder}", clock=clock, options={})
    await plane.start()
    await discovery.start()
    try:
        yield Stack(process, discovery, plane)
    finally:
        await discovery.close()
        await plane.close()


@pytest.mark.parametrize(
    ("fault", "kind", "reason"),
    [
        ("memory", InternalError, "backend.unknown"),
        ("negative", BackendProtocolError, "backend.protocol"),
        ("index", BackendProtocolError, "backend.protocol"),
        ("choice", BackendProtocolError, "backend.protocol"),
        ("count", BackendProtocolError, "backend.protocol"),
        ("end", BackendProtocolError, "backend.stream_incomplete"),
    ],
)
async def test_a_fault_of_one_request_ends_that_request_only(
    shared: tuple[Path, DynamoProcess], fault: str, kind: type[DynamoError], reason: str
) -> None:
    async with connected(*shared) as stack:
        [instance] = await stack.instances()
        alone = await stack.ask(instance, "alone")
        error, unharmed = await asyncio.gather(stack.error(instance, f"{fault}-1"), stack.ask(instance, "fine"))
        assert isinstance(error, kind)
        assert error.reason == reason
        assert unharmed == alone
        assert await stack.ask(instance, "after") == alone
        assert await stack.instances() == [instance]


async def test_an_engine_that_stops_yielding_leaves_discovery(plugin: Path, tmp_path: Path) -> None:
    with started(tmp_path, plugin) as process:
        async with connected(tmp_path, process) as stack:
            [instance] = await stack.instances()
            error = await stack.error(instance, "hang-1")
            assert isinstance(error, DeadlineExceededError)
            assert error.reason == "backend.response_timeout"
            await stack.until_instances(0)
            assert await asyncio.to_thread(process.wait) == 1, "it ends by itself, to be started anew"
            assert "dynamo: error: the engine is dead" in process.output.splitlines()[-1]


async def test_a_stopped_process_leaves_discovery_and_comes_back(plugin: Path, tmp_path: Path) -> None:
    with started(tmp_path, plugin) as process:
        async with connected(tmp_path, process) as stack:
            [instance] = await stack.instances()
            running = asyncio.create_task(stack.error(instance, "fine", max_tokens=3000))
            await asyncio.sleep(0)
            expected = await stack.ask(instance, "before")
            process.send_signal(signal.SIGSTOP)
            error = await running
            assert error.reason == "transport.disconnected"
            assert error.migratable
            await stack.until_instances(0)
            process.send_signal(signal.SIGCONT)
            await stack.until_instances(1)
            [again] = await stack.instances()
            assert await stack.ask(again, "after") == expected


async def test_a_killed_process_leaves_discovery_and_another_goes_on(plugin: Path, tmp_path: Path) -> None:
    with started(tmp_path, plugin) as process:
        async with connected(tmp_path, process) as stack:
            [lost] = await stack.instances()
            with started(tmp_path, plugin):
                await stack.until_instances(2)
                [left] = [instance for instance in await stack.instances() if instance != lost]
                running = asyncio.create_task(stack.error(lost, "fine", max_tokens=3000))
                unharmed = asyncio.create_task(stack.ask(left, "beside", max_tokens=400))
                expected = await stack.ask(lost, "before", max_tokens=400)
                process.kill()
                error = await running
                assert error.reason == "transport.disconnected"
                assert error.migratable
                assert await unharmed == expected
                await stack.until_instances(1)
                assert await stack.instances() == [left]
