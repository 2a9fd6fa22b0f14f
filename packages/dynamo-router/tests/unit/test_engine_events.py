from __future__ import annotations

import asyncio
import struct

import msgspec
import pytest
import zmq
import zmq.asyncio
from aiohttp.test_utils import TestClient, TestServer

from dynamo_core.cards import ModelCard
from dynamo_core.enums import Tier
from dynamo_core.errors import BackendProtocolError, InvalidRequestError
from dynamo_core.events import BlockRemoved, BlocksCleared, BlockStored, UnknownKvEvent
from dynamo_core.ids import WorkerId
from dynamo_core.routing import RoutingRequest
from dynamo_core.tokens import BlockHasher, pack_hashes, pack_tokens, unpack_hashes
from dynamo_router import EngineEventSource, KvRouter, RouterSettings
from dynamo_router._engine_address import rank_endpoint
from dynamo_router._engine_events import SourceState
from dynamo_router._engine_wire import open_message, read_event
from dynamo_router._indexer import StreamState
from dynamo_router._service import SelectionService

WORKER = WorkerId(1)
PROMPT = list(range(32))


def stored(first, count, *, start=100):
    """Blocks ``first..`` of the prompt under the engine's own names, as vLLM's arrays."""
    names = [start + first + offset for offset in range(count)]
    parent = start + first - 1 if first else None
    return ["BlockStored", names, parent, PROMPT[first * 4 : (first + count) * 4], 4, None, "GPU"]


class Engine:
    """A PUB and a ROUTER socket that behave like an engine's publisher."""

    def __init__(self, *, replays=True):
        self.context = zmq.asyncio.Context()
        self.pub = self.context.socket(zmq.XPUB)
        self.port = self.pub.bind_to_random_port("tcp://127.0.0.1")
        self.endpoint = f"tcp://127.0.0.1:{self.port}"
        self.router = self.context.socket(zmq.ROUTER)
        self.replay_endpoint = f"tcp://127.0.0.1:{self.router.bind_to_random_port('tcp://127.0.0.1')}"
        self.sent = []
        self.asked = []
        self.answered = 0
        self.forgotten = 0
        self.task = asyncio.create_task(self.answer()) if replays else None

    async def answer(self):
        while True:
            client, _, number = await self.router.recv_multipart()
            first = struct.unpack(">Q", number)[0]
            self.asked.append(first)
            for sequence, payload in enumerate(self.sent):
                if sequence >= max(first, self.forgotten):
                    await self.router.send_multipart([client, b"", struct.pack(">Q", sequence), payload])
            await self.router.send_multipart([client, b"", struct.pack(">q", -1), b""])
            self.answered += 1

    def drop(self, *events, rank=0):
        """A message that is in the buffer but never reaches the subscriber."""
        self.sent.append(msgspec.msgpack.encode([1.0, list(events), rank]))

    async def publish(self, *events, rank=0):
        self.drop(*events, rank=rank)
        await self.pub.send_multipart([b"", struct.pack(">Q", len(self.sent) - 1), self.sent[-1]])

    async def subscribed(self):
        async with asyncio.timeout(10):
            assert await self.pub.recv() == b"\x01"

    async def close(self):
        if self.task:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
        self.context.destroy(linger=0)


@pytest.fixture
async def engine():
    made = Engine()
    yield made
    await made.close()


@pytest.fixture
def router():
    made = KvRouter(block_size=4, policy="kv")
    made.upsert_worker(WORKER, ModelCard("m", kv_block_size=4))
    return made


@pytest.fixture
async def follow(router):
    sources = []

    async def make(engine, *, replay=True):
        source = EngineEventSource(
            router.apply_events, WORKER, engine.endpoint, replay_endpoint=engine.replay_endpoint if replay else ""
        )
        sources.append(source)
        await source.start()
        await engine.subscribed()
        return source

    yield make
    for source in sources:
        await source.close()


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def held(router):
    request = RoutingRequest("r", token_ids=pack_tokens(PROMPT), reserve=False)
    return (await router.select(request)).tier_blocks


async def test_what_an_engine_stores_is_found_by_its_tokens(engine, router, follow):
    source = await follow(engine)
    await engine.publish(stored(0, 3))
    await engine.publish(
        {"type": "BlockStored", "block_hashes": [(103).to_bytes(32, "big")], "token_ids": PROMPT[12:16]}
        | {"parent_block_hash": (102).to_bytes(32, "big"), "block_size": 4, "medium": "cpu"}
    )
    await until(lambda: source.counts["messages"] == 2)
    assert await held(router) == {"device": 3, "host_pinned": 1}
    await engine.publish(["BlockRemoved", [102], "GPU"])
    await until(lambda: source.counts["messages"] == 3)
    assert await held(router) == {"device": 2}
    await engine.publish(["AllBlocksCleared"])
    await until(lambda: source.counts["messages"] == 4)
    assert await held(router) == {}
    assert router.indexer.stream(WORKER).state is StreamState.LIVE
    assert source.state is SourceState.ACTIVE


