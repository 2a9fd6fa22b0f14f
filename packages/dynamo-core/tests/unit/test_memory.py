"""What the in-process planes promise beyond the contracts: bounds, hooks, exact batches, factories."""

import asyncio
from typing import Any

import pytest

from dynamo_core.clock import SystemClock
from dynamo_core.discovery import RecordDeleted, RecordPut, WatchSynced
from dynamo_core.errors import ConfigurationError, ConflictError, DynamoError, UnavailableError
from dynamo_core.events import EventEnvelope, SequenceGap
from dynamo_core.ids import EndpointId
from dynamo_core.memory import (
    MemoryDiscovery,
    MemoryEventBus,
    MemoryRequestPlane,
    create_discovery,
    create_event_bus,
    create_request_plane,
)
from dynamo_core.planes import CallOptions, RequestContext, ResponseSink, Topic
from dynamo_core.streams import open_stream
from dynamo_core.testing import FakeClock, RecordingReceiver

ENDPOINT = EndpointId("ns", "backend", "generate")
TOPIC = Topic("events", "ns")


async def test_slow_watcher_is_resynced_by_diff() -> None:
    store = MemoryDiscovery(watch_events=3)
    await store.put("a/kept", b"x")
    await store.put("a/gone", b"x")
    watch = store.watch("a/")
    assert [type(await anext(watch)) for _ in range(3)] == [RecordPut, RecordPut, WatchSynced]
    await store.delete("a/gone")
    for i in range(10):
        await store.put("a/new", b"%d" % i)
    events = [await anext(watch) for _ in range(3)]
    assert events == [
        RecordDeleted("a/gone", 13),
        RecordPut("a/new", b"9", 13),
        WatchSynced(13, resync=True),
    ]
    revision = await store.put("a/after", b"x")
    assert await anext(watch) == RecordPut("a/after", b"x", revision)
    await watch.aclose()


async def test_watch_that_left_costs_nothing() -> None:
    store = MemoryDiscovery()
    watch = store.watch("")
    await anext(watch)
    assert len(store._store.watches) == 1
    await watch.aclose()
    assert len(store._store.watches) == 0


async def test_closed_discovery_refuses_calls() -> None:
    store = MemoryDiscovery()
    watch = store.watch("")
    await store.close()
    assert [event async for event in watch] == []
    assert not store.status().connected
    for call in (store.get("a"), store.list(""), store.put("a", b""), store.delete("a"), store.lease()):
        with pytest.raises(UnavailableError):
            await call


async def test_leases_of_another_client_and_bad_ttls_are_refused() -> None:
    one = MemoryDiscovery()
    lease = await one.lease()
    with pytest.raises(ConflictError):
        await one.peer().put("a", b"x", lease=lease)
    with pytest.raises(ConfigurationError, match="ttl_s 0"):
        await one.lease(0)


async def test_lapsed_lease_takes_its_keys() -> None:
    store = MemoryDiscovery()
    lease = await store.lease()
    await store.put("a", b"x", lease=lease)
    store.lapse(lease)
    assert await store.get("a") is None
    with pytest.raises(ConflictError):
        store.lapse(lease)


async def test_items_of_a_tick_are_one_batch() -> None:
    async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        for batch in (b"ab", b"cde"):
            for value in batch:
                sink.send(bytes([value]))
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    plane = MemoryRequestPlane()
    served = await plane.serve(ENDPOINT, handler)
    receiver = RecordingReceiver()
    await plane.open(served.address, ENDPOINT, b"", receiver)
    await receiver.ended.wait()
    assert receiver.batches == [[b"a", b"b"], [b"c", b"d", b"e"]]
    await plane.close()


async def test_deadline_follows_the_clock() -> None:
    async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        await context.wait_stopped()

    clock = FakeClock()
    plane = MemoryRequestPlane(clock=clock)
    served = await plane.serve(ENDPOINT, handler)
    receiver = RecordingReceiver()
    await plane.open(served.address, ENDPOINT, b"", receiver, CallOptions(deadline_s=30.0))
    await clock.advance(29.9)
    assert not receiver.ended.is_set()
    await clock.advance(0.1)
    assert receiver.ended.is_set()
    assert served.in_flight == 0
    await plane.close()


async def test_finished_call_leaves_no_timer() -> None:
    async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        sink.send(b"x")

    clock = FakeClock()
    plane = MemoryRequestPlane(clock=clock)
    served = await plane.serve(ENDPOINT, handler)
    receiver = RecordingReceiver()
    await plane.open(served.address, ENDPOINT, b"", receiver, CallOptions(deadline_s=30.0))
    await receiver.ended.wait()
    await clock.settle()
    assert clock.sleepers == 0
    await plane.close()


