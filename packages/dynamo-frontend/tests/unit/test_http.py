"""The HTTP server: framing, order, limits, back-pressure and shutdown, without a socket where none is needed."""

import asyncio
import itertools
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo_core.clock import SystemClock
from dynamo_core.errors import ConfigurationError, InvalidRequestError
from dynamo_frontend._http.limits import HttpLimits
from dynamo_frontend._routes import Route, Routes
from dynamo_frontend._server import HttpServer


class ManualClock(SystemClock):
    """A clock that moves when told; its sleepers wake when their time has come."""

    def __init__(self):
        self.now = 0.0
        self.sleepers = []

    def monotonic(self):
        return self.now

    async def sleep(self, delay_s):
        woken = asyncio.get_running_loop().create_future()
        self.sleepers.append((self.now + delay_s, woken))
        await woken

    async def advance(self, seconds):
        for _ in range(3):
            await asyncio.sleep(0)
        self.now += seconds
        due, self.sleepers = (
            [s for s in self.sleepers if s[0] <= self.now],
            [s for s in self.sleepers if s[0] > self.now],
        )
        for _, woken in due:
            if not woken.done():
                woken.set_result(None)
        for _ in range(3):
            await asyncio.sleep(0)


class Harness:
    """Routes that echo, and connections to them."""

    def __init__(self, transport_type, limits=None):
        self.transport_type = transport_type
        self.clock = ManualClock()
        self.held = []
        self.tasks_cancelled = 0
        table = {
            "/echo": Route({"POST": self.echo, "GET": self.echo}),
            "/hold": Route({"GET": self.hold}),
            "/wait": Route({"GET": self.wait}),
            "/fail": Route({"GET": self.fail}),
            "/bad": Route({"GET": self.bad}),
            "/items/": Route({"GET": self.echo}, prefix=True),
        }
        self.server = HttpServer(Routes(table), self.clock, limits)

    def connect(self):
        transport = self.transport_type()
        transport.protocol = self.server.new_connection()
        transport.protocol.connection_made(transport)
        return transport

    def echo(self, request, response):
        body = {"method": request.method, "path": request.path, "query": request.query, "body": request.body.decode()}
        response.send(200, json.dumps(body).encode(), "application/json", {"x-seen": request.header("x-a")})

    def hold(self, request, response):
        self.held.append(response)

    async def wait(self, request, response):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.tasks_cancelled += 1
            raise

    async def fail(self, request, response):
        raise RuntimeError("secret detail")

    def bad(self, request, response):
        raise InvalidRequestError("x is wrong", param="x")


@pytest.fixture
def make(stack):
    transport_type = type(stack).connect.__globals__["FakeTransport"]
    return lambda limits=None: Harness(transport_type, limits)


@pytest.fixture
def harness(make):
    return make()


async def feed(transport, data, replies=1, size=None):
    for start in range(0, len(data), size or len(data)):
        transport.protocol.data_received(data[start : start + (size or len(data))])
    await transport.wait(lambda: len(transport.replies) >= replies or transport.closed)
    return transport.replies


async def test_whole_request(harness, request_bytes):
    transport = harness.connect()
    (reply,) = await feed(transport, request_bytes("POST", "/echo?a=1", b"hi", {"X-A": "1"}))
    assert reply.json == {"method": "POST", "path": "/echo", "query": "a=1", "body": "hi"}
    assert reply.headers["x-seen"] == "1"
    assert not transport.closed
    assert len(transport.writes) == 1


@pytest.mark.parametrize("size", [1, 2, 7])
async def test_any_split_of_a_chunked_request(harness, size):
    raw = (
        b"POST /ech%6F HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\nx-a: 1\r\nx-a: 2\r\n\r\n"
        b"3\r\nabc\r\n2;ext=1\r\nde\r\n0\r\n\r\n"
    )
    (reply,) = await feed(harness.connect(), raw, size=size)
    assert reply.json["body"] == "abcde"
    assert reply.headers["x-seen"] == "1, 2"


async def test_pipelined_requests_are_answered_in_order(harness, request_bytes):
    transport = harness.connect()
    raw = b"".join(request_bytes("POST", "/echo", b"%d" % index) for index in range(10))
    replies = await feed(transport, raw, replies=10)
    assert [reply.json["body"] for reply in replies] == [str(index) for index in range(10)]