async def test_what_was_published_before_is_replayed(engine, router, follow):
    engine.drop(stored(0, 2))
    engine.drop(stored(2, 2))
    source = await follow(engine)
    await until(lambda: source.counts["replayed"] == 2)
    assert await held(router) == {"device": 4}
    await engine.publish(stored(4, 1))
    await until(lambda: source.counts["messages"] == 3)
    assert await held(router) == {"device": 5}
    assert engine.asked == [0]


async def test_a_gap_is_filled_from_the_replay_socket(engine, router, follow):
    source = await follow(engine)
    await until(lambda: engine.answered)
    await engine.publish(stored(0, 1))
    engine.drop(stored(1, 1))
    engine.drop(stored(2, 1))
    await engine.publish(stored(3, 1))
    await until(lambda: source.counts["messages"] == 4)
    assert await held(router) == {"device": 4}
    assert engine.asked == [0, 1]
    assert router.indexer.stream(WORKER).state is StreamState.LIVE


async def test_what_the_buffer_lost_makes_the_stream_lossy(engine, router, follow):
    source = await follow(engine)
    await until(lambda: engine.answered)
    await engine.publish(stored(0, 1))
    await until(lambda: source.counts["messages"] == 1)
    for position in range(1, 4):
        engine.drop(stored(position, 1))
    engine.forgotten = 3
    await engine.publish(stored(4, 1))
    await until(lambda: source.counts["messages"] == 3)
    assert source.counts["lost"] == 1
    assert router.indexer.stream(WORKER).state is StreamState.LOSSY


async def test_without_a_replay_socket_a_gap_shows(engine, router, follow):
    source = await follow(engine, replay=False)
    await engine.publish(stored(0, 1))
    engine.drop(stored(1, 1))
    await engine.publish(stored(2, 1, start=500))
    await until(lambda: source.counts["messages"] == 2)
    assert router.indexer.stream(WORKER).state is StreamState.LOSSY
    assert engine.asked == []


async def test_an_engine_that_begins_anew_holds_nothing(engine, router, follow):
    source = await follow(engine)
    await until(lambda: engine.answered)
    await engine.publish(stored(0, 4))
    await until(lambda: source.counts["messages"] == 1)
    engine.sent.clear()
    await engine.publish(stored(0, 1))
    await until(lambda: source.counts["messages"] == 2)
    assert source.counts["restarts"] == 1
    assert await held(router) == {"device": 1}
    assert router.indexer.stream(WORKER).state is StreamState.LIVE


async def test_a_message_names_its_rank(engine, router, follow):
    second = WorkerId(1, 1)
    router.upsert_worker(second, ModelCard("m", kv_block_size=4))
    source = await follow(engine)
    await engine.publish(stored(0, 2), rank=1)
    await engine.publish(stored(0, 2), rank=7)
    await until(lambda: source.counts["messages"] == 2)
    assert router.indexer.index.blocks_of(second) == 2
    assert router.indexer.index.blocks_of(WORKER) == 0
    assert source.counts["refused"] == 1


async def test_another_block_size_is_refused_and_garbage_is_counted(engine, router, follow):
    source = await follow(engine)
    await engine.pub.send_multipart([b"alone"])
    await engine.publish(["BlockStored", [1], None, PROMPT[:8], 8, None, None])
    await engine.publish(["BlockStored", [1], None, PROMPT[:3], 4, None, None])
    await until(lambda: source.counts["messages"] == 2)
    assert (source.counts["malformed"], source.counts["refused"], source.counts["lost"]) == (1, 1, 1)
    assert "block size 8" in router.indexer.stream(WORKER).detail


async def test_an_address_that_is_none_is_named(router):
    source = EngineEventSource(router.apply_events, WORKER, "nowhere")
    with pytest.raises(InvalidRequestError, match="'nowhere'"):
        await source.start()
    assert source.state is SourceState.CLOSED
    await source.close()


async def test_closing_before_the_first_message_ends_at_once(engine, router):
    source = EngineEventSource(router.apply_events, WORKER, engine.endpoint)
    await source.start()
    await source.close()
    assert source.state is SourceState.CLOSED


