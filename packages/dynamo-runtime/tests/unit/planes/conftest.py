"""All tests of the planes run on asyncio's loop and on uvloop's.

It is long because pytest finds the fixtures of a folder in one file.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import resource
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
import pytest
import pytest_asyncio
import trustme
import uvloop
from hypothesis import strategies as st

from dynamo_core.clock import SystemClock
from dynamo_core.ids import EndpointId
from dynamo_core.planes import RequestContext, RequestHandler, ResponseSink
from dynamo_runtime._plane.options import PlaneOptions
from dynamo_runtime._plane.plane import TcpRequestPlane

CHILD = Path(__file__).with_name("child.py")


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"asyncio": asyncio.new_event_loop, "uvloop": UvLoop}


class UvLoop(uvloop.Loop):
    """uvloop, whose ``close`` returns though warnings are errors.

    It warns of each handle that a failed test left open. Where the warning is an error, the handle stays open, and
    ``close`` waits for it for ever.
    """

    def close(self) -> None:
        """Close the loop with all that is open."""
        with warnings.catch_warnings():
            warnings.simplefilter("default", ResourceWarning)
            super().close()


class Child:
    """A process that runs one of the programs in ``child.py``."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def line(self) -> str:
        """Return the next line it says."""
        assert self.process.stdout is not None
        text = await asyncio.wait_for(self.process.stdout.readline(), 20)
        return text.decode().strip()

    def tell(self, text: str) -> None:
        """Write a line to it."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() + b"\n")


Spawn = Callable[..., Awaitable[Child]]


@pytest_asyncio.fixture
async def spawn() -> AsyncIterator[Spawn]:
    """Start programs of ``child.py``; those that still run at the end are killed."""
    children: list[Child] = []

    async def start(*arguments: object) -> Child:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(CHILD),
            *map(str, arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        children.append(Child(process))
        return children[-1]

    yield start
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            child.process.kill()
        await child.process.communicate()


@pytest.fixture
def until() -> Callable[[Callable[[], object]], Awaitable[None]]:
    """Wait for a condition, at most 20 s."""

    async def wait(condition: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.005)

    return wait


@pytest.fixture
def planes() -> Callable[..., AbstractAsyncContextManager[tuple[TcpRequestPlane, TcpRequestPlane, str]]]:
    """Open a TCP plane that serves ``test.backend.generate``, one that calls, and yield them with the address."""
    return _planes


@pytest.fixture
def dial() -> Callable[[str], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]:
    """Open a socket to a ``tcp://`` address."""
    return _dial


@pytest.fixture
def send_and_read() -> Callable[[str, bytes], Awaitable[bytes]]:
    """Send bytes on a socket of its own and return all that comes back until the server closes."""
    return _send_and_read


@asynccontextmanager
async def _planes(
    handler: RequestHandler | None = None, **options: Any
) -> AsyncIterator[tuple[TcpRequestPlane, TcpRequestPlane, str]]:
    server, client = (
        TcpRequestPlane("tcp://127.0.0.1:0", clock=SystemClock(), options=PlaneOptions(**options)) for _ in range(2)
    )
    await server.start()
    await client.start()
    try:
        served = await server.serve(EndpointId("test", "backend", "generate"), handler or _echo)
        yield server, client, served.address
    finally:
        await client.close()
        await server.close()


