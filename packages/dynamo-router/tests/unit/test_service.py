from __future__ import annotations

import asyncio
import json
import signal
import sys

import pytest
from aiohttp import ClientSession
from aiohttp.test_utils import TestClient, TestServer

from dynamo_core.ids import WorkerId
from dynamo_core.routing import CandidateScore, RoutingDecision
from dynamo_core.tokens import BlockHasher, pack_tokens, unpack_hashes
from dynamo_router import RouterSettings
from dynamo_router._explain import explain, render
from dynamo_router._service import SelectionService
from dynamo_router._service_bodies import EventsBody, read_body
from dynamo_router._split import read_split_options

PROMPT = list(range(64))
HASHES = BlockHasher(16).hash_tokens(pack_tokens(PROMPT))


@pytest.fixture
async def client():
    service = SelectionService(RouterSettings(receipts="on", policy="kv"), max_routers=2)
    async with TestClient(TestServer(service.application())) as client:
        yield client


async def call(client, method, path, body=None, status=200):
    response = await client.request(method, path, data=None if body is None else json.dumps(body))
    payload = await response.json()
    assert response.status == status, payload
    return payload


async def register(client, number, **fields):
    body = {"worker_id": number, "block_size": 16, "endpoint": f"http://w{number}", **fields}
    return await call(client, "POST", "/workers", body, 201)


async def store(client, number, **fields):
    event = {"type": "stored", "event_id": 1, "block_hashes": list(unpack_hashes(HASHES.sequence)), "token_ids": PROMPT}
    return await call(client, "POST", "/events", {"worker_id": number, "events": [{**event, **fields}]})


async def test_selects_reserves_and_remembers(client):
    await call(client, "GET", "/ready", status=503)
    await register(client, 1)
    await register(client, 2)
    assert await store(client, 2) == {"last_event_id": 1, "state": "live", "detail": ""}
    asked = {"selection_id": "s-1", "token_ids": PROMPT + [7] * 10}
    answer = await call(client, "POST", "/select", asked)
    assert (answer["worker_id"], answer["endpoint"], answer["reservation_id"]) == (2, "http://w2", None)
    assert answer["overlap"] == {"longest_matched": 64, "gpu": 64, "cpu": 0, "disk": 0, "external": 0}
    assert answer["effective_prefill_tokens"] == 10
    answer = await call(client, "POST", "/select_and_reserve", asked)
    booked = answer["reservation_id"]
    (loads,) = await call(client, "GET", "/loads")
    assert [load.get("projected", {}).get("prefill_tokens", 0) for load in loads["workers"]] == [0, 10]
    await call(client, "POST", f"/reservations/{booked}/prefill_complete")
    await call(client, "POST", f"/reservations/{booked}/progress", {"output_tokens": 20})
    (loads,) = await call(client, "GET", "/loads")
    assert loads["workers"][1]["projected"]["decode_blocks"] == 5
    await call(client, "DELETE", f"/reservations/{booked}", {"cached_tokens": 64, "ttft_s": 0.5, "output_tokens": 20})
    kept = await call(client, "GET", f"/v1/decisions/{answer['decision_id']}")
    assert kept["decision"]["request_id"] == "s-1"
    assert kept["outcome"]["cached_tokens"] == 64
    assert len(await call(client, "GET", "/v1/decisions?limit=1")) == 1
    assert (await call(client, "GET", "/ready"))["index_modes"] == {
        "default/default/1/0": "approximate",
        "default/default/2/0": "exact",
    }
    assert (await call(client, "GET", "/health"))["status"] == "ok"
    metrics = await (await client.get("/metrics")).text()
    assert 'dynamo_router_decisions_total{model="default/default",policy="kv"} 2.0' in metrics


async def test_hashes_serve_as_well_as_tokens(client):
    await register(client, 1, data_parallel_size=2)
    signed = [value - (1 << 64) if value >> 63 else value for value in unpack_hashes(HASHES.sequence)]
    await store(client, 1, block_hashes=signed, token_ids=[], token_hashes=list(unpack_hashes(HASHES.local)))
    body = {"block_hashes": list(unpack_hashes(HASHES.local)), "isl_tokens": 70}
    answer = await call(client, "POST", "/select", body)
    assert (answer["worker_id"], answer["dp_rank"], answer["overlap"]["gpu"]) == (1, 0, 64)
    found = await call(client, "POST", "/overlap_scores", {"token_ids": PROMPT})
    assert [(score["worker_id"], score["cached_tokens"]) for score in found["scores"]] == [(1, 64)]
    assert found["scores"][0]["tier_blocks"]["device"] == 4
    await call(
        client,
        "POST",
        "/events",
        {"worker_id": 1, "events": [{"type": "removed", "event_id": 2, "block_hashes": signed[3:]}]},
    )
    assert (await call(client, "POST", "/select", body))["overlap"]["gpu"] == 48
    await call(client, "POST", "/events", {"worker_id": 1, "events": [{"type": "cleared", "event_id": 3}]})
    assert (await call(client, "POST", "/select", body))["overlap"]["gpu"] == 0


