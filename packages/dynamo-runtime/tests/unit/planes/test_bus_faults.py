"""What the ZeroMQ bus does with late, lost, flooding and hostile publishers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from dynamo_core.clock import SystemClock
from dynamo_core.discovery import EventChannel
from dynamo_core.errors import ConfigurationError, PayloadTooLargeError, UnavailableError
from dynamo_core.events import EventEnvelope, SequenceGap
from dynamo_core.ids import PublisherId
from dynamo_core.planes import Topic
from dynamo_core.telemetry import Metrics
from dynamo_core.wire import EVENT_CHANNEL
from dynamo_runtime._bus._metrics import LOST, MALFORMED
from dynamo_runtime._bus.bus import ZmqEventBus, zmq_event_bus
from dynamo_runtime._bus.options import BusOptions
from dynamo_runtime._bus.wire import Packet, encode, topic_frame
from dynamo_runtime._discovery.file import FileDiscovery
from dynamo_runtime._discovery.options import FileDiscoveryOptions

TOPIC = Topic("events", "test")
URL = "zmq://127.0.0.1:0"


@asynccontextmanager
async def buses(root: Path, **options: Any) -> AsyncIterator[tuple[ZmqEventBus, ZmqEventBus, FileDiscovery]]:
    times = FileDiscoveryOptions(tend_interval_s=0.05, poll_interval_s=0.1)
    stores = [FileDiscovery(root, clock=SystemClock(), options=times) for _ in range(2)]
    made = [ZmqEventBus(URL, discovery=store, clock=SystemClock(), options=BusOptions(**options)) for store in stores]
    for store in stores:
        await store.start()
    try:
        yield made[0], made[1], stores[1]
    finally:
        for bus in made:
            await bus.close()
        for store in stores:
            await store.close()


async def take(subscription: Any, count: int) -> list[Any]:
    async with asyncio.timeout(20):
        return [await anext(subscription) for _ in range(count)]


def sequences(items: list[Any]) -> list[int]:
    assert all(isinstance(item, EventEnvelope) for item in items), items
    return [item.sequence for item in items]


async def test_new_publisher_loses_nothing_before_the_connection_stands(tmp_path: Path) -> None:
    async with buses(tmp_path) as (one, other, _):
        subscription = await other.subscribe(TOPIC)
        publisher = await one.publisher(TOPIC)
        for _ in range(100):
            publisher.publish(b"x")
        assert sequences(await take(subscription, 100)) == list(range(1, 101))
        publisher.publish(b"x")
        assert sequences(await take(subscription, 1)) == [101]


async def test_new_publisher_whose_ring_is_too_small_leaves_a_gap(tmp_path: Path) -> None:
    async with buses(tmp_path, ring_events=10) as (one, other, _):
        subscription = await other.subscribe(TOPIC)
        publisher = await one.publisher(TOPIC)
        for _ in range(100):
            publisher.publish(b"x")
        gap, *events = await take(subscription, 11)
        assert isinstance(gap, SequenceGap)
        assert (gap.publisher_id, gap.first, gap.last) == (publisher.id, 1, 90)
        assert sequences(events) == list(range(91, 101))
        assert other.counts[LOST] == 90


async def test_everything_after_subscribe_arrives_from_publishers_that_were_there(tmp_path: Path) -> None:
    async with buses(tmp_path) as (one, other, _):
        publishers = [await one.publisher(TOPIC) for _ in range(3)]
        for publisher in publishers:
            publisher.publish(b"before")
        subscription = await other.subscribe(TOPIC)
        for publisher in publishers:
            publisher.publish(b"after")
        events = await take(subscription, 3)
        assert [event.payload for event in events] == [b"after"] * 3


async def test_slow_subscriber_keeps_the_newest_and_is_told_the_rest(tmp_path: Path, until: Any) -> None:
    async with buses(tmp_path, buffer_events=10) as (one, other, _):
        subscription = await other.subscribe(TOPIC)
        publisher = await one.publisher(TOPIC)
        publisher.publish(b"x")
        await take(subscription, 1)
        for _ in range(49):
            publisher.publish(b"x")
        await until(lambda: other.counts[LOST] == 39)
        gap, *events = await take(subscription, 11)
        assert (gap.first, gap.last) == (2, 40)
        assert sequences(events) == list(range(41, 51))


async def test_killed_publisher_leaves_and_cannot_be_replayed(tmp_path: Path, spawn: Any) -> None:
    async with buses(tmp_path) as (_, other, discovery):
        subscription = await other.subscribe(TOPIC)
        child = await spawn("publish", tmp_path)
        publisher_id = PublisherId(int(await child.line()))
        for text in ("one", "two"):
            child.tell(text)
            await child.line()
        events = await take(subscription, 2)
        assert [event.payload for event in events] == [b"one", b"two"]
        assert len(await subscription.replay(publisher_id, 1)) == 2
        child.process.kill()
        await child.process.wait()
        async with asyncio.timeout(20):
            while await discovery.list("v1/event_channels/"):
                await asyncio.sleep(0.005)
        with pytest.raises(UnavailableError):
            await subscription.replay(publisher_id, 1)


async def test_publisher_that_does_not_answer_is_unavailable(tmp_path: Path) -> None:
    async with buses(tmp_path, replay_timeout_s=0.1, join_timeout_s=0.1) as (_, other, discovery):
        silent = EventChannel(str(TOPIC), 7, "tcp://127.0.0.1:9", "tcp://127.0.0.1:9")
        await discovery.put(silent.key, EVENT_CHANNEL.encode(silent))
        subscription = await other.subscribe(TOPIC)
        with pytest.raises(UnavailableError, match="did not answer"):
            await subscription.replay(PublisherId(7), 1)


async def test_heartbeat_reveals_a_loss_at_the_end(tmp_path: Path) -> None:
    """A publisher of the test's own loses its last events; only its next heartbeat tells."""
    async with buses(tmp_path) as (_, other, discovery):
        with zmq.Context() as context, context.socket(zmq.XPUB) as socket:
            port = socket.bind_to_random_port("tcp://127.0.0.1")
            channel = EventChannel(str(TOPIC), 7, f"tcp://127.0.0.1:{port}", f"tcp://127.0.0.1:{port}")
            await discovery.put(channel.key, EVENT_CHANNEL.encode(channel))
            joining = asyncio.create_task(other.subscribe(TOPIC))
            while not socket.poll(0):
                await asyncio.sleep(0.005)
            frame = topic_frame(str(TOPIC))
            for message in (
                Packet(7, 4),
                Packet(7, 5, [EventEnvelope(str(TOPIC), 7, 5, b"x")]),
                Packet(7, 5, [EventEnvelope(str(TOPIC), 7, 5, b"again")]),
                Packet(7, 8),
                Packet(7, 8),
            ):
                socket.send_multipart([frame, encode(message)])
            socket.send_multipart([frame, b"\xc1 no packet"])
            socket.send_multipart([frame, encode(Packet(7, 9, [EventEnvelope(str(TOPIC), 7, 9, b"y")]))])
            subscription = await joining
            first, gap, last = await take(subscription, 3)
            assert (first.sequence, first.payload) == (5, b"x")
            assert gap == SequenceGap(str(TOPIC), 7, 6, 8)
            assert (last.sequence, last.payload) == (9, b"y")
            assert other.counts[MALFORMED] == 1