async def test_pipelined_requests_wait_behind_a_slow_one_and_reading_pauses(make, request_bytes):
    harness = make(HttpLimits(pipelined_requests=3))
    transport = harness.connect()
    transport.protocol.data_received(request_bytes("GET", "/hold") + request_bytes("GET", "/echo") * 4)
    assert transport.reading_paused
    assert transport.replies == []
    harness.held[0].send(200, b"first", "text/plain")
    await transport.wait(lambda: len(transport.replies) == 5)
    assert transport.replies[0].body == b"first"
    assert not transport.reading_paused


async def test_streamed_events_of_one_tick_leave_in_one_write(harness, request_bytes):
    transport = harness.connect()
    transport.protocol.data_received(request_bytes("GET", "/hold"))
    response = harness.held[0]
    response.start(200, "text/event-stream")
    for index in range(5):
        response.write(b"data: %d\n\n" % index)
    await asyncio.sleep(0)
    assert len(transport.writes) == 1
    response.write(b"data: x\n\n")
    response.end()
    await transport.wait(lambda: bool(transport.replies))
    assert len(transport.writes) == 2
    assert transport.replies[0].body == b"".join(b"data: %d\n\n" % i for i in range(5)) + b"data: x\n\n"


async def test_http_1_0_streams_end_with_the_connection(harness):
    transport = harness.connect()
    transport.protocol.data_received(b"GET /hold HTTP/1.0\r\n\r\n")
    response = harness.held[0]
    response.start(200, "text/plain")
    response.write(b"abc")
    response.end()
    assert transport.closed
    assert bytes(transport.written).endswith(b"connection: close\r\n\r\nabc")


async def test_connection_close_is_honoured(harness, request_bytes):
    transport = harness.connect()
    (reply,) = await feed(transport, request_bytes("GET", "/echo", headers={"connection": "close"}))
    assert reply.headers["connection"] == "close"
    assert transport.closed


async def test_head_has_the_length_and_no_body(harness, request_bytes):
    transport = harness.connect()
    transport.protocol.data_received(request_bytes("HEAD", "/echo"))
    await asyncio.sleep(0)
    head, _, body = bytes(transport.written).partition(b"\r\n\r\n")
    assert b"content-length: " in head
    assert body == b""


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "request.unknown_path"),
        ("GET", "/items/", 404, "request.unknown_path"),
        ("DELETE", "/echo", 405, "request.method_not_allowed"),
        ("GET", "/bad", 400, "request.invalid_argument"),
        ("GET", "/fail", 500, "runtime.unclassified"),
    ],
)
async def test_errors_have_the_apis_shape(harness, request_bytes, method, path, status, code):
    (reply,) = await feed(harness.connect(), request_bytes(method, path))
    assert (reply.status, reply.json["error"]["code"]) == (status, code)
    assert b"secret" not in reply.body


async def test_options_and_405_name_the_methods(harness, request_bytes):
    (reply,) = await feed(harness.connect(), request_bytes("OPTIONS", "/echo"))
    assert (reply.status, reply.headers["allow"]) == (204, "GET, HEAD, OPTIONS, POST")
    (reply,) = await feed(harness.connect(), request_bytes("PUT", "/echo"))
    assert reply.headers["allow"] == "GET, HEAD, OPTIONS, POST"


async def test_expect_100_continue(harness):
    transport = harness.connect()
    transport.protocol.data_received(b"POST /echo HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n")
    await transport.wait(lambda: bool(transport.written))
    assert bytes(transport.written) == b"HTTP/1.1 100 Continue\r\n\r\n"
    transport.protocol.data_received(b"hi")
    await transport.wait(lambda: b"200 OK" in transport.written)


LIMITS = HttpLimits(target_bytes=100, header_bytes=500, header_count=10, body_bytes=50)


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET /" + b"a" * 200 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\na: " + b"b" * 600 + b"\r\n\r\n", 431),
        (b"POST /echo HTTP/1.1\r\ncontent-length: 51\r\n\r\n", 413),
        (b"POST /echo HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n40\r\n" + b"a" * 64 + b"\r\n", 413),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01", 400),
        (b"POST /echo HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\ncontent-length: -5\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"GET /%ff HTTP/1.1\r\n\r\n", 400),
    ],
)
async def test_violations_are_answered_and_close(make, raw, status):
    transport = make(LIMITS).connect()
    (reply,) = await feed(transport, raw)
    assert reply.status == status
    assert set(reply.json["error"]) == {"message", "type", "param", "code"}
    assert transport.closed


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(
        st.one_of(
            st.binary(max_size=20),
            st.sampled_from(
                b"GET /echo HTTP/1.1\r\n|\r\n|host: x\r\n|content-length: 3\r\n|abc|0\r\n\r\n|POST /echo HTTP/1.1\r\n|"
                b"transfer-encoding: chunked\r\n|3\r\nabc\r\n|upgrade: h2c\r\n|connection: upgrade\r\n".split(b"|")
            ),
        ),
        max_size=12,
    )
)
def test_no_bytes_break_the_server(make, request_bytes, pieces):
    async def run():
        harness = make()
        transport = harness.connect()
        for piece in pieces:
            if not transport.closed:
                transport.protocol.data_received(piece)
        await asyncio.sleep(0)
        assert all(reply.status < 500 for reply in transport.replies)
        transport.abort()
        await asyncio.sleep(0)
        assert harness.server.connections == 0

    asyncio.run(run())