async def test_workers_come_and_go(client):
    await register(client, 1)
    await register(client, 1, total_kv_blocks=10)
    assert [worker["total_kv_blocks"] for worker in await call(client, "GET", "/workers")] == [10]
    await call(client, "DELETE", "/workers/1")
    await call(client, "DELETE", "/workers/1", status=404)
    await call(client, "POST", "/select", {"token_ids": PROMPT}, 503)


async def test_a_worker_changes_without_losing_its_cache(client):
    await register(client, 1)
    await store(client, 1)
    changed = await call(client, "PATCH", "/workers/1", {"total_kv_blocks": 77, "endpoint": "http://moved"})
    assert (changed["total_kv_blocks"], changed["endpoint"], changed["block_size"]) == (77, "http://moved", 16)
    answer = await call(client, "POST", "/select", {"token_ids": PROMPT})
    assert (answer["overlap"]["gpu"], answer["endpoint"]) == (64, "http://moved")
    await call(client, "PATCH", "/workers/1", {"data_parallel_size": 2})
    assert (await call(client, "POST", "/select", {"token_ids": PROMPT}))["overlap"]["gpu"] == 0
    (loads,) = await call(client, "GET", "/loads")
    assert [load["worker"] for load in loads["workers"]] == [[1, 0], [1, 1]]
    for body, part in (({"colour": 1}, "colour"), ({"worker_id": 2}, "cannot change"), ([], "no JSON object")):
        answer = await call(client, "PATCH", "/workers/1", body, 400)
        assert part in answer["error"]["message"]
    await call(client, "PATCH", "/workers/9", {}, 404)
    await call(client, "PATCH", "/workers/x", {}, 404)


async def test_others_may_choose_and_book(client):
    await register(client, 1)
    await register(client, 2, data_parallel_size=2)
    await store(client, 1)
    prompt = {"token_ids": PROMPT + [7] * 16}
    booked = await call(client, "POST", "/reservations", {**prompt, "worker_id": 2, "dp_rank": 1}, 201)
    assert (booked["worker_id"], booked["dp_rank"]) == (2, 1)
    found = await call(client, "POST", "/potential_loads", prompt)
    assert [tuple(load.values()) for load in found] == [(1, 0, 16, 5, 0), (2, 0, 80, 5, 0), (2, 1, 80, 5, 1)]
    path = f"/reservations/{booked['reservation_id']}"
    assert (await call(client, "POST", f"{path}/output_block"))["output_tokens"] == 16
    assert (await call(client, "POST", f"{path}/output_block", {"blocks": 2}))["output_tokens"] == 48
    (loads,) = await call(client, "GET", "/loads")
    assert loads["workers"][2]["projected"]["decode_blocks"] == 8
    await call(client, "DELETE", path)
    assert (await call(client, "POST", f"{path}/output_block"))["output_tokens"] == 0
    await call(client, "POST", "/reservations", {**prompt, "worker_id": 9}, 404)
    answer = await call(client, "POST", "/reservations", {**prompt, "worker_id": 2, "dp_rank": 7}, 400)
    assert "7" in answer["error"]["message"]
    await call(client, "POST", f"{path}/output_block", {"blocks": 0}, 400)
    refused = await call(client, "POST", f"{path}/output_block", {"decay_fraction": 0.5}, 400)
    assert "leave it out" in refused["error"]["message"]


