"""Bare engines behind a hosted router: found in discovery, heard over real ZMQ in the engines' own encodings."""

from __future__ import annotations

import asyncio
import hashlib
import struct
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from dynamo_core.cards import ModelCard, ModelRuntimeConfig
from dynamo_core.discovery import Instance, ModelRecord
from dynamo_core.enums import HealthState
from dynamo_core.errors import InvalidRequestError
from dynamo_core.ids import EndpointId, WorkerId
from dynamo_core.routing import RouterScope, RoutingRequest
from dynamo_core.tokens import pack_tokens
from dynamo_core.wire import INSTANCE, MODEL_RECORD
from dynamo_router import create_router
from dynamo_router._engine_address import read_dp_size, read_engine_address
from dynamo_router._engine_events import SourceState
from dynamo_router._indexer import StreamState

ENDPOINT = EndpointId("ns", "backend", "generate")
CARD = ModelCard("m", kv_block_size=4)
PROMPT = list(range(32))


class VllmBlockStored(msgspec.Struct, array_like=True, omit_defaults=True, tag="BlockStored"):
    block_hashes: list[Any]
    parent_block_hash: Any
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None = None
    lora_name: str | None = None


class VllmBatch(msgspec.Struct, array_like=True, omit_defaults=True):
    ts: float
    events: list[Any]
    data_parallel_rank: int | None = None


class SglangBlockStored(msgspec.Struct, array_like=True, omit_defaults=True, tag="BlockStored"):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None = None


class SglangBatch(msgspec.Struct, array_like=True, omit_defaults=True):
    ts: float
    events: list[Any]
    attn_dp_rank: int | None = None


def vllm_hash(number):
    return hashlib.sha256(str(number).encode()).digest()


def sglang_hash(number):
    return struct.unpack("<q", hashlib.sha256(str(number).encode()).digest()[:8])[0]


def vllm_stored(first, count, rank=None):
    names = [vllm_hash(first + offset) for offset in range(count)]
    parent = vllm_hash(first - 1) if first else None
    tokens = PROMPT[first * 4 : (first + count) * 4]
    return VllmBatch(1.0, [VllmBlockStored(names, parent, tokens, 4, None, "GPU")], rank)


def sglang_stored(first, count, rank=None):
    names = [sglang_hash(first + offset) for offset in range(count)]
    parent = sglang_hash(first - 1) if first else None
    tokens = PROMPT[first * 4 : (first + count) * 4]
    return SglangBatch(1.0, [SglangBlockStored(names, parent, tokens, 4, None)], rank)


DIALECTS = {"vllm": vllm_stored, "sglang": sglang_stored}


class Engine:
    """A stock engine's publisher: XPUB, so that a test sees who subscribes, and a replay ROUTER."""

    def __init__(self, topic=b""):
        self.context = zmq.asyncio.Context()
        self.pub = self.context.socket(zmq.XPUB)
        self.endpoint = f"tcp://127.0.0.1:{self.pub.bind_to_random_port('tcp://127.0.0.1')}"
        self.router = self.context.socket(zmq.ROUTER)
        self.replay_endpoint = f"tcp://127.0.0.1:{self.router.bind_to_random_port('tcp://127.0.0.1')}"
        self.topic = topic
        self.sent = []
        self.task = asyncio.create_task(self._answer())

    async def _answer(self):
        while True:
            client, _, number = await self.router.recv_multipart()
            for sequence in range(struct.unpack(">Q", number)[0], len(self.sent)):
                await self.router.send_multipart([client, b"", struct.pack(">Q", sequence), self.sent[sequence]])
            await self.router.send_multipart([client, b"", struct.pack(">q", -1), b""])

    async def publish(self, batch):
        self.sent.append(msgspec.msgpack.encode(batch))
        await self.pub.send_multipart([self.topic, struct.pack(">Q", len(self.sent) - 1), self.sent[-1]])

    async def subscription(self):
        async with asyncio.timeout(10):
            return await self.pub.recv()

    async def close(self):
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.context.destroy(linger=0)