async def test_slow_head_slow_body_and_idle_are_ended(harness, request_bytes):
    await harness.server.start("127.0.0.1", 0)
    slow_head, slow_body, idle = harness.connect(), harness.connect(), harness.connect()
    slow_head.protocol.data_received(b"GET /echo HT")
    slow_body.protocol.data_received(b"POST /echo HTTP/1.1\r\ncontent-length: 5\r\n\r\na")
    await harness.clock.advance(16)
    assert slow_head.replies[0].status == 408
    assert not slow_body.closed
    await harness.clock.advance(16)
    assert slow_body.replies[0].status == 408
    assert not idle.closed
    await harness.clock.advance(60)
    assert idle.closed
    assert idle.replies == []
    await harness.server.stop()


async def test_running_responses_have_no_time_limit_but_stalled_readers_do(harness, request_bytes):
    await harness.server.start("127.0.0.1", 0)
    transport = harness.connect()
    transport.protocol.data_received(request_bytes("GET", "/hold"))
    await harness.clock.advance(10_000)
    assert not transport.closed
    left = []
    harness.held[0].on_disconnect(lambda: left.append(True))
    transport.protocol.pause_writing()
    assert not harness.held[0].writable
    await harness.clock.advance(61)
    assert transport.aborted
    assert left == [True]
    await harness.server.stop()


async def test_quiet_streams_can_send_a_sign_of_life(harness, request_bytes):
    await harness.server.start("127.0.0.1", 0)
    transport = harness.connect()
    transport.protocol.data_received(request_bytes("GET", "/hold"))
    response = harness.held[0]
    signs = []
    response.on_quiet(5, lambda: signs.append(harness.clock.now))
    response.start(200, "text/event-stream")
    for second in range(20):
        await harness.clock.advance(1)
        if second == 8:
            response.write(b"data: x\n\n")
            await asyncio.sleep(0)
    assert len(signs) >= 2
    assert all(later - earlier >= 5 for earlier, later in itertools.pairwise(signs))
    response.end()
    await harness.clock.advance(10)
    assert len(signs) == len(set(signs)) < 5
    await harness.server.stop()


async def test_disconnect_cancels_the_handler(harness, request_bytes):
    transport = harness.connect()
    transport.protocol.data_received(request_bytes("GET", "/wait"))
    await asyncio.sleep(0)
    transport.abort()
    for _ in range(3):
        await asyncio.sleep(0)
    assert harness.tasks_cancelled == 1
    assert harness.server.disconnects == 1


async def test_drain_finishes_running_responses_and_refuses_new_ones(harness, request_bytes):
    await harness.server.start("127.0.0.1", 0)
    busy, idle = harness.connect(), harness.connect()
    busy.protocol.data_received(request_bytes("GET", "/hold"))
    drained = asyncio.ensure_future(harness.server.drain(5))
    await asyncio.sleep(0)
    assert idle.closed
    assert not busy.closed
    harness.held[0].send(200, b"done", "text/plain")
    assert await drained
    assert busy.replies[0].headers["connection"] == "close"
    await harness.server.stop()


async def test_busy_port_names_the_remedy(harness, make):
    await harness.server.start("127.0.0.1", 0)
    with pytest.raises(ConfigurationError, match=f"port {harness.server.port} .*--http-port"):
        await make().server.start("127.0.0.1", harness.server.port)
    await harness.server.stop()


async def test_foreign_host_names_the_remedy(make):
    with pytest.raises(ConfigurationError, match="--http-host"):
        await make().server.start("203.0.113.7", 0)


async def test_header_values_cannot_split_the_response(harness, request_bytes):
    transport = harness.connect()
    transport.protocol.data_received(request_bytes("GET", "/hold"))
    harness.held[0].send(200, b"x", "text/plain", {"x-a": "1\r\nx-evil: 2"})
    await transport.wait(lambda: bool(transport.replies))
    assert "x-evil" not in transport.replies[0].headers