async def test_prefill_and_decode_workers_are_chosen_apart():
    split = read_split_options({"policy": "isl_bounding", "eff_isl_threshold": 32})
    service = SelectionService(RouterSettings(policy="kv"), split=split)
    async with TestClient(TestServer(service.application())) as client:
        await register(client, 1, worker_type="decode")
        await call(client, "POST", "/select_split", {"token_ids": PROMPT}, 404)
        await register(client, 2, worker_type="prefill")
        assert (await call(client, "POST", "/select", {"token_ids": PROMPT}))["worker_id"] == 1
        assert (await call(client, "POST", "/select", {"token_ids": PROMPT, "phase": "prefill"}))["worker_id"] == 2
        answer = await call(client, "POST", "/select_split_and_reserve", {"token_ids": PROMPT})
        assert (answer["prefill"]["worker_id"], answer["decode"]["worker_id"]) == (2, 1)
        assert "does not report" in answer["reason"]
        loads = {entry["prefill"]: entry["workers"][0] for entry in await call(client, "GET", "/loads")}
        assert loads[True]["projected"] == {"prefill_tokens": 64, "active_requests": 1}
        assert loads[False]["projected"] == {"decode_blocks": 4, "active_requests": 1}
        await call(client, "POST", "/workers/1/load", {"kv_used_blocks": 5, "kv_total_blocks": 10})
        await store(client, 1)
        answer = await call(client, "POST", "/select_split", {"token_ids": PROMPT + [1] * 16})
        assert answer["prefill"] is None
        assert answer["reason"] == "one worker: 16 of 80 prompt tokens are left to compute there"
        await call(client, "POST", "/workers/1/load", {"kv_used_blocks": 5, "kv_total_blocks": 10, "dp_rank": 3}, 400)
        assert set(await call(client, "GET", "/dump")) == {"default:default", "default:default:prefill"}
        ready = await call(client, "GET", "/ready")
        assert set(ready["index_modes"]) == {"default/default/1/0", "default/default/prefill/2/0"}


@pytest.mark.parametrize(
    ("path", "body", "status", "part"),
    [
        ("/select", {"model_name": "other"}, 404, "no worker of model 'other'"),
        ("/select", {"colour": 1}, 400, "colour"),
        ("/select", {"token_ids": ["x"]}, 400, "token_ids"),
        ("/select", {"token_ids": [-1]}, 400, "token id"),
        ("/select", {"hints": {"instance_id": 9}}, 400, "pinned instance"),
        ("/workers", {"worker_id": 3, "block_size": 32}, 400, "32"),
        ("/events", {"worker_id": 9, "events": []}, 400, "unknown worker"),
        ("/events", {"worker_id": 1, "events": [{"type": "moved", "event_id": 1}]}, 400, "moved"),
        ("/events", {"worker_id": 1, "events": [], "block_size": 32}, 400, "block size 32"),
        ("/reservations/x/prefill_complete", {}, 404, "'x'"),
        ("/v1/nothing", {}, 404, "/v1/nothing"),
    ],
)
async def test_says_what_is_wrong(client, path, body, status, part):
    await register(client, 1)
    answer = await call(client, "POST", path, body, status)
    assert part in answer["error"]["message"]


async def test_the_number_of_routers_is_bounded(client):
    await register(client, 1)
    await register(client, 2, model_name="b")
    await call(client, "POST", "/workers", {"worker_id": 3, "block_size": 16, "model_name": "c"}, 500)
    await call(client, "GET", "/v1/decisions/none", status=404)


def test_events_name_their_rank():
    body = read_body(EventsBody, b'{"worker_id": 1, "dp_rank": 2, "events": [{"type": "cleared", "event_id": 5}]}')
    assert body.batch(16).worker.dp_rank == 2


async def test_explain_prints_a_running_services_decision(client):
    await register(client, 1)
    await register(client, 2)
    await store(client, 2)
    hints = {"excluded_instance_ids": [1]}
    answer = await call(client, "POST", "/select_and_reserve", {"token_ids": PROMPT, "hints": hints})
    await call(client, "DELETE", f"/reservations/{answer['reservation_id']}", {"cached_tokens": 64})
    printed = []
    url = str(client.make_url("/"))
    assert await asyncio.to_thread(explain, [answer["decision_id"], "--url", url], printed.append) == 0
    assert "went to worker 2/0 by policy kv" in printed[0]
    assert "the engine reported 64 cached tokens" in printed[0]
    assert "excluded by the request" in printed[0]
    assert "chosen" in printed[0].splitlines()[5]


async def test_serve_runs_until_it_is_told_to_stop():
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "import sys; from dynamo_router._cli import main; sys.exit(main())"),
        *("serve", "--port", "0"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(30):
        line = (await process.stdout.readline()).decode()
        url = line.rsplit(" ", 1)[1].strip()
        async with ClientSession() as session, session.get(f"{url}/health") as response:
            assert response.status == 200
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
        assert await process.stderr.read() == b""


def test_a_decision_without_candidates_says_how_to_get_them():
    assert "receipts=on" in render(RoutingDecision("d", "r", WorkerId(1), "kv"), None)


def test_a_term_of_nothing_is_explained_without_a_sign():
    score = CandidateScore(WorkerId(1), cost=0.5, weighted={"prefill": 0.5, "credit": -0.0})
    words = render(RoutingDecision("d-1", "r-1", WorkerId(1), "kv", candidates=(score,)), None).split()
    assert "0" in words
    assert "-0" not in words