@pytest.fixture
async def engine():
    made = Engine()
    yield made
    await made.close()


@asynccontextmanager
async def routed(planes, **options):
    router = create_router(planes.context, RouterScope(ENDPOINT, CARD, "kv", options))
    await router.start()
    try:
        yield router
    finally:
        await router.stop()


async def add(planes, number, **metadata):
    instance = Instance(ENDPOINT, number, "http://127.0.0.1:1", metadata=metadata)
    await planes.discovery.put(instance.key, INSTANCE.encode(instance))
    return instance


def held(router, worker):
    return router.indexer.index.blocks_of(worker)


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_an_engine_is_followed_while_its_instance_is_there(planes, engine, dialect):
    stored = DIALECTS[dialect]
    async with routed(planes) as router:
        instance = await add(planes, 1, kv_events_endpoint=engine.endpoint, kv_events_dialect=dialect)
        await add(planes, 2)
        assert await engine.subscription() == b"\x01"
        await engine.publish(stored(0, 5))
        await engine.publish(stored(5, 3))
        await planes.until(lambda: held(router, WorkerId(1)) == 8)
        decision = await router.select(RoutingRequest("r", token_ids=pack_tokens(PROMPT)))
        assert (decision.worker, decision.overlap_blocks, decision.index_mode) == (WorkerId(1), 8, "exact")
        assert router.health().state is HealthState.READY
        assert not planes.queries
        await planes.discovery.delete(instance.key)
        assert await engine.subscription() == b"\x00"
        assert router.workers() == [WorkerId(2)]
        assert held(router, WorkerId(1)) == 0


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_what_an_engine_held_before_is_replayed(planes, engine, dialect):
    await engine.publish(DIALECTS[dialect](0, 8))
    await add(
        planes, 1, kv_events_endpoint=engine.endpoint, kv_events_replay_endpoint=engine.replay_endpoint, dp_size="1"
    )
    async with routed(planes) as router:
        await planes.until(lambda: held(router, WorkerId(1)) == 8)
        assert router.indexer.stream(WorkerId(1)).state is StreamState.LIVE


async def test_a_topic_is_subscribed_to(planes):
    engine = Engine(b"kv-events")
    try:
        async with routed(planes) as router:
            await add(planes, 1, kv_events_endpoint=engine.endpoint, kv_events_topic="kv-events")
            assert await engine.subscription() == b"\x01kv-events"
            await engine.publish(vllm_stored(0, 2))
            await planes.until(lambda: held(router, WorkerId(1)) == 2)
    finally:
        await engine.close()


async def test_an_instance_that_returns_begins_a_new_stream(planes, engine):
    names = {"kv_events_endpoint": engine.endpoint, "kv_events_replay_endpoint": engine.replay_endpoint}
    await engine.publish(vllm_stored(0, 8))
    async with routed(planes) as router:
        instance = await add(planes, 1, **names)
        await planes.until(lambda: held(router, WorkerId(1)) == 8)
        await planes.discovery.delete(instance.key)
        await add(planes, 1, **names)
        await planes.until(lambda: router.workers() == [WorkerId(1)])
        await planes.until(lambda: held(router, WorkerId(1)) == 8)
        assert router.indexer.stream(WorkerId(1)).last_id == 1


async def test_an_engine_that_moves_is_followed(planes, engine):
    other = Engine()
    try:
        async with routed(planes) as router:
            await add(planes, 1, kv_events_endpoint=engine.endpoint)
            assert await engine.subscription() == b"\x01"
            await add(planes, 1, kv_events_endpoint=other.endpoint)
            assert await engine.subscription() == b"\x00"
            assert await other.subscription() == b"\x01"
            await other.publish(vllm_stored(0, 3))
            await planes.until(lambda: held(router, WorkerId(1)) == 3)
    finally:
        await other.close()


