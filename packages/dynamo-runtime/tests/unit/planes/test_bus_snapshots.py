"""States that publishers give to those who ask: limits, waiting, and publishers of an earlier release."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dynamo_core.clock import SystemClock
from dynamo_core.events import EventEnvelope, SequenceGap
from dynamo_core.ids import PublisherId
from dynamo_core.memory import MemoryDiscovery
from dynamo_core.planes import Topic
from dynamo_core.testing import FakeClock
from dynamo_runtime._bus._metrics import ABSENT_SNAPSHOTS, SNAPSHOTS, BusMetrics
from dynamo_runtime._bus.bus import ZmqEventBus
from dynamo_runtime._bus.nats import NatsEventBus, nats_event_bus
from dynamo_runtime._bus.options import BusOptions
from dynamo_runtime._bus.outbox import RingPublisher
from dynamo_runtime._bus.replay import Answer, state_of
from dynamo_runtime._bus.snapshot import MAX_WAITING, SnapshotOffer, cut, gather, joined
from dynamo_runtime._bus.subscription import ZmqSubscription
from dynamo_runtime._bus.wire import PACKET_BYTES, ReplayPart, decode_query, encode, portions

TOPIC = Topic("events", "test")


def state(payload: bytes, sequence: int = 3) -> EventEnvelope:
    return EventEnvelope(str(TOPIC), 7, sequence, payload, "dynamo.test.v1", 1.0)


class Asker:
    """Collects what it is answered."""

    def __init__(self) -> None:
        self.pieces: list[EventEnvelope] = []
        self.done = asyncio.Event()

    def take(self, part: ReplayPart) -> None:
        self.pieces += part.events
        if part.done:
            self.done.set()


@pytest.mark.parametrize("size", [0, 1, PACKET_BYTES, PACKET_BYTES + 1, 3 * PACKET_BYTES])
def test_state_is_put_together_as_it_was(size: int) -> None:
    whole = state(bytes(size))
    pieces = cut(whole)
    assert len(pieces) == max(1, -(-size // PACKET_BYTES))
    assert joined(pieces) == whole


def test_state_that_lacks_a_piece_is_none() -> None:
    pieces = cut(state(bytes(3 * PACKET_BYTES)))
    assert joined([]) is None
    for lost in range(3):
        assert joined([piece for number, piece in enumerate(pieces) if number != lost]) is None


async def test_who_asks_during_a_run_gets_the_state_of_the_next() -> None:
    go_on = asyncio.Semaphore(0)
    runs = 0

    async def take() -> EventEnvelope:
        nonlocal runs
        runs += 1
        number = runs
        await go_on.acquire()
        return state(b"%d" % number)

    offer = SnapshotOffer(take, SystemClock(), BusOptions())
    first, *later = (Asker() for _ in range(5))
    offer.ask(first.take)
    while not runs:
        await asyncio.sleep(0)
    for asker in later:
        offer.ask(asker.take)
    for _ in range(2):
        go_on.release()
    async with asyncio.timeout(20):
        for asker in (first, *later):
            await asker.done.wait()
    assert [asker.pieces[0].payload for asker in (first, *later)] == [b"1"] + [b"2"] * 4
    assert runs == 2
    await offer.close()


async def test_one_too_many_goes_without_at_once() -> None:
    async def never() -> EventEnvelope:
        await asyncio.Event().wait()
        return state(b"")

    offer = SnapshotOffer(never, SystemClock(), BusOptions())
    askers = [Asker() for _ in range(MAX_WAITING + 1)]
    for asker in askers:
        offer.ask(asker.take)
    assert [asker.done.is_set() for asker in askers] == [False] * MAX_WAITING + [True]
    await offer.close()
    await offer.close()


async def test_state_over_the_limit_and_source_over_its_time_are_not_given() -> None:
    clock = FakeClock()
    begun = asyncio.Event()

    async def never() -> EventEnvelope:
        begun.set()
        await asyncio.Event().wait()
        return state(b"")

    async def large() -> EventEnvelope:
        return state(bytes(11))

    for take in (large, never):
        asker = Asker()
        offer = SnapshotOffer(take, clock, BusOptions(max_snapshot_bytes=10, replay_timeout_s=5.0))
        offer.ask(asker.take)
        if take is never:
            await begun.wait()
            await clock.advance(5.0)
        async with asyncio.timeout(20):
            await asker.done.wait()
        assert asker.pieces == []
        await offer.close()


def test_answer_is_cut_off_where_it_exceeds_the_limit() -> None:
    answer = Answer(state_of(PublisherId(7)), BusOptions(max_snapshot_bytes=PACKET_BYTES))
    for piece in cut(state(bytes(3 * PACKET_BYTES))):
        answer.take(encode(ReplayPart([piece], done=False)))
    assert answer.complete.is_set()
    assert len(answer._events) == 1


def test_publisher_of_an_earlier_release_answers_the_question_with_nothing() -> None:
    class EarlierQuery(msgspec.Struct, array_like=True):
        publisher_id: int
        first: int
        last: int | None = None

    asked = encode(state_of(PublisherId(7)))
    earlier = msgspec.msgpack.decode(asked, type=EarlierQuery)
    assert (earlier.first, earlier.last) == (1, 0)
    assert decode_query(asked).snapshot
    assert not decode_query(msgspec.msgpack.encode(EarlierQuery(7, 3, 4))).snapshot


async def test_thousand_publishers_are_asked_a_few_at_a_time() -> None:
    running = most = 0

    async def ask(publisher: PublisherId, timeout_s: float) -> list[EventEnvelope]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return cut(state(b"%d" % publisher)) if publisher % 2 else []

    metrics = BusMetrics(None, lambda: 0, lambda: 0)
    publishers = [PublisherId(number) for number in range(1000)]
    found = await gather(publishers, ask, clock=SystemClock(), timeout_s=60.0, metrics=metrics)
    assert [each.payload for each in found] == [b"%d" % number for number in range(1, 1000, 2)]
    assert 1 < most <= 16
    assert (metrics.counts[SNAPSHOTS], metrics.counts[ABSENT_SNAPSHOTS]) == (500, 500)


async def test_late_subscriber_asks_where_the_ring_no_longer_has_it(tmp_path: Path) -> None:
    """A gap that left the ring is made up by the state, and the stream goes on from there."""
    discovery = MemoryDiscovery()
    await discovery.start()
    options = BusOptions(ring_events=4)
    one, other = (
        ZmqEventBus("zmq://127.0.0.1:0", discovery=discovery, clock=SystemClock(), options=options) for _ in range(2)
    )
    publisher = await one.publisher(TOPIC)
    assert isinstance(publisher, RingPublisher)
    entries = [b"%d" % number for number in range(20)]

    async def source() -> bytes:
        return b",".join(entries)

    publisher.offer_snapshot(source)
    for entry in entries:
        publisher.publish(entry)
    late = await other.subscribe(TOPIC)
    assert isinstance(late, ZmqSubscription)
    assert [event.sequence for event in await late.replay(publisher.id, 1)] == [17, 18, 19, 20]
    (found,) = await late.snapshots()
    assert (found.sequence, found.payload.split(b",")) == (20, entries)
    assert other.counts[SNAPSHOTS] == 1
    await one.close()
    await other.close()


def test_burst_of_empty_events_is_cut_too() -> None:
    parts = list(portions(EventEnvelope(str(TOPIC), 7, number, b"") for number in range(1, 20_001)))
    assert all(len(msgspec.msgpack.encode(part)) <= PACKET_BYTES for part in parts)
    assert sum(map(len, parts)) == 20_000


async def test_burst_of_small_events_passes_nats(shared_nats: Any) -> None:
    """Twenty thousand in one tick are far more than the server takes in one message."""
    buses = [
        nats_event_bus(f"nats://{shared_nats.host_port}", discovery=MemoryDiscovery(), clock=SystemClock(), options={})
        for _ in range(2)
    ]
    for bus in buses:
        assert isinstance(bus, NatsEventBus)
        await bus.start()
    subscription, publisher = await buses[1].subscribe(TOPIC), await buses[0].publisher(TOPIC)
    publisher.publish(b"first")
    for _ in range(20_000):
        publisher.publish(b"")
    async with asyncio.timeout(30):
        while True:
            item = await anext(subscription)
            assert not isinstance(item, SequenceGap)
            if item.sequence == 20_001:
                break
    for bus in buses:
        await bus.close()
