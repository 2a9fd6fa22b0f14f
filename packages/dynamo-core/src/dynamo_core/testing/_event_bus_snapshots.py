"""Conformance of event buses whose publishers can be asked for their state."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import ClassVar

import pytest

from dynamo_core.errors import InternalError
from dynamo_core.events import EventEnvelope
from dynamo_core.ids import PublisherId
from dynamo_core.planes import Publisher, SnapshotPublisher, SnapshotSource, SnapshotSubscription, Subscription
from dynamo_core.testing._event_bus import OTHER, TOPIC, EventBusConformance

SCHEMA = "dynamo.test.v1"
_SHORT_S = 0.3


class Ledger:
    """A publisher's state: what it has published, in order."""

    def __init__(self, publisher: SnapshotPublisher) -> None:
        self.publisher = publisher
        self.entries: list[bytes] = []
        publisher.offer_snapshot(self.state, schema=SCHEMA)

    def enter(self, entry: bytes) -> int:
        """Publish an entry."""
        self.entries.append(entry)
        return self.publisher.publish(entry)

    async def state(self) -> bytes:
        """Return all entries."""
        return b",".join(self.entries)


class SnapshotBusConformance(EventBusConformance, suite=True):
    """Every bus with snapshots must pass this, which includes ``EventBusConformance``.

    Attributes:
        snapshot_bytes: Size of a state that certainly passes.
    """

    snapshot_bytes: ClassVar[int] = 1 << 20

    @asynccontextmanager
    async def offering(self) -> AsyncGenerator[tuple[SnapshotPublisher, SnapshotSubscription, int]]:
        """As ``connected``, with the capability."""
        async with self.connected() as (publisher, subscription, last):
            yield _publisher(publisher), _subscription(subscription), last

    async def test_snapshot_bears_the_sequence_that_its_state_has_reached(self) -> None:
        async with self.offering() as (publisher, subscription, last):
            ledger = Ledger(publisher)
            assert [ledger.enter(b"%d" % number) for number in range(3)] == [last + 1, last + 2, last + 3]
            (found,) = await self.within(subscription.snapshots())
            assert (found.topic, found.publisher_id, found.sequence) == (str(TOPIC), publisher.id, last + 3)
            assert (bytes(found.payload), found.schema) == (b"0,1,2", SCHEMA)
            assert found.published_at_s > 0

    async def test_late_subscriber_comes_to_the_state_of_the_publisher(self) -> None:
        async with self.offering() as (publisher, _, _last), self.running(await self.make_bus()) as (bus,):
            ledger = Ledger(publisher)
            for number in range(20):
                ledger.enter(b"%d" % number)
            late = _subscription(await bus.subscribe(TOPIC))
            publishing = asyncio.create_task(_enter(ledger, range(20, 60)))
            (found,) = await self.within(late.snapshots(publisher.id))
            await publishing
            end = ledger.enter(b"60")
            entries = bytes(found.payload).split(b",")
            reached = found.sequence
            while reached < end:
                event = await self.within(anext(late))
                assert isinstance(event, EventEnvelope)
                if event.sequence > reached:
                    assert event.sequence == reached + 1
                    reached = event.sequence
                    entries.append(bytes(event.payload))
            assert entries == ledger.entries

    async def test_state_that_takes_time_bears_the_sequence_at_which_it_was_begun(self) -> None:
        async with self.offering() as (publisher, subscription, last):
            begun, go_on = asyncio.Event(), asyncio.Event()

            async def slowly() -> bytes:
                begun.set()
                await go_on.wait()
                return b"state"

            publisher.offer_snapshot(slowly)
            asking = asyncio.create_task(subscription.snapshots(publisher.id))
            await self.within(begun.wait())
            publisher.publish(b"meanwhile")
            go_on.set()
            (found,) = await self.within(asking)
            assert (found.sequence, bytes(found.payload)) == (last, b"state")

    async def test_every_publisher_answers_for_itself(self) -> None:
        async with self.offering() as (one, subscription, _), self.running(await self.make_bus()) as (bus,):
            two, elsewhere = _publisher(await bus.publisher(TOPIC)), _publisher(await bus.publisher(OTHER))
            await self.meet(two, subscription)
            for publisher, state in ((one, b"one"), (two, b"two"), (elsewhere, b"elsewhere")):
                publisher.offer_snapshot(_source(state))
            found = await self.within(subscription.snapshots())
            assert {(each.publisher_id, bytes(each.payload)) for each in found} == {(one.id, b"one"), (two.id, b"two")}
            (only,) = await self.within(subscription.snapshots(two.id))
            assert (only.publisher_id, bytes(only.payload)) == (two.id, b"two")

    async def test_newer_source_takes_the_place_of_the_older(self) -> None:
        async with self.offering() as (publisher, subscription, _):
            publisher.offer_snapshot(_source(b"old"))
            publisher.offer_snapshot(_source(b"new"), schema=SCHEMA)
            (found,) = await self.within(subscription.snapshots())
            assert (bytes(found.payload), found.schema) == (b"new", SCHEMA)

    @pytest.mark.parametrize("size", ["empty", "large"])
    async def test_state_of_any_size_arrives_whole(self, size: str) -> None:
        state = b"" if size == "empty" else bytes(range(256)) * (self.snapshot_bytes // 256)
        async with self.offering() as (publisher, subscription, _):
            publisher.offer_snapshot(_source(state))
            (found,) = await self.within(subscription.snapshots(publisher.id))
            assert bytes(found.payload) == state

    async def test_all_who_ask_at_once_are_answered(self) -> None:
        async with self.offering() as (publisher, one, _), self.running(await self.make_bus()) as (bus,):
            two = _subscription(await bus.subscribe(TOPIC))
            await self.meet(publisher, two)
            publisher.offer_snapshot(_source(b"state"))
            answers = await self.within(asyncio.gather(*(each.snapshots(publisher.id) for each in (one, two) * 5)))
            assert [bytes(found.payload) for (found,) in answers] == [b"state"] * 10

    async def test_publisher_that_offers_none_is_absent(self) -> None:
        async with self.offering() as (publisher, subscription, last):
            assert await self.within(subscription.snapshots(publisher.id, PublisherId(987654321), timeout_s=1.0)) == []
            publisher.publish(b"x")
            event = await self.within(anext(subscription))
            assert isinstance(event, EventEnvelope)
            assert event.sequence == last + 1

    async def test_source_that_fails_leaves_its_publisher_absent_alone(self) -> None:
        async def broken() -> bytes:
            raise InternalError("no state today")

        async with self.offering() as (publisher, subscription, _), self.running(await self.make_bus()) as (bus,):
            other = _publisher(await bus.publisher(TOPIC))
            await self.meet(other, subscription)
            publisher.offer_snapshot(broken)
            other.offer_snapshot(_source(b"whole"))
            (found,) = await self.within(subscription.snapshots())
            assert (found.publisher_id, bytes(found.payload)) == (other.id, b"whole")
            publisher.offer_snapshot(_source(b"mended"))
            (mended,) = await self.within(subscription.snapshots(publisher.id))
            assert bytes(mended.payload) == b"mended"

    async def test_source_that_takes_too_long_is_not_waited_for(self) -> None:
        async def never() -> bytes:
            await asyncio.Event().wait()
            return b""

        async with self.offering() as (publisher, subscription, _), self.running(await self.make_bus()) as (bus,):
            other = _publisher(await bus.publisher(TOPIC))
            await self.meet(other, subscription)
            publisher.offer_snapshot(never)
            other.offer_snapshot(_source(b"prompt"))
            (found,) = await self.within(subscription.snapshots(publisher.id, other.id, timeout_s=_SHORT_S * 4))
            assert (found.publisher_id, bytes(found.payload)) == (other.id, b"prompt")

    async def test_closed_publisher_is_absent(self) -> None:
        async with self.offering() as (publisher, subscription, _):
            publisher.offer_snapshot(_source(b"state"))
            await publisher.close()
            assert await self.within(subscription.snapshots(publisher.id, timeout_s=_SHORT_S)) == []

    async def test_cancelled_question_disturbs_nothing(self) -> None:
        async with self.offering() as (publisher, subscription, last):
            begun = asyncio.Event()

            async def never() -> bytes:
                begun.set()
                await asyncio.Event().wait()
                return b""

            publisher.offer_snapshot(never)
            asking = asyncio.create_task(subscription.snapshots())
            await self.within(begun.wait())
            asking.cancel()
            await asyncio.wait([asking])
            publisher.publish(b"x")
            event = await self.within(anext(subscription))
            assert isinstance(event, EventEnvelope)
            assert event.sequence == last + 1


def _source(state: bytes) -> SnapshotSource:
    async def source() -> bytes:
        return state

    return source


async def _enter(ledger: Ledger, numbers: range) -> None:
    for number in numbers:
        ledger.enter(b"%d" % number)
        await asyncio.sleep(0)


def _publisher(publisher: Publisher) -> SnapshotPublisher:
    assert isinstance(publisher, SnapshotPublisher)
    return publisher


def _subscription(subscription: Subscription) -> SnapshotSubscription:
    assert isinstance(subscription, SnapshotSubscription)
    return subscription
