"""The gateway with a router plug-in: prompts read, bookings ended, and what happens where a prompt cannot be read."""

import asyncio
import contextlib
import json
from pathlib import Path
from urllib.request import urlopen

import pytest

from dynamo_core.clock import SystemClock
from dynamo_core.errors import ConfigurationError
from dynamo_core.telemetry import Metrics
from dynamo_core.tokens import unpack_tokens
from dynamo_frontend._gateway.gateway import Gateway
from dynamo_frontend._gateway.prompt import CHAT_PATH, COMPLETIONS_PATH, LocalPrompts, read_fields
from dynamo_frontend._settings import GatewaySettings

DATA = Path(__file__).parents[1] / "data" / "tinylm"
EVENTS = ["tcp://127.0.0.1:1", "tcp://127.0.0.1:2"]


MESSAGES = [{"role": "user", "content": "Hi"}]


class Engine:
    """Lists one model and answers everything, whole or as a stream."""

    def __init__(self):
        self.heads = []
        self.writers = set()

    async def start(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    async def stop(self):
        self.server.close()
        for writer in self.writers:
            writer.transport.abort()

    async def serve(self, reader, writer):
        self.writers.add(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await self.answer(reader, writer)
        writer.close()

    async def answer(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        headers = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
        body = await reader.readexactly(int(headers["content-length"]))
        if "/v1/models" in head:
            answer = b'{"data":[{"id":"m"}]}'
        else:
            self.heads.append(headers)
            answer = b'{"choices":[]}'
        if b'"stream": true' in body:
            writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (14, answer))
        else:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(answer), answer))


@pytest.fixture
async def engines():
    found = [await Engine().start(), await Engine().start()]
    yield found
    for engine in found:
        await engine.stop()


@contextlib.asynccontextmanager
async def routed(engines, **options):
    options = {"router": "round-robin", "tokenizer": str(DATA), **options}
    urls = [engine.url for engine in engines]
    settings = GatewaySettings(upstream=urls, kv_events=EVENTS, http_port=0, drain_timeout_s=1, **options)
    gateway = Gateway(settings, Metrics(), SystemClock())
    await gateway.start()
    try:
        yield gateway
    finally:
        await gateway.stop()


async def call(gateway, **fields):
    """Return status and headers."""
    body = json.dumps({"model": "m", "messages": MESSAGES, **fields}).encode()
    return await asyncio.to_thread(_call, f"{gateway.url}/v1/chat/completions", body)


def _call(url, body):
    with urlopen(url, body, timeout=20) as response:
        response.read()
        return response.status, response.headers


@pytest.fixture
async def prompts():
    found = LocalPrompts(str(DATA), SystemClock())
    await found.load()
    return found


@pytest.mark.parametrize("stream", [False, True])
async def test_the_router_chooses_and_hears_the_end(engines, stream):
    async with routed(engines) as gateway:
        answers = [await call(gateway, stream=stream) for _ in range(4)]
        assert [headers["x-dynamo-worker-id"] for _, headers in answers] == ["1/0", "2/0", "1/0", "2/0"]
        assert all(headers["x-dynamo-decision-id"] for _, headers in answers)
        (router,) = gateway._kv._routers.values()
        assert not router._bookings


async def test_each_rank_of_an_engine_is_named_to_it(engines):
    async with routed(engines, kv_dp_size=2) as gateway:
        await call(gateway)
    (headers,) = [headers for engine in engines for headers in engine.heads]
    assert headers["x-data-parallel-rank"] == "0"


async def test_engines_leave_the_routing_while_they_are_down(engines):
    async with routed(engines) as gateway:
        await engines[0].stop()
        answers = [await call(gateway) for _ in range(4)]
        assert {status for status, _ in answers} == {200}
        assert {headers["x-dynamo-worker-id"] for _, headers in answers} == {"2/0"}


PICTURE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}


@pytest.mark.parametrize("messages", [[PICTURE], []])
async def test_what_cannot_be_read_is_served_by_load(engines, messages):
    async with routed(engines) as gateway:
        status, headers = await call(gateway, messages=messages)
        assert status == 200
        assert "x-dynamo-worker-id" not in headers


async def test_a_router_that_is_not_installed_is_named(engines):
    with pytest.raises(ConfigurationError, match="nonesuch"):
        async with routed(engines, router="nonesuch"):
            pass


async def test_files_that_are_missing_are_named(tmp_path):
    with pytest.raises(ConfigurationError, match="tokenizer"):
        await LocalPrompts(str(tmp_path), SystemClock()).load()


async def test_prompts_are_what_the_engine_sees(prompts, tokenizer):
    text = "Größe 日本"
    body = json.dumps({"prompt": text, "cache_salt": "s"}).encode()
    found = await prompts.read(COMPLETIONS_PATH, body, None)
    assert list(unpack_tokens(found.token_ids)) == tokenizer.encode(text).ids
    assert found.cache_salt == "s"
    chat = await prompts.read(CHAT_PATH, json.dumps({"messages": MESSAGES}).encode(), None)
    assert "<|im_start|>user\nHi" in tokenizer.decode(list(unpack_tokens(chat.token_ids)), skip_special_tokens=False)
    given = await prompts.read(COMPLETIONS_PATH, b'{"prompt": [5, 6]}', None)
    assert list(unpack_tokens(given.token_ids)) == [5, 6]
    assert await prompts.read(COMPLETIONS_PATH, b'{"prompt": ["a", "b"]}', None) is None


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", b'{"prompt": "x"}'),
        (CHAT_PATH, b'{"prompt": "x"}'),
        (CHAT_PATH, b'{"messages": [{}], "chat_template": "{{ 1 }}"}'),
        (COMPLETIONS_PATH, b"nonsense"),
        (COMPLETIONS_PATH, b'{"prompt": 1}'),
    ],
)
def test_bodies_without_one_prompt_of_text(path, body):
    assert read_fields(path, body) is None