def test_every_form_of_an_event_is_read():
    local = BlockHasher(4).hash_tokens(pack_tokens(PROMPT[:4])).local
    as_array = ["BlockStored", [-1], 7, PROMPT[:4], 4, None, "DISK", None, None, "something new"]
    event, size = read_event(as_array, 5)
    assert event == BlockStored(5, pack_hashes([2**64 - 1]), local, 7, tier=Tier.DISK)
    assert size == 4
    assert read_event({"type": "BlockRemoved", "block_hashes": [3], "medium": "TAPE"}, 6) == (
        BlockRemoved(6, pack_hashes([3]), Tier.UNKNOWN),
        0,
    )
    assert read_event(["AllBlocksCleared"], 7) == (BlocksCleared(7), 0)
    assert read_event({"type": "BlockMoved"}, 8) == (UnknownKvEvent(8, "BlockMoved"), 0)
    assert open_message(msgspec.msgpack.encode((0.5, [], 3))).dp_rank == 3
    assert open_message(msgspec.msgpack.encode((0.5, []))).dp_rank is None


def test_adapters_and_images_keep_blocks_apart():
    plain = ["BlockStored", [1, 2], None, PROMPT[:8], 4, None, None]
    named = read_event([*plain, "sql", [["sql"], None]], 1)[0]
    assert named.lora == "sql"
    assert named.local_hashes == BlockHasher(4, lora="sql").hash_tokens(pack_tokens(PROMPT[:8])).local
    numbered = read_event([*plain[:5], 3, None], 1)[0]
    assert numbered.lora == "lora-3"
    pictured = unpack_hashes(read_event([*plain, None, [None, ["image-hash"]]], 1)[0].local_hashes)
    text = unpack_hashes(read_event(plain, 1)[0].local_hashes)
    assert pictured[0] == text[0]
    assert pictured[1] != text[1]


@pytest.mark.parametrize("payload", [b"\xc1", msgspec.msgpack.encode(3), msgspec.msgpack.encode([1.0])])
def test_a_message_of_another_form_is_refused(payload):
    with pytest.raises(BackendProtocolError, match="cannot be read"):
        open_message(payload)


@pytest.mark.parametrize(
    "item", [3, {}, ["BlockStored", [1]], ["BlockRemoved", ["x"]], ["BlockStored", [1], None, [1], 0]]
)
def test_an_event_of_another_form_is_refused(item):
    with pytest.raises(BackendProtocolError):
        read_event(item, 1)


def test_ranks_are_counted_from_the_port():
    assert rank_endpoint("tcp://h:5557", 2) == "tcp://h:5559"
    assert rank_endpoint("ipc:///x", 0) == "ipc:///x"
    with pytest.raises(InvalidRequestError, match="no port"):
        rank_endpoint("ipc:///x", 1)


async def test_the_service_follows_the_engines_that_workers_name(engine):
    service = SelectionService(RouterSettings(policy="kv"))
    async with TestClient(TestServer(service.application())) as client:
        body = {
            "worker_id": 1,
            "block_size": 4,
            "kv_events_endpoints": {"0": engine.endpoint},
            "replay_endpoint": engine.replay_endpoint,
        }
        response = await client.post("/workers", json=body)
        assert response.status == 201
        assert (await response.json())["listeners"] == {"0": "pending"}
        await client.post("/workers", json={"worker_id": 2, "block_size": 4})
        await engine.subscribed()
        await engine.publish(stored(0, 8))
        async with asyncio.timeout(10):
            while (await (await client.get("/workers")).json())[0]["listeners"] != {"0": "active"}:
                await asyncio.sleep(0.001)
        answer = await (await client.post("/select", json={"token_ids": PROMPT})).json()
        assert (answer["worker_id"], answer["overlap"]["gpu"], answer["index_mode"]) == (1, 32, "exact")
        assert (
            'engine_listeners{model="default/default",state="active"} 1.0'
            in await (await client.get("/metrics")).text()
        )
        wrong = await client.post("/workers", json={**body, "worker_id": 3, "kv_events_endpoints": {"4": "tcp://h:1"}})
        assert wrong.status == 400
        assert "dp rank 4" in (await wrong.json())["error"]["message"]
        wrong = await client.post("/workers", json={**body, "worker_id": 3, "kv_events_endpoints": {"0": "here"}})
        assert wrong.status == 400
        assert [worker["worker_id"] for worker in await (await client.get("/workers")).json()] == [1, 2]
        assert (await client.delete("/workers/1")).status == 200