async def test_severed_address_looks_like_a_lost_process() -> None:
    cancelled = asyncio.Event()

    async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        sink.send(b"x")
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    plane = MemoryRequestPlane()
    served = await plane.serve(ENDPOINT, handler)
    stream = await open_stream(plane, served.address, ENDPOINT, b"")
    assert await stream.receive() == [b"x"]
    plane.sever(served.address)
    plane.sever(served.address)
    with pytest.raises(UnavailableError) as caught:
        await stream.receive()
    assert (caught.value.reason, caught.value.migratable) == ("transport.disconnected", True)
    await cancelled.wait()
    with pytest.raises(UnavailableError, match="nothing serves"):
        await open_stream(plane, served.address, ENDPOINT, b"")
    await plane.close()


async def test_closed_plane_refuses_calls() -> None:
    plane = MemoryRequestPlane()
    await plane.close()
    with pytest.raises(UnavailableError):
        await plane.open("mem://1", ENDPOINT, b"", RecordingReceiver())


async def test_handler_that_cancels_itself_ends_its_call() -> None:
    async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        raise asyncio.CancelledError

    plane = MemoryRequestPlane()
    served = await plane.serve(ENDPOINT, handler)
    with pytest.raises(DynamoError) as caught:
        await (await open_stream(plane, served.address, ENDPOINT, b"")).receive()
    assert caught.value.reason == "backend.cancelled"
    await plane.close()


async def test_slow_subscriber_loses_the_oldest_and_is_told() -> None:
    bus = MemoryEventBus(buffer_events=3)
    subscription = await bus.subscribe(TOPIC)
    one, two = await bus.publisher(TOPIC), await bus.publisher(TOPIC)
    for publisher in (one, two, one, two, one, one):
        publisher.publish(b"x")
    events = [await anext(subscription) for _ in range(5)]
    assert events[:2] == [SequenceGap("ns.events", one.id, 1, 2), SequenceGap("ns.events", two.id, 1, 1)]
    assert [(e.publisher_id, e.sequence) for e in events[2:] if isinstance(e, EventEnvelope)] == [
        (two.id, 2),
        (one.id, 3),
        (one.id, 4),
    ]
    await bus.close()


async def test_lost_events_are_gaps_and_stay_in_the_ring() -> None:
    bus = MemoryEventBus(clock=FakeClock())
    subscription = await bus.subscribe(TOPIC)
    publisher = await bus.publisher(TOPIC)
    bus.lose_next(TOPIC, 2)
    for payload in (b"1", b"2", b"3"):
        publisher.publish(payload)
    events = [await anext(subscription) for _ in range(3)]
    assert [(e.first, e.last) for e in events if isinstance(e, SequenceGap)] == [(1, 1), (2, 2)]
    assert [e.payload for e in await subscription.replay(publisher.id, 1, 2)] == [b"1", b"2"]
    await bus.close()


async def test_ring_is_bounded() -> None:
    bus = MemoryEventBus(ring_events=2)
    subscription = await bus.subscribe(TOPIC)
    publisher = await bus.publisher(TOPIC)
    for _ in range(5):
        publisher.publish(b"x")
    assert [event.sequence for event in await subscription.replay(publisher.id, 1)] == [4, 5]
    await bus.close()


async def test_closed_bus_and_publisher_refuse() -> None:
    bus = MemoryEventBus()
    publisher = await bus.publisher(TOPIC)
    subscription = await bus.subscribe(TOPIC)
    await publisher.close()
    with pytest.raises(UnavailableError):
        publisher.publish(b"x")
    await subscription.close()
    assert bus._topics.subscriptions == {}
    await bus.close()
    with pytest.raises(UnavailableError):
        await bus.subscribe(TOPIC)
    with pytest.raises(UnavailableError):
        await bus.publisher(TOPIC)


@pytest.mark.parametrize(
    ("make", "extra"),
    [(create_discovery, {}), (create_request_plane, {}), (create_event_bus, {"discovery": MemoryDiscovery()})],
)
def test_factories_check_url_and_options(make: Any, extra: dict[str, Any]) -> None:
    clock = SystemClock()
    assert make("mem://", clock=clock, options={}, **extra) is not make("mem://", clock=clock, options={}, **extra)
    with pytest.raises(ConfigurationError, match="'tcp://x' is not"):
        make("tcp://x", clock=clock, options={}, **extra)
    with pytest.raises(ConfigurationError, match="'bogus'"):
        make("mem://", clock=clock, options={"bogus": 1}, **extra)


def test_limits_are_checked() -> None:
    with pytest.raises(ConfigurationError, match="max_payload_bytes 'x'"):
        create_request_plane("mem://", clock=SystemClock(), options={"max_payload_bytes": "x"})
    with pytest.raises(ConfigurationError, match="at least 1"):
        MemoryRequestPlane(max_payload_bytes=0)
    with pytest.raises(ConfigurationError, match="at least 1"):
        MemoryEventBus(ring_events=0)
