"""Conformance of event buses: order, sequences, gaps and replay."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import ClassVar

import pytest

from dynamo_core.errors import UnavailableError
from dynamo_core.events import EventEnvelope, SequenceGap
from dynamo_core.ids import PublisherId
from dynamo_core.planes import EventBus, Publisher, Subscription, Topic
from dynamo_core.testing._suite import ConformanceSuite

TOPIC = Topic("kv-events", "conformance", "backend", "generate")
OTHER = Topic("load", "conformance", "backend", "generate")
_PROBE = b"probe"


class EventBusConformance(ConformanceSuite, suite=True):
    """Every ``EventBus`` must pass this.

    Attributes:
        overflow_events: Events published at once to a subscriber that does not read.
        ring_events: Events that a publisher certainly keeps for replay.
    """

    overflow_events: ClassVar[int] = 6000
    ring_events: ClassVar[int] = 100

    @abstractmethod
    async def make_bus(self) -> EventBus:
        """Return a new client, not started, of the one bus of this test; called up to three times."""
        ...

    @asynccontextmanager
    async def connected(self, topic: Topic = TOPIC) -> AsyncGenerator[tuple[Publisher, Subscription, int]]:
        """Yield a publisher on one client, a subscription on another, and the last sequence that it has seen."""
        async with self.running(await self.make_bus(), await self.make_bus()) as (one, other):
            subscription = await other.subscribe(topic)
            publisher = await one.publisher(topic)
            yield publisher, subscription, await self.meet(publisher, subscription)

    async def meet(self, publisher: Publisher, subscription: Subscription) -> int:
        """Publish until the subscription hears it; return the last sequence, after which nothing is on its way.

        A bus without a broker needs a moment until a new publisher and a subscriber have found each other.
        """
        async with asyncio.timeout(self.patience_s):
            while True:
                sequence = publisher.publish(_PROBE)
                try:
                    event = await asyncio.wait_for(anext(subscription), 0.05)
                    while isinstance(event, SequenceGap) or (event.publisher_id, event.sequence) != (
                        publisher.id,
                        sequence,
                    ):
                        event = await asyncio.wait_for(anext(subscription), 0.05)
                except TimeoutError:
                    continue
                return sequence

    async def test_sequences_grow_by_one_from_one(self) -> None:
        async with self.running(await self.make_bus()) as (bus,):
            publisher = await bus.publisher(TOPIC)
            assert [publisher.publish(b"x") for _ in range(3)] == [1, 2, 3]

    async def test_publishers_have_ids_and_sequences_of_their_own(self) -> None:
        async with self.running(await self.make_bus(), await self.make_bus()) as buses:
            publishers = [await bus.publisher(topic) for bus in buses for topic in (TOPIC, TOPIC, OTHER)]
            assert len({publisher.id for publisher in publishers}) == 6
            assert [publisher.publish(b"x") for publisher in publishers] == [1] * 6

    async def test_envelope_says_what_was_published(self) -> None:
        async with self.connected() as (publisher, subscription, _):
            sequence = publisher.publish(b"\x00payload\xff", schema="dynamo.test.v1")
            event = await self.within(anext(subscription))
            assert isinstance(event, EventEnvelope)
            assert (event.topic, event.publisher_id, event.sequence) == (str(TOPIC), publisher.id, sequence)
            assert (bytes(event.payload), event.schema) == (b"\x00payload\xff", "dynamo.test.v1")
            assert event.published_at_s > 0

    async def test_events_come_in_order(self) -> None:
        async with self.connected() as (publisher, subscription, last):
            for i in range(100):
                publisher.publish(b"%d" % i)
            events = [await self.within(anext(subscription)) for _ in range(100)]
            assert [_place(event) for event in events] == [(last + 1 + i, b"%d" % i) for i in range(100)]

    async def test_every_subscriber_hears_every_event(self) -> None:
        async with self.connected() as (publisher, one, _), self.running(await self.make_bus()) as (bus,):
            two = await bus.subscribe(TOPIC)
            await self.meet(publisher, two)
            await self.meet(publisher, one)
            sequence = publisher.publish(b"x")
            heard_one = await self.within(_until_sequence(one, sequence))
            heard_two = await self.within(_until_sequence(two, sequence))
            assert _place(heard_one) == _place(heard_two) == (sequence, b"x")

    async def test_publishers_of_one_topic_come_together(self) -> None:
        async with self.connected() as (one, subscription, _), self.running(await self.make_bus()) as (bus,):
            two = await bus.publisher(TOPIC)
            await self.meet(two, subscription)
            wanted = {(one.id, one.publish(b"1")), (two.id, two.publish(b"2"))}
            events = [await self.within(anext(subscription)) for _ in range(2)]
            assert {(event.publisher_id, _place(event)[0]) for event in events} == wanted

    async def test_topics_are_apart(self) -> None:
        async with self.connected() as (publisher, subscription, last), self.running(await self.make_bus()) as (bus,):
            other = await bus.publisher(OTHER)
            other.publish(b"elsewhere")
            publisher.publish(b"here")
            assert _place(await self.within(anext(subscription))) == (last + 1, b"here")

    async def test_subscription_starts_with_the_present(self) -> None:
        async with self.connected() as (publisher, _, last), self.running(await self.make_bus()) as (bus,):
            late = await bus.subscribe(TOPIC)
            await self.meet(publisher, late)
            sequence = publisher.publish(b"new")
            event = await self.within(anext(late))
            assert sequence > last + 1
            assert _place(event) == (sequence, b"new")

    async def test_missed_events_are_reported_as_gaps(self) -> None:
        async with self.connected() as (publisher, subscription, last):
            for _ in range(self.overflow_events):
                publisher.publish(b"x")
            end = last + self.overflow_events
            covered = last
            async with asyncio.timeout(self.patience_s):
                while covered < end:
                    event = await anext(subscription)
                    if isinstance(event, SequenceGap):
                        assert (event.topic, event.publisher_id) == (str(TOPIC), publisher.id)
                        assert event.first == covered + 1 <= event.last
                        covered = event.last
                    else:
                        assert event.sequence == covered + 1
                        covered = event.sequence

    async def test_cancelled_wait_loses_nothing(self) -> None:
        async with self.connected() as (publisher, subscription, last):
            waiting = asyncio.create_task(_next(subscription))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait([waiting])
            publisher.publish(b"x")
            assert _place(await self.within(anext(subscription))) == (last + 1, b"x")

    async def test_replay_returns_a_range(self) -> None:
        async with self.connected() as (publisher, subscription, last):
            for i in range(10):
                publisher.publish(b"%d" % i, schema="dynamo.test.v1")
            events = await self.within(subscription.replay(publisher.id, last + 3, last + 5))
            assert [_place(event) for event in events] == [(last + 1 + i, b"%d" % i) for i in (2, 3, 4)]
            assert {(event.topic, event.publisher_id, event.schema) for event in events} == {
                (str(TOPIC), publisher.id, "dynamo.test.v1")
            }

    async def test_replay_without_an_end_goes_to_the_newest(self) -> None:
        async with self.connected() as (publisher, subscription, last):
            for _ in range(self.ring_events - 1):
                publisher.publish(b"x")
            end = publisher.publish(b"newest")
            events = await self.within(subscription.replay(publisher.id, last + 1))
            assert [event.sequence for event in events] == list(range(last + 1, end + 1))

    async def test_replay_of_what_never_was_is_empty(self) -> None:
        async with self.connected() as (publisher, subscription, last):
            assert await self.within(subscription.replay(publisher.id, last + 1, last + 9)) == []

    async def test_replay_does_not_disturb_the_stream(self) -> None:
        async with self.connected() as (publisher, subscription, last):
            publisher.publish(b"x")
            await self.within(subscription.replay(publisher.id, last + 1))
            assert _place(await self.within(anext(subscription))) == (last + 1, b"x")

    async def test_replay_from_an_unknown_publisher_is_unavailable(self) -> None:
        async with self.connected() as (_, subscription, _last):
            with pytest.raises(UnavailableError):
                await self.within(subscription.replay(PublisherId(987654321), 1, 2))

    async def test_closed_publisher_cannot_be_replayed(self) -> None:
        async with self.connected() as (publisher, subscription, last):
            publisher.publish(b"last words")
            await publisher.close()
            await publisher.close()
            assert _place(await self.within(anext(subscription))) == (last + 1, b"last words")
            with pytest.raises(UnavailableError):
                await self.within(subscription.replay(publisher.id, last + 1))

    async def test_closing_a_subscription_ends_its_iteration(self) -> None:
        async with self.connected() as (_, subscription, _last):
            waiting = asyncio.create_task(_drain(subscription))
            await asyncio.sleep(0)
            await subscription.close()
            await subscription.close()
            assert await self.within(waiting) == []

    async def test_closing_the_bus_ends_its_subscriptions(self) -> None:
        async with self.running(await self.make_bus()) as (bus,):
            subscription = await bus.subscribe(TOPIC)
            waiting = asyncio.create_task(_drain(subscription))
            await asyncio.sleep(0)
            await bus.close()
            await bus.close()
            assert await self.within(waiting) == []


async def _next(subscription: Subscription) -> EventEnvelope | SequenceGap:
    return await anext(subscription)


async def _drain(subscription: Subscription) -> list[EventEnvelope | SequenceGap]:
    return [event async for event in subscription]


async def _until_sequence(subscription: Subscription, sequence: int) -> EventEnvelope | SequenceGap:
    while True:
        event = await anext(subscription)
        if isinstance(event, EventEnvelope) and event.sequence == sequence:
            return event


def _place(event: EventEnvelope | SequenceGap) -> tuple[int, bytes]:
    assert isinstance(event, EventEnvelope)
    return (event.sequence, bytes(event.payload))
