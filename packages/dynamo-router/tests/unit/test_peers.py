from __future__ import annotations

from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer, unused_port

from dynamo_core.tokens import BlockHasher, pack_tokens, unpack_hashes
from dynamo_router import RouterSettings
from dynamo_router._peers import fetch_peer
from dynamo_router._service import SelectionService

PROMPT = list(range(64))
HASHES = list(unpack_hashes(BlockHasher(16).hash_tokens(pack_tokens(PROMPT)).sequence))


def event(number, first, stop, names=HASHES):
    parent = names[first - 1] if first else None
    return {
        "type": "stored",
        "event_id": number,
        "block_hashes": names[first:stop],
        "token_ids": PROMPT[first * 16 : stop * 16],
        "parent_block_hash": parent,
    }


def client_of(service):
    return TestClient(TestServer(service.application()))


async def test_a_new_service_begins_with_what_its_peer_knows():
    first, second = (SelectionService(RouterSettings(policy="kv")) for _ in range(2))
    async with client_of(first) as one, client_of(second) as two:
        for number, names in ((1, HASHES), (2, [5, 6, 7, 8])):
            await one.post("/workers", json={"worker_id": number, "block_size": 16, "endpoint": f"http://w{number}"})
            events = [event(1, 0, 3 - number, names)]
            await one.post("/events", json={"worker_id": number, "events": events})
        dead = f"http://127.0.0.1:{unused_port()}"
        state = await fetch_peer([dead, str(one.make_url("/"))])
        await second.adopt(state)
        await second.adopt(state)
        assert await (await two.get("/workers")).json() == await (await one.get("/workers")).json()
        asked = {"token_ids": PROMPT}
        answer = await (await two.post("/select", json=asked)).json()
        assert (answer["worker_id"], answer["overlap"]["gpu"], answer["index_mode"]) == (1, 32, "exact")
        for number, names in ((1, HASHES), (2, [5, 6, 7, 8])):
            body = {"worker_id": number, "events": [event(2, 3 - number, 4, names)]}
            assert (await (await two.post("/events", json=body)).json())["state"] == "live"
        scores = (await (await two.post("/overlap_scores", json=asked)).json())["scores"]
        assert [score["cached_tokens"] for score in scores] == [64, 64]


async def test_no_peer_that_answers_is_no_state():
    async def wrong(request):
        return web.json_response({"default:default": 3})

    app = web.Application()
    app.router.add_get("/dump", wrong)
    async with TestClient(TestServer(app)) as client:
        assert await fetch_peer([str(client.make_url("/"))]) is None
    assert await fetch_peer([]) is None