async def test_malformed_channel_and_query_are_counted(tmp_path: Path, until: Any) -> None:
    async with buses(tmp_path) as (one, other, discovery):
        publisher = await one.publisher(TOPIC)
        await discovery.put(f"v1/event_channels/{str(TOPIC).replace('.', '%2E')}/zz", b"\xc1")
        subscription = await other.subscribe(TOPIC)
        await until(lambda: other.counts[MALFORMED] == 1)
        record = next(r for r in await discovery.list("v1/event_channels/") if r.key.endswith(f"{publisher.id:x}"))
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(EVENT_CHANNEL.decode(record.value).replay_address)
            socket.send(b"\xc1")
            socket.send_multipart([b"a", b"b", b"c"])
            await until(lambda: one.counts[MALFORMED] == 2)
        publisher.publish(b"x")
        assert sequences(await take(subscription, 1)) == [1]


async def test_event_over_the_limit_and_closed_publisher_are_refused(tmp_path: Path) -> None:
    async with buses(tmp_path, max_event_bytes=10) as (one, _, _discovery):
        publisher = await one.publisher(TOPIC)
        with pytest.raises(PayloadTooLargeError):
            publisher.publish(bytes(11))
        assert publisher.publish(bytes(10)) == 1
        await publisher.close()
        with pytest.raises(UnavailableError):
            publisher.publish(b"x")
        await one.close()
        with pytest.raises(UnavailableError):
            await one.publisher(TOPIC)


async def test_port_that_is_taken_is_a_configuration_error(tmp_path: Path) -> None:
    async with buses(tmp_path) as (one, _, discovery):
        publisher = await one.publisher(TOPIC)
        (record,) = await discovery.list("v1/event_channels/")
        address = EVENT_CHANNEL.decode(record.value).address
        rival = ZmqEventBus(address.replace("tcp", "zmq"), discovery=discovery, clock=SystemClock())
        with pytest.raises(ConfigurationError, match="cannot bind"):
            await rival.publisher(TOPIC)
        await rival.close()
        await publisher.close()
        assert await discovery.list("v1/event_channels/") == []


@pytest.mark.parametrize(
    ("url", "options", "named"),
    [("tcp://x:1", {}, "zmq://host:port"), (URL, {"ring_events": 0}, "ring_events"), (URL, {"colour": 1}, "colour")],
)
async def test_wrong_urls_and_options_are_named(
    tmp_path: Path, url: str, options: dict[str, object], named: str
) -> None:
    discovery = FileDiscovery(tmp_path, clock=SystemClock())
    with pytest.raises(ConfigurationError, match=named):
        zmq_event_bus(url, discovery=discovery, clock=SystemClock(), options=options)


async def test_metrics_show_rings_and_buffers(tmp_path: Path, until: Any) -> None:
    metrics = Metrics()
    discovery = FileDiscovery(tmp_path, clock=SystemClock())
    await discovery.start()
    bus = zmq_event_bus(URL, discovery=discovery, clock=SystemClock(), options={"metrics": metrics})
    publisher = await bus.publisher(TOPIC)
    await bus.subscribe(TOPIC)
    for _ in range(5):
        publisher.publish(b"x")
    await until(lambda: metrics.registry.get_sample_value("dynamo_runtime_bus_buffered_events") == 5)
    assert metrics.registry.get_sample_value("dynamo_runtime_bus_ring_events") == 5
    await bus.close()
    await discovery.close()