async def _echo(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
    sink.send(payload)


async def _dial(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def _send_and_read(address: str, data: bytes) -> bytes:
    reader, writer = await _dial(address)
    writer.write(data)
    try:
        async with asyncio.timeout(10):
            return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


Hostile = Callable[[list[bytes]], list[bytes]]


@pytest.fixture
def hostile() -> Hostile:
    """Make what an enemy might send: any bytes, and well-formed messages cut, damaged, doubled or mixed."""
    number = secrets.randbelow(1 << 32)
    print(f"seed {number}")
    return functools.partial(_hostile, number)


def _hostile(number: int, well_formed: list[bytes], count: int = 80) -> list[bytes]:
    found: list[bytes] = []

    @hypothesis.seed(number)
    @hypothesis.settings(max_examples=count, deadline=None, database=None, phases=[hypothesis.Phase.generate])
    @hypothesis.given(st.data())
    def collect(data: st.DataObject) -> None:
        found.append(data.draw(st.binary(max_size=400) | _damaged(well_formed)))

    collect()
    return found


@st.composite
def _damaged(draw: st.DrawFn, well_formed: list[bytes]) -> bytes:
    body = bytearray(b"".join(draw(st.lists(st.sampled_from(well_formed), min_size=1, max_size=3))))
    for _ in range(draw(st.integers(0, 4))):
        body[draw(st.integers(0, len(body) - 1))] = draw(st.integers(0, 255))
    return bytes(body[: draw(st.just(len(body)) | st.integers(0, len(body)))])


@pytest.fixture
def flat_memory() -> Callable[[], AbstractContextManager[None]]:
    """Hold that what runs within grows this process by no more than 48 MiB."""
    return _flat_memory


@contextmanager
def _flat_memory() -> Iterator[None]:
    before = _resident_bytes()
    yield
    assert _resident_bytes() - before < 48 << 20


def _resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Proxy:
    """A TCP proxy before a server, that delays, drops or resets what passes.

    Attributes:
        port: Where it listens.
        delay_s: Wait before each piece that passes.
        held: Pieces that had to wait because of ``cut``.
    """

    def __init__(self, target: int) -> None:
        self.port = 0
        self.delay_s = 0.0
        self.held = 0
        self._target = target
        self._open = asyncio.Event()
        self._open.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Let nothing pass, and tell nobody: what is sent waits, as behind a cable that was pulled."""
        self._open.clear()

    def heal(self) -> None:
        """Let everything pass again."""
        self._open.set()

    def reset(self) -> None:
        """Reset every connection; new ones are accepted."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def close(self) -> None:
        """Stop."""
        if self._server is not None:
            self._server.close()
        self.heal()
        await asyncio.sleep(0)
        self.reset()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        await self._open.wait()
        try:
            onward = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers.add(onward[1])
        for source, sink in ((reader, onward[1]), (onward[0], writer)):
            task = asyncio.get_running_loop().create_task(self._pass(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                self.held += not self._open.is_set()
                await self._open.wait()
                await asyncio.sleep(self.delay_s)
                sink.write(data)
        self._writers.discard(sink)
        sink.transport.abort()


@pytest_asyncio.fixture
async def proxy() -> AsyncIterator[Callable[[int], Awaitable[Proxy]]]:
    """Put proxies before ports."""
    made: list[Proxy] = []

    async def start(target: int) -> Proxy:
        made.append(Proxy(target))
        await made[-1].start()
        return made[-1]

    yield start
    for each in made:
        await each.close()


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A certificate authority."""
    return Authority(tmp_path_factory.mktemp("authority"))


class Authority:
    """A certificate authority and the files of what it issues."""

    def __init__(self, folder: Path) -> None:
        self._authority = trustme.CA()
        self._folder = folder
        self.ca_file = folder / "ca.pem"
        self._authority.cert_pem.write_to_path(str(self.ca_file))

    def issue(self, *names: str, to: str) -> tuple[Path, Path]:
        """Write a certificate for names and its key; return both files. A second one of that file name replaces it."""
        certificate, key = self._folder / f"{to}.pem", self._folder / f"{to}.key"
        issued = self._authority.issue_cert(*names)
        issued.private_key_pem.write_to_path(str(key))
        certificate.write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
        return certificate, key


class Server:
    """A real server of Debian's packages on a loopback port of its own, to kill and to start again.

    Args:
        program: Its command; a missing one fails the test.
        folder: Where it keeps its data and its log.

    Attributes:
        ready: What it says once it serves.
    """

    ready = ""

    def __init__(self, program: str, folder: Path) -> None:
        self.folder = folder
        self.port = _free_port()
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def host_port(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    def arguments(self) -> list[str]:
        """Its flags."""
        raise AssertionError("a server must say its flags")

    def start(self) -> None:
        """Start it and wait until it says that it is ready."""
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen([self._program, *self.arguments()], stdout=log, stderr=log)
        give_up_at = time.monotonic() + 20
        while self.ready not in (said := (self.folder / "log").read_text()):
            assert self._process.poll() is None, said
            assert time.monotonic() < give_up_at, said
            time.sleep(0.01)

    def signal(self, number: int) -> None:
        """Send it a signal; one that stops it has stopped all its threads when this returns."""
        assert self._process is not None
        self._process.send_signal(number)
        if number == signal.SIGSTOP:
            give_up_at = time.monotonic() + 20
            while not _stopped(self._process.pid):
                assert time.monotonic() < give_up_at
                time.sleep(0.001)

    def kill(self) -> None:
        """Kill it. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def wipe(self) -> None:
        """Delete its data."""
        shutil.rmtree(self.folder / "data", ignore_errors=True)


class EtcdServer(Server):
    """An etcd of one member."""

    ready = "ready to serve client requests"
    extra: tuple[str, ...] = ()
    scheme = "http"

    def __init__(self, folder: Path) -> None:
        super().__init__("etcd", folder)

    def arguments(self) -> list[str]:
        """Serve clients on the port, with no peers."""
        client = f"{self.scheme}://{self.host_port}"
        return [
            *("--data-dir", str(self.folder / "data"), "--name", "test"),
            *("--listen-client-urls", client, "--advertise-client-urls", client),
            *("--listen-peer-urls", "http://127.0.0.1:0", "--initial-advertise-peer-urls", "http://127.0.0.1:1"),
            *("--initial-cluster", "test=http://127.0.0.1:1", *self.extra),
        ]

    def control(self, *arguments: str) -> str:
        """Run ``etcdctl``, the operators' command."""
        command = ["etcdctl", "--endpoints", self.host_port, *arguments]
        done = subprocess.run(command, capture_output=True, env={"ETCDCTL_API": "3", "PATH": "/usr/bin"}, check=True)
        return done.stdout.decode()


class NatsServer(Server):
    """A NATS server."""

    ready = "Server is ready"
    extra: tuple[str, ...] = ()

    def __init__(self, folder: Path) -> None:
        super().__init__("nats-server", folder)

    def arguments(self) -> list[str]:
        """Serve clients on the port."""
        return ["-a", "127.0.0.1", "-p", str(self.port), *self.extra]


@pytest.fixture(scope="session")
def shared_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """An etcd for tests that leave it running."""
    yield from _running(EtcdServer(tmp_path_factory.mktemp("etcd")))


@pytest.fixture
def own_etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    """An etcd for one test, to do anything with."""
    folder = tmp_path / "etcd"
    folder.mkdir()
    yield from _running(EtcdServer(folder))


@pytest.fixture(scope="session")
def shared_nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A NATS server for tests that leave it running."""
    yield from _running(NatsServer(tmp_path_factory.mktemp("nats")))


@pytest.fixture
def own_nats(tmp_path: Path) -> Iterator[NatsServer]:
    """A NATS server for one test, to do anything with."""
    folder = tmp_path / "nats"
    folder.mkdir()
    yield from _running(NatsServer(folder))


ServerT = TypeVar("ServerT", bound=Server)


def _running(server: ServerT) -> Iterator[ServerT]:
    server.start()
    yield server
    server.kill()


def _free_port() -> int:
    """Return a port that nobody has, below the kernel's own: a client that redials one of those may meet itself."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", 15_000 + secrets.randbelow(15_000)))
            return int(probe.getsockname()[1])


def _stopped(pid: int) -> bool:
    states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").iterdir()]
    return set(states) == {"T"}
