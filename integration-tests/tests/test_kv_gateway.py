"""The gateway before stock engines, with the KV router beside it: prompts go to the engine that holds their beginning.

The engines are real HTTP servers that publish KV events over ZMQ in vLLM's encoding.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import zmq
import zmq.asyncio
from tokenizers import Tokenizer

import dynamo_worker
from dynamo_core.clock import SystemClock
from dynamo_core.errors import ConfigurationError
from dynamo_core.telemetry import Metrics
from dynamo_frontend._gateway.gateway import Gateway
from dynamo_frontend._settings import GatewaySettings

MODEL = Path(dynamo_worker.__file__).parent / "models" / "tinylm"
BLOCK = 16
LONG = "The tide rises and falls twice a day, and every harbour has its own table of when it does so. " * 8
OTHER = "A compiler reads the whole program before it writes a single instruction, which is its great luxury. " * 8


class BlockStored(msgspec.Struct, array_like=True, tag="BlockStored"):
    block_hashes: list[bytes]
    parent_block_hash: bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None = None


class EventBatch(msgspec.Struct, array_like=True):
    ts: float
    events: list[BlockStored]


class Engine:
    """An engine that tells what its prefix cache holds."""

    def __init__(self, *, offers_tokenize: bool = True) -> None:
        self.tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
        self.offers_tokenize = offers_tokenize
        self.prompts: list[str] = []
        self.writers: set[asyncio.StreamWriter] = set()
        self.sequence = 0
        self.socket = zmq.asyncio.Context.instance().socket(zmq.PUB)
        self.events = f"tcp://127.0.0.1:{self.socket.bind_to_random_port('tcp://127.0.0.1')}"

    async def start(self) -> None:
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        self.server.close()
        for writer in self.writers:
            writer.transport.abort()
        self.socket.close(linger=0)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = [int(line[16:]) for line in head.lower().split("\r\n") if line.startswith("content-length: ")]
                body = await reader.readexactly(sum(length))
                status, answer = await self.answer(head.split(" ")[1], body)
                data = json.dumps(answer).encode()
                writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "m"}]}
        prompt = json.loads(body)["prompt"]
        token_ids = self.tokenizer.encode(prompt).ids
        if path == "/tokenize":
            return (200, {"tokens": token_ids, "count": len(token_ids)}) if self.offers_tokenize else (404, {})
        self.prompts.append(prompt)
        return 200, {"choices": [{"text": "ok"}]}

    async def publish(self, token_ids: list[int]) -> None:
        whole = len(token_ids) // BLOCK * BLOCK
        hashes, parent = [], b""
        for start in range(0, whole, BLOCK):
            parent = hashlib.sha256(parent + repr(token_ids[start : start + BLOCK]).encode()).digest()
            hashes.append(parent)
        batch = EventBatch(1.0, [BlockStored(hashes, None, token_ids[:whole], BLOCK, None, "GPU")])
        frames = [b"", self.sequence.to_bytes(8, "big"), msgspec.msgpack.encode(batch)]
        self.sequence += 1
        await self.socket.send_multipart(frames)


@pytest.fixture
async def engines() -> AsyncIterator[list[Engine]]:
    found = [Engine(), Engine()]
    for engine in found:
        await engine.start()
    yield found
    for engine in found:
        await engine.stop()


@asynccontextmanager
async def gateway_before(engines: list[Engine], **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    settings = GatewaySettings(
        upstream=[engine.url for engine in engines],
        kv_events=[engine.events for engine in engines],
        kv_block_size=BLOCK,
        http_port=0,
        probe_interval_s=0.05,
        drain_timeout_s=1,
        **options,
    )
    gateway = Gateway(settings, Metrics(), SystemClock())
    await gateway.start()
    try:
        async with httpx.AsyncClient(base_url=gateway.url, timeout=20) as client:
            yield client
    finally:
        await gateway.stop()


async def complete(client: httpx.AsyncClient, prompt: str) -> httpx.Response:
    reply = await client.post("/v1/completions", json={"model": "m", "prompt": prompt, "max_tokens": 1})
    assert reply.status_code == 200, reply.text
    return reply


async def until_heard(client: httpx.AsyncClient, cached: dict[Engine, str]) -> None:
    """Publish until the index has every block, before any request could make the router expect one elsewhere."""
    wanted = sum(len(engine.tokenizer.encode(prompt).ids) // BLOCK for engine, prompt in cached.items())
    async with asyncio.timeout(20):
        while True:
            for engine, prompt in cached.items():
                await engine.publish(engine.tokenizer.encode(prompt).ids)
            found = re.findall(
                r"^dynamo_router_index_blocks\S* (\S+)$", (await client.get("/metrics")).text, re.MULTILINE
            )
            if sum(map(float, found)) >= wanted:
                return


async def until_known(client: httpx.AsyncClient, engine: Engine, prompt: str) -> httpx.Response:
    """Ask until the router has heard what the engine holds; it says so repeatedly, since a late listener missed it."""
    async with asyncio.timeout(20):
        while True:
            await engine.publish(engine.tokenizer.encode(prompt).ids)
            reply = await complete(client, prompt)
            if int(reply.headers.get("x-dynamo-overlap-blocks", "0")) > 3:
                return reply


@pytest.mark.parametrize("tokenizer", ["", str(MODEL)])
async def test_shared_prefix_goes_to_the_engine_that_holds_it(engines: list[Engine], tokenizer: str) -> None:
    async with gateway_before(engines, tokenizer=tokenizer) as client:
        holders = {LONG: engines[0].url[7:], OTHER: engines[1].url[7:]}
        await until_heard(client, {engines[0]: LONG, engines[1]: OTHER})
        for index in range(6):
            for prompt in (LONG, OTHER):
                reply = await complete(client, f"{prompt} Question {index}?")
                assert reply.headers["x-dynamo-upstream"] == holders[prompt]
                assert reply.headers["x-dynamo-decision-id"]
        assert [len(engine.prompts) for engine in engines] == [6, 6]
        ready = (await client.get("/ready")).json()
        assert ready["status"] == "ready"
        assert "prompts" not in ready["routing"]


async def test_a_lost_engine_hands_its_prompts_to_the_other(engines: list[Engine]) -> None:
    async with gateway_before(engines) as client:
        await until_known(client, engines[0], LONG)
        await engines[0].stop()
        reply = await complete(client, f"{LONG} Again?")
        assert reply.headers["x-dynamo-upstream"] == engines[1].url[7:]


async def test_without_token_ids_it_says_so_and_serves_by_load(engines: list[Engine]) -> None:
    for engine in engines:
        engine.offers_tokenize = False
    async with gateway_before(engines) as client:
        replies = [await complete(client, LONG) for _ in range(4)]
        assert len({reply.headers["x-dynamo-upstream"] for reply in replies}) == 2
        assert "--tokenizer" in (await client.get("/ready")).json()["routing"]["prompts"]
        assert "gateway_unrouted_total" in (await client.get("/metrics")).text


def test_event_sockets_must_match_the_engines() -> None:
    settings = GatewaySettings(upstream=["http://a:1", "http://b:1"], kv_events=["tcp://a:2"])
    with pytest.raises(ConfigurationError, match="--kv-events is given 1 times for 2"):
        Gateway(settings, Metrics(), SystemClock())
