"""The gateway before engines that speak OpenAI's API over real sockets."""

import asyncio
import contextlib
import json

import httptools
import openai
import pytest

from dynamo_core.clock import SystemClock
from dynamo_core.errors import ConfigurationError
from dynamo_core.telemetry import Metrics
from dynamo_frontend._cli import main
from dynamo_frontend._gateway.gateway import Gateway
from dynamo_frontend._settings import GatewaySettings

MESSAGES = [{"role": "user", "content": "Hi"}]


class Engine:
    """A stock engine: answers by mode."""

    def __init__(self, name, models=("m",)):
        self.name = name
        self.models = models
        self.mode = "ok"
        self.requests = []
        self.lost = asyncio.Event()
        self.server = None
        self.writers = set()
        self.accepted = 0

    async def start(self, port=0):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", port)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def stop(self):
        self.server.close()
        for writer in list(self.writers):
            writer.transport.abort()

    async def serve(self, reader, writer):
        self.writers.add(writer)
        self.accepted += 1
        try:
            while request := await read_request(reader):
                await self.answer(request, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.lost.set()
            self.writers.discard(writer)
            writer.close()

    async def answer(self, request, writer):
        _, path, _, body = request
        if path == "/v1/models":
            listing = {"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]}
            return whole(writer, 200, listing)
        self.requests.append(request)
        if self.mode == "die":
            writer.transport.abort()
            raise ConnectionError
        fields = json.loads(body)
        if fields.get("stream"):
            return await self.stream(writer)
        status = 200 if self.mode == "ok" else int(self.mode)
        return whole(writer, status, {"engine": self.name, "choices": [], "error": {"message": "as the engine says"}})

    async def stream(self, writer):
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for index in range(1000 if self.mode == "long" else 3):
            data = b'data: {"id":"1","choices":[{"index":0,"delta":{"content":"%d"}}]}\n\n' % index
            writer.write(b"%x\r\n%b\r\n" % (len(data), data))
            await writer.drain()
            if self.mode == "cut":
                writer.transport.abort()
                raise ConnectionError
            await asyncio.sleep(0.001 if self.mode == "long" else 0)
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


def whole(writer, status, body):
    data = json.dumps(body).encode()
    writer.write(
        b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (status, len(data), data)
    )


async def read_request(reader):
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    method, path, _ = lines[0].split(" ")
    headers = dict(line.split(": ", 1) for line in lines[1:] if line)
    return method, path, headers, await reader.readexactly(int(headers.get("content-length", 0)))


@pytest.fixture
async def engines():
    found = [await Engine("a").start(), await Engine("b", ("m", "only-b")).start()]
    yield found
    for engine in found:
        await engine.stop()


@contextlib.asynccontextmanager
async def running(engines, **options):
    urls = [f"http://127.0.0.1:{engine.port}" for engine in engines]
    options = {"probe_interval_s": 0.02, "drain_timeout_s": 5, **options}
    settings = GatewaySettings(upstream=urls, http_port=0, **options)
    gateway = Gateway(settings, Metrics(), SystemClock())
    await gateway.start()
    try:
        yield gateway
    finally:
        await gateway.stop()


@pytest.fixture
async def gateway(engines):
    async with running(engines) as found:
        yield found


class Answer:
    """Parses one response."""

    def __init__(self):
        self.parser = httptools.HttpResponseParser(self)
        self.headers = {}
        self.body = b""
        self.done = False

    def on_header(self, name, value):
        self.headers[name.decode().lower()] = value.decode()

    def on_body(self, data):
        self.body += data

    def on_message_complete(self):
        self.done = True


async def call(gateway, path="/v1/chat/completions", method="POST", body=None, **fields):
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.server.port)
    data = body if body is not None else json.dumps({"model": "m", "messages": MESSAGES, **fields}).encode()
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer t\r\ncontent-length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    answer = Answer()
    async with asyncio.timeout(20):
        while not answer.done and (received := await reader.read(65536)):
            answer.parser.feed_data(received)
    writer.close()
    answer.status = answer.parser.get_status_code()
    return answer


async def test_whole_reply_passes_unchanged(gateway, engines):
    answer = await call(gateway, "/v1/chat/completions?x=1", custom_field=[1, None])
    assert answer.status == 200
    assert json.loads(answer.body)["engine"] in "ab"
    (request,) = [request for engine in engines for request in engine.requests]
    assert request[1] == "/v1/chat/completions?x=1"
    assert json.loads(request[3])["custom_field"] == [1, None]
    assert request[2]["authorization"] == "Bearer t"
    assert request[2]["x-request-id"] == answer.headers["x-request-id"]
    assert answer.headers["x-dynamo-upstream"].startswith("127.0.0.1:")


async def test_engines_take_turns_and_connections_are_kept(engines):
    # A probe that runs beside a request needs a connection of its own: here there is only the one of the start.
    async with running(engines, probe_interval_s=3600) as gateway:
        for _ in range(10):
            await call(gateway)
        assert [len(engine.requests) for engine in engines] == [5, 5]
        assert [engine.accepted for engine in engines] == [1, 1]


async def test_stock_client_streams_through(gateway):
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="k", max_retries=0) as client:
        stream = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        assert "".join([chunk.choices[0].delta.content async for chunk in stream]) == "012"
        assert [model.id async for model in client.models.list()] == ["m", "only-b"]
        assert (await client.models.retrieve("only-b")).id == "only-b"


