"""Whatever bytes a peer sends to a bus: they are counted, and events of others arrive as before."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import nats
import pytest
import zmq

from dynamo_core.clock import SystemClock
from dynamo_core.discovery import EventChannel, quote_segment
from dynamo_core.errors import UnavailableError
from dynamo_core.events import EventEnvelope
from dynamo_core.ids import PublisherId
from dynamo_core.planes import Topic
from dynamo_core.wire import EVENT_CHANNEL
from dynamo_runtime._bus._metrics import MALFORMED
from dynamo_runtime._bus.broker import ZmqBroker
from dynamo_runtime._bus.bus import ZmqEventBus
from dynamo_runtime._bus.nats import NatsEventBus
from dynamo_runtime._bus.options import BusOptions
from dynamo_runtime._bus.subscription import ZmqSubscription
from dynamo_runtime._bus.wire import Packet, ReplayPart, ReplayQuery, encode, topic_frame
from dynamo_runtime._discovery.file import FileDiscovery
from dynamo_runtime._plane.nats_link import nats_target

pytestmark = pytest.mark.asyncio(loop_factories=["uvloop"])
TOPIC = Topic("events", "test")
STRANGER = 7
EVENT = EventEnvelope(str(TOPIC), STRANGER, 1, b"payload", "schema", 1.0, {"a": "b"})
PACKETS = [encode(Packet(STRANGER, 1, [EVENT])), encode(Packet(STRANGER, 9)), encode(Packet(STRANGER, 0))]
ANSWERS = [encode(ReplayPart([EVENT], done)) for done in (True, False)] + [encode(ReplayPart([], done=True))]
GREETING = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\0NULL".ljust(64, b"\0")
"""ZMTP's, after which a peer sends its first command."""


def questions(publisher: int) -> list[bytes]:
    asked = ReplayQuery(publisher, 1, 5), ReplayQuery(publisher, 1, None), ReplayQuery(publisher, snapshot=True)
    return [encode(query) for query in asked]


async def heard(subscription: Any, publisher: Any, payload: bytes) -> None:
    """Publish, and take what comes until that is among it."""
    publisher.publish(payload)
    async with asyncio.timeout(20):
        async for item in subscription:
            if isinstance(item, EventEnvelope) and (item.publisher_id, item.payload) == (publisher.id, payload):
                return


@asynccontextmanager
async def zmq_buses(root: Path, broker: str = "") -> AsyncIterator[tuple[ZmqEventBus, ZmqEventBus, FileDiscovery]]:
    stores = [FileDiscovery(root, clock=SystemClock()) for _ in range(2)]
    options = BusOptions(broker=broker, replay_timeout_s=2.0, join_timeout_s=2.0)
    buses = [
        ZmqEventBus("zmq://127.0.0.1:0", discovery=store, clock=SystemClock(), options=options) for store in stores
    ]
    for store in stores:
        await store.start()
    try:
        yield buses[0], buses[1], stores[1]
    finally:
        for bus in buses:
            await bus.close()
        for store in stores:
            await store.close()


