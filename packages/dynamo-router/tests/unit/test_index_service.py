from __future__ import annotations

import asyncio
import json
import struct
import sys

import msgspec
import pytest
import zmq
import zmq.asyncio
from aiohttp.test_utils import TestClient, TestServer

from dynamo_core.tokens import BlockHasher, pack_tokens, unpack_hashes
from dynamo_router import RouterSettings
from dynamo_router._index_service import IndexService

PROMPT = list(range(64))


@pytest.fixture
async def client():
    service = IndexService(RouterSettings(policy="kv", receipts="off"))
    async with TestClient(TestServer(service.application())) as client:
        yield client


async def call(client, path, body=None, status=200):
    response = await (client.get(path) if body is None else client.post(path, data=json.dumps(body)))
    answer = await response.json()
    assert response.status == status, answer
    return answer


async def store(client, instance, tokens=PROMPT, **fields):
    hashes = list(unpack_hashes(BlockHasher(16).hash_tokens(pack_tokens(tokens)).sequence))
    event = {"type": "stored", "event_id": 1, "block_hashes": hashes, "token_ids": tokens, **fields}
    return await call(client, "/events", {"worker_id": instance, "events": [event]})


async def test_says_who_holds_a_prompt(client):
    await call(client, "/ready", status=503)
    for instance in (1, 2):
        await call(client, "/register", {"instance_id": instance, "block_size": 16})
    assert (await store(client, 1))["state"] == "live"
    await store(client, 2, PROMPT[:32])
    found = await call(client, "/query", {"token_ids": PROMPT})
    assert found["scores"] == {"1": {"0": 64}, "2": {"0": 32}}
    assert found["instances"][0] == {
        "instance_id": 1,
        "dp_rank": 0,
        "gpu": 64,
        "cpu": 64,
        "disk": 64,
        "longest_matched": 64,
    }
    local = list(unpack_hashes(BlockHasher(16).hash_tokens(pack_tokens(PROMPT)).local))
    signed = [value - (1 << 64) if value >> 63 else value for value in local]
    assert (await call(client, "/query_by_hash", {"block_hashes": signed}))["scores"] == found["scores"]
    assert (await call(client, "/query", {"token_ids": PROMPT, "lora_name": "sql"}))["scores"] == {}
    workers = await call(client, "/workers")
    assert [(each["instance_id"], each["blocks"], each["stream"]) for each in workers] == [
        (1, 4, "live"),
        (2, 2, "live"),
    ]
    assert set(await call(client, "/dump")) == {"default:default"}
    assert (await call(client, "/ready"))["engines"] == 2
    assert 'index_blocks{model="default/default"} 6.0' in await (await client.get("/metrics")).text()
    assert (await call(client, "/unregister", {"instance_id": 1}))["dp_ranks"] == [0]
    assert (await call(client, "/query", {"token_ids": PROMPT}))["scores"] == {"2": {"0": 32}}
    assert (await call(client, "/health"))["status"] == "ok"


async def test_follows_an_engine_rank_by_rank(client):
    context = zmq.asyncio.Context()
    pub = context.socket(zmq.XPUB)
    port = pub.bind_to_random_port("tcp://127.0.0.1")
    try:
        body = {"instance_id": 1, "block_size": 16, "dp_rank": 3, "endpoint": f"tcp://127.0.0.1:{port}"}
        await call(client, "/register", {**body, "dp_rank": 0, "endpoint": ""})
        await call(client, "/register", body)
        async with asyncio.timeout(10):
            assert await pub.recv() == b"\x01"
        event = ["BlockStored", [11, 12], None, PROMPT[:32], 16, None, "GPU"]
        await pub.send_multipart([b"", struct.pack(">Q", 0), msgspec.msgpack.encode([1.0, [event], 3])])
        async with asyncio.timeout(10):
            while not (found := await call(client, "/query", {"token_ids": PROMPT}))["scores"]:
                await asyncio.sleep(0.001)
        assert found["scores"] == {"1": {"3": 32}}
        assert (await call(client, "/unregister", {"instance_id": 1, "dp_rank": 3}))["dp_ranks"] == [3]
        async with asyncio.timeout(10):
            assert await pub.recv() == b"\x00"
    finally:
        context.destroy(linger=0)


@pytest.mark.parametrize(
    ("path", "body", "status", "part"),
    [
        ("/register", {"instance_id": 2, "block_size": 32}, 400, "32"),
        ("/register", {"instance_id": 2, "block_size": 0}, 400, "block_size"),
        ("/register", {"instance_id": 2, "block_size": 16, "endpoint": "here"}, 400, "'here'"),
        ("/unregister", {"instance_id": 2}, 404, "instance 2"),
        ("/query", {"token_ids": [1], "model_name": "x"}, 404, "'x'"),
        ("/query", {"token_ids": "x"}, 400, "token_ids"),
        ("/query_by_hash", {"block_hashes": [1], "cache_salt": "s"}, 400, "cache_salt"),
        ("/events", {"worker_id": 9, "events": []}, 400, "unknown worker"),
        ("/nothing", {}, 404, "/nothing"),
    ],
)
async def test_says_what_is_wrong(client, path, body, status, part):
    await call(client, "/register", {"instance_id": 1, "block_size": 16})
    answer = await call(client, path, body, status)
    assert part in answer["error"]["message"]
    assert [each["instance_id"] for each in await call(client, "/workers")] == [1]


async def test_the_command_runs_until_it_is_told_to_stop():
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "import sys; from dynamo_router._cli import main; sys.exit(main())"),
        *("index", "--port", "0"),
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(30):
        assert (await process.stdout.readline()).startswith(b"dynamo-router indexes on http://127.0.0.1:")
        process.terminate()
        assert await process.wait() == 0