async def test_model_goes_where_it_is_served(gateway, engines):
    for _ in range(3):
        await call(gateway, model="only-b")
    assert len(engines[1].requests) == 3
    missing = await call(gateway, model="nobody")
    assert (missing.status, json.loads(missing.body)["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("mode", ["400", "429", "503"])
async def test_engine_errors_pass_unchanged(gateway, engines, mode):
    for engine in engines:
        engine.mode = mode
    answer = await call(gateway)
    assert answer.status == int(mode)
    assert b"as the engine says" in answer.body


async def test_engine_lost_before_the_first_byte_is_replaced(gateway, engines):
    engines[0].mode = "die"
    answers = [await call(gateway) for _ in range(6)]
    assert {answer.status for answer in answers} == {200}
    assert engines[0].requests


async def test_engine_that_is_down_is_left_out_until_it_is_back(engines):
    async with running(engines) as gateway:
        await engines[0].stop()
        port = engines[0].port
        answers = [await call(gateway) for _ in range(6)]
        assert {answer.status for answer in answers} == {200}
        await until_state(gateway, port, "down")
        back = await Engine("a").start(port)
        await until_state(gateway, port, "up")
        for _ in range(4):
            await call(gateway)
        assert back.requests
        await back.stop()


async def until_state(gateway, port, state):
    async with asyncio.timeout(20):
        while True:
            answer = json.loads((await call(gateway, "/ready", "GET", b"")).body)
            if answer["upstreams"][f"http://127.0.0.1:{port}"] == state:
                return


async def test_no_engine_left_is_unavailable(engines):
    async with running(engines) as gateway:
        for engine in engines:
            engine.mode = "die"
        answer = await call(gateway)
        assert answer.status == 503
        assert set(json.loads(answer.body)["error"]) == {"message", "type", "param", "code"}
        for engine in engines:
            await engine.stop()
            await until_state(gateway, engine.port, "down")
        answer = await call(gateway)
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert (await call(gateway, "/ready", "GET", b"")).status == 503


async def test_engine_lost_in_mid_stream_is_an_error_event(gateway, engines):
    for engine in engines:
        engine.mode = "cut"
    answer = await call(gateway, stream=True)
    assert answer.status == 200
    assert b"event: error\ndata: " in answer.body
    assert b"[DONE]" not in answer.body


async def test_client_that_leaves_ends_the_engines_work(gateway, engines):
    for engine in engines:
        engine.mode = "long"
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.server.port)
    body = json.dumps({"model": "m", "messages": MESSAGES, "stream": True}).encode()
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
    await reader.readuntil(b"data: ")
    (serving,) = [engine for engine in engines if engine.requests]
    serving.lost.clear()
    writer.transport.abort()
    async with asyncio.timeout(10):
        await serving.lost.wait()
    metrics = (await call(gateway, "/metrics", "GET", b"")).body.decode()
    assert f'in_flight_requests{{upstream="http://127.0.0.1:{serving.port}"}} 0.0' in metrics


@pytest.mark.parametrize("body", [b"", b"{}", b"[1]", b"{", b'{"model": 1}'])
async def test_bad_bodies_do_not_reach_an_engine(gateway, engines, body):
    assert (await call(gateway, body=body)).status == 400
    assert not engines[0].requests and not engines[1].requests


async def test_encoded_line_breaks_stay_encoded(gateway, engines):
    await call(gateway, "/v1/x%0d%0aevil:%201")
    (request,) = [request for engine in engines for request in engine.requests]
    assert request[1] == "/v1/x%0D%0Aevil:%201"


@pytest.mark.parametrize("url", ["ftp://x", "localhost:8000", "http://", "https://x?y"])
def test_bad_upstreams_are_named(url):
    with pytest.raises(ConfigurationError, match="--upstream"):
        Gateway(GatewaySettings(upstream=[url]), Metrics(), SystemClock())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve"], "--upstream"),
        (["serve", "--upstream", "nonsense"], "nonsense"),
        (["serve", "--nonsense"], "--nonsense"),
        (["fly"], "fly"),
    ],
)
def test_command_refuses_with_one_line(capsys, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_command_shows_its_use(capsys):
    assert main(["--help"]) == 0
    assert "--upstream" in capsys.readouterr().out