async def raw(address: str, data: bytes) -> None:
    """Send bytes to a ZeroMQ socket's port and see it close or wait."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))
    with contextlib.suppress(OSError):
        writer.write(data)
        writer.write_eof()
        async with asyncio.timeout(20):
            await reader.read()
    writer.close()


async def channel_of(discovery: FileDiscovery, publisher: Any) -> EventChannel:
    channels = [EVENT_CHANNEL.decode(record.value) for record in await discovery.list("v1/event_channels/")]
    return next(channel for channel in channels if channel.publisher_id == publisher.id)


@pytest.mark.parametrize("way", ["direct", "broker"])
async def test_zmq_ports_take_any_bytes(way: str, tmp_path: Path, hostile: Any, flat_memory: Any) -> None:
    broker = ZmqBroker()
    broker.start("127.0.0.1", 0)
    place = f"127.0.0.1:{broker.port}" if way == "broker" else ""
    async with zmq_buses(tmp_path, place) as (one, other, discovery):
        publisher, subscription = await one.publisher(TOPIC), await other.subscribe(TOPIC)
        await heard(subscription, publisher, b"before")
        channel = await channel_of(discovery, publisher)
        ports = [channel.address, channel.replay_address] + ([f"tcp://127.0.0.1:{broker.port}"] if place else [])
        # A frame that promises 2 GiB after a greeting as it should be.
        frames = [b"\x02" + (2 << 30).to_bytes(8, "big"), b"\x04\x05READY", b"\0\x08" + b"\x01events"]
        with flat_memory():
            for data in hostile(frames):
                for port in ports:
                    await raw(port, data)
                    await raw(port, GREETING + data)
        await heard(subscription, publisher, b"after")
        assert len(await subscription.replay(publisher.id, 1)) == 2
    await broker.close()


@pytest.mark.parametrize("way", ["direct", "broker"])
async def test_zmq_subscribers_take_any_packets(way: str, tmp_path: Path, hostile: Any, flat_memory: Any) -> None:
    broker = ZmqBroker()
    broker.start("127.0.0.1", 0)
    place = f"127.0.0.1:{broker.port}" if way == "broker" else ""
    async with zmq_buses(tmp_path, place) as (one, other, discovery):
        publisher, subscription = await one.publisher(TOPIC), await other.subscribe(TOPIC)
        await heard(subscription, publisher, b"before")
        with zmq.Context() as context, context.socket(zmq.XPUB) as enemy:
            enemy.setsockopt(zmq.LINGER, 0)
            if place:
                enemy.connect(f"tcp://{place}")
            else:
                port = enemy.bind_to_random_port("tcp://127.0.0.1")
                false = EventChannel(str(TOPIC), STRANGER, f"tcp://127.0.0.1:{port}", f"tcp://127.0.0.1:{port}")
                await discovery.put(false.key, EVENT_CHANNEL.encode(false))
            async with asyncio.timeout(20):
                while not enemy.poll(0):
                    await asyncio.sleep(0.005)
            with flat_memory():
                for data in hostile(PACKETS):
                    enemy.send_multipart([topic_frame(str(TOPIC)), data])
                    enemy.send_multipart([topic_frame(str(TOPIC)), b"", data])
                    enemy.send_multipart([topic_frame(str(TOPIC))])
                    await asyncio.sleep(0)
            async with asyncio.timeout(20):
                while not other.counts[MALFORMED]:
                    await asyncio.sleep(0.005)
        await heard(subscription, publisher, b"after")
    await broker.close()


async def test_zmq_publishers_take_any_questions(tmp_path: Path, hostile: Any, flat_memory: Any) -> None:
    async with zmq_buses(tmp_path) as (one, other, discovery):
        publisher, subscription = await one.publisher(TOPIC), await other.subscribe(TOPIC)
        await heard(subscription, publisher, b"before")
        channel = await channel_of(discovery, publisher)
        with zmq.Context() as context, context.socket(zmq.DEALER) as enemy, context.socket(zmq.XSUB) as listener:
            enemy.setsockopt(zmq.LINGER, 0)
            listener.setsockopt(zmq.LINGER, 0)
            enemy.connect(channel.replay_address)
            listener.connect(channel.address)
            with flat_memory():
                for data in hostile([*questions(publisher.id), *questions(STRANGER)]):
                    enemy.send(data)
                    enemy.send_multipart([data, data])
                    listener.send(b"\x01" + data)
                    listener.send(data)
                    await asyncio.sleep(0)
            async with asyncio.timeout(20):
                while not one.counts[MALFORMED]:
                    await asyncio.sleep(0.005)
        await heard(subscription, publisher, b"after")
        assert len(await subscription.replay(publisher.id, 1)) == 2


async def test_zmq_askers_take_any_answers(tmp_path: Path, hostile: Any, flat_memory: Any) -> None:
    async with zmq_buses(tmp_path) as (one, other, discovery):
        publisher, subscription = await one.publisher(TOPIC), await other.subscribe(TOPIC)
        assert isinstance(subscription, ZmqSubscription)
        await heard(subscription, publisher, b"before")
        with zmq.Context() as context, context.socket(zmq.ROUTER) as enemy:
            enemy.setsockopt(zmq.LINGER, 0)
            port = enemy.bind_to_random_port("tcp://127.0.0.1")
            address = (await channel_of(discovery, publisher)).address
            false = EventChannel(str(TOPIC), STRANGER, address, f"tcp://127.0.0.1:{port}")
            await discovery.put(false.key, EVENT_CHANNEL.encode(false))
            async with asyncio.timeout(20):
                while len(subscription._channels) < 2:
                    await asyncio.sleep(0.005)

            async def lie(data: bytes) -> None:
                async with asyncio.timeout(20):
                    while not enemy.poll(0):
                        await asyncio.sleep(0.001)
                peer, _ = enemy.recv_multipart()
                enemy.send_multipart([peer, data])
                enemy.send_multipart([peer, b""])

            with flat_memory():
                for data in hostile(ANSWERS):
                    lying = asyncio.create_task(lie(data))
                    with contextlib.suppress(UnavailableError):
                        await subscription.replay(PublisherId(STRANGER), 1)
                    await lying
        await heard(subscription, publisher, b"after")


async def test_nats_bus_takes_any_messages(shared_nats: Any, hostile: Any, flat_memory: Any) -> None:
    target, _, _ = nats_target(f"nats://{shared_nats.host_port}", {})
    one, other = (NatsEventBus(target, clock=SystemClock(), options=BusOptions(replay_timeout_s=2.0)) for _ in range(2))
    await one.start()
    await other.start()
    publisher, subscription = await one.publisher(TOPIC), await other.subscribe(TOPIC)
    await heard(subscription, publisher, b"before")
    enemy = await nats.connect(f"nats://{shared_nats.host_port}")
    topic = quote_segment(str(TOPIC))

    async def lie(message: Any) -> None:
        await enemy.publish(message.reply, lies.pop())
        await enemy.publish(message.reply, b"")

    lies: list[bytes] = []
    await enemy.subscribe(f"dynamo.replay.{STRANGER:x}", cb=lie)
    asked = [*questions(publisher.id), *questions(STRANGER)]
    with flat_memory():
        for data in hostile([*PACKETS, *asked, *ANSWERS]):
            await enemy.publish(f"dynamo.events.{topic}", data)
            await enemy.publish(f"dynamo.hello.{topic}", data)
            await enemy.publish(f"dynamo.hello.{topic}", data, reply=f"dynamo.events.{topic}")
            await enemy.publish(f"dynamo.replay.{publisher.id:x}", data)
            await enemy.publish(f"dynamo.replay.{publisher.id:x}", data, reply=f"dynamo.events.{topic}")
            lies[:] = [data]
            with contextlib.suppress(UnavailableError):
                await subscription.replay(PublisherId(STRANGER), 1)
        await enemy.flush()
    await heard(subscription, publisher, b"after")
    assert one.metrics.counts[MALFORMED] > 0
    assert other.metrics.counts[MALFORMED] > 0
    assert len(await subscription.replay(publisher.id, 1)) == 2
    await enemy.close()
    await other.close()
    await one.close()