async def test_ranks_are_workers_and_are_told_apart(planes, engine):
    async with routed(planes) as router:
        # All ranks of this engine publish on one socket and name themselves, as one without port offsets would.
        await add(planes, 1, kv_events_endpoint=engine.endpoint, dp_size="2")
        assert await engine.subscription() == b"\x01"
        assert router.workers() == [WorkerId(1, 0), WorkerId(1, 1)]
        await engine.publish(sglang_stored(0, 4, rank=1))
        await planes.until(lambda: held(router, WorkerId(1, 1)) == 4)
        assert held(router, WorkerId(1, 0)) == 0


async def test_lost_messages_without_replay_are_not_asked_for(planes, engine):
    async with routed(planes) as router:
        await add(planes, 1, kv_events_endpoint=engine.endpoint)
        assert await engine.subscription() == b"\x01"
        await engine.publish(vllm_stored(0, 2))
        engine.sent.append(b"lost")
        await engine.publish(vllm_stored(2, 2))
        await planes.until(lambda: held(router, WorkerId(1)) == 4)
        stream = router.indexer.stream(WorkerId(1))
        assert stream.state is StreamState.LOSSY
        assert "lost" in stream.detail
        assert not planes.queries


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ({"kv_events_dialect": "trt"}, "kv_events_dialect of instance 1 is 'trt'; give vllm or sglang"),
        ({"dp_size": "many"}, "dp_size of instance 1 is 'many'; give 1 to 1024"),
        ({"dp_size": "0"}, "dp_size"),
        ({"kv_events_endpoint": "ipc:///e", "dp_size": "2"}, "no port"),
        ({"kv_events_endpoint": "nowhere"}, "'nowhere'"),
    ],
)
async def test_metadata_that_cannot_be_used_is_named_and_the_worker_still_serves(planes, metadata, complaint):
    async with routed(planes) as router:
        await add(planes, 1, **{"kv_events_endpoint": "tcp://127.0.0.1:1", **metadata})
        await planes.until(lambda: complaint in router.health().reason)
        assert router.health().state is HealthState.DEGRADED
        decision = await router.select(RoutingRequest("r", token_ids=pack_tokens(PROMPT)))
        assert decision.worker.instance_id == 1


async def test_cards_that_come_late_keep_the_stream(planes, engine):
    async with routed(planes) as router:
        await add(planes, 1, kv_events_endpoint=engine.endpoint)
        assert await engine.subscription() == b"\x01"
        await engine.publish(vllm_stored(0, 2))
        await planes.until(lambda: held(router, WorkerId(1)) == 2)
        card = ModelCard("m", kv_block_size=4, runtime_config=ModelRuntimeConfig(total_kv_blocks=9))
        record = ModelRecord(ENDPOINT, 1, card)
        await planes.discovery.put(record.key, MODEL_RECORD.encode(record))
        await engine.publish(vllm_stored(2, 2))
        await planes.until(lambda: held(router, WorkerId(1)) == 4)
        assert router._engines.counts()[SourceState.ACTIVE] == 1


async def test_without_kv_events_no_engine_is_followed(planes, engine):
    async with routed(planes, use_kv_events=False) as router:
        await add(planes, 1, kv_events_endpoint=engine.endpoint)
        await planes.until(lambda: router.workers() == [WorkerId(1)])
        assert sum(router._engines.counts().values()) == 0


def test_ranks_count_from_the_first():
    instance = Instance(
        ENDPOINT,
        1,
        "",
        metadata={"kv_events_endpoint": "tcp://h:5557", "kv_events_replay_endpoint": "tcp://h:6557", "dp_size": "2"},
    )
    assert read_dp_size(instance) == 2
    address = read_engine_address(instance, range(4, 6))
    assert address.endpoints == {4: "tcp://h:5557", 5: "tcp://h:5558"}
    assert address.replay_endpoints == {4: "tcp://h:6557", 5: "tcp://h:6558"}
    assert read_dp_size(Instance(ENDPOINT, 1, "")) is None
    assert read_engine_address(Instance(ENDPOINT, 1, ""), range(1)) is None
    with pytest.raises(InvalidRequestError, match="no port"):
        read_engine_address(Instance(ENDPOINT, 1, "", metadata={"kv_events_endpoint": "ipc:///e"}), range(2))
