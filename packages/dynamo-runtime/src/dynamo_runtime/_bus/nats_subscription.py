"""The receiving side over NATS."""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING, Protocol

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as NatsInterest

from dynamo_core.clock import Clock
from dynamo_core.discovery import quote_segment
from dynamo_core.errors import BackendProtocolError
from dynamo_core.events import EventEnvelope, SequenceGap
from dynamo_core.ids import PublisherId
from dynamo_core.planes import DEFAULT_SNAPSHOT_TIMEOUT_S, SnapshotSubscription
from dynamo_runtime._bus._metrics import MALFORMED, REPLAYED, BusMetrics
from dynamo_runtime._bus.buffer import EventBuffer
from dynamo_runtime._bus.options import BusOptions
from dynamo_runtime._bus.replay import Answer, state_of
from dynamo_runtime._bus.snapshot import gather
from dynamo_runtime._bus.wire import ReplayQuery, decode_packet, encode
from dynamo_runtime._plane.nats_link import NatsLink
from dynamo_runtime._plane.timers import wait_within

EVENTS, HELLO, REPLAY, ANSWER = "dynamo.events", "dynamo.hello", "dynamo.replay", "dynamo.answer"
_ROLL_CALL_S = 0.25
"""Silence after which a roll call of publishers counts as complete."""


class SubscriptionOwner(Protocol):
    """The bus of a subscription, as it sees it."""

    clock: Clock
    options: BusOptions
    link: NatsLink
    metrics: BusMetrics

    def forget(self, subscription: NatsSubscription) -> None:
        """A subscription is closed."""
        ...


class NatsSubscription:
    """Events of one topic, for one reader.

    Args:
        bus: Where it belongs.
        topic: Full topic name.
    """

    def __init__(self, bus: SubscriptionOwner, topic: str) -> None:
        self._bus = bus
        self._subject = quote_segment(topic)
        self._buffer = EventBuffer(topic, bus.options.buffer_events, bus.metrics)
        self._interest: NatsInterest | None = None

    @property
    def buffered(self) -> int:
        """Events that wait for the reader."""
        return len(self._buffer)

    async def join(self) -> None:
        """Listen, and ask the topic's publishers where they stand."""
        self._interest = await self._bus.link.subscribe(f"{EVENTS}.{self._subject}", self._on_message)
        await self._bus.link.settle()
        self._bus.link.publish(f"{HELLO}.{self._subject}", b"")

    def __aiter__(self) -> NatsSubscription:
        return self

    async def __anext__(self) -> EventEnvelope | SequenceGap:
        """Return the next event, or the gap that stands before it. Cancelling loses nothing."""
        return await self._buffer.next()

    async def replay(self, publisher: PublisherId, first: int, last: int | None = None) -> list[EventEnvelope]:
        """Fetch events ``first..last`` (None: the newest) from the publisher's ring.

        Raises:
            UnavailableError: if the publisher cannot be reached.
        """
        events = await self._ask(ReplayQuery(publisher, first, last), self._bus.options.replay_timeout_s)
        self._bus.metrics.add(REPLAYED, len(events))
        return events

    async def snapshots(
        self, *publishers: PublisherId, timeout_s: float = DEFAULT_SNAPSHOT_TIMEOUT_S
    ) -> list[EventEnvelope]:
        """Ask publishers, all of the topic if none is named, and return the state of each that answers in time."""
        deadline_s = self._bus.clock.monotonic() + timeout_s
        return await gather(
            publishers or await self._roll_call(timeout_s / 2),
            lambda publisher, left_s: self._ask(state_of(publisher), left_s),
            clock=self._bus.clock,
            timeout_s=deadline_s - self._bus.clock.monotonic(),
            metrics=self._bus.metrics,
        )

    async def close(self) -> None:
        """Leave the topic; iteration ends. Idempotent."""
        self._buffer.close()
        self._bus.forget(self)
        interest, self._interest = self._interest, None
        if interest is not None:
            await self._bus.link.unsubscribe(interest)

    async def _ask(self, query: ReplayQuery, timeout_s: float) -> list[EventEnvelope]:
        answer, link = Answer(query, self._bus.options), self._bus.link

        async def take(message: Msg) -> None:
            answer.take(message.data)

        inbox = f"{ANSWER}.{secrets.token_hex(12)}"
        interest = await link.subscribe(inbox, take)
        try:
            link.publish(f"{REPLAY}.{query.publisher_id:x}", encode(query), inbox)
            return await answer.events(self._bus.clock, timeout_s)
        finally:
            await link.unsubscribe(interest)

    async def _roll_call(self, timeout_s: float) -> list[PublisherId]:
        """Return the topic's publishers: those that say so now, and those heard before, should they be busy."""
        clock, link = self._bus.clock, self._bus.link
        present = set(self._buffer.tracker.known())
        news = asyncio.Event()

        async def take(message: Msg) -> None:
            try:
                present.add(decode_packet(message.data).publisher_id)
            except BackendProtocolError:
                # NATS itself answers with nothing but a status when nobody listens.
                return
            news.set()

        inbox = f"{ANSWER}.{secrets.token_hex(12)}"
        interest = await link.subscribe(inbox, take)
        deadline_s = clock.monotonic() + timeout_s
        try:
            link.publish(f"{HELLO}.{self._subject}", b"", inbox)
            while await wait_within(clock, min(_ROLL_CALL_S, deadline_s - clock.monotonic()), news.wait()):
                news.clear()
        finally:
            await link.unsubscribe(interest)
        return [PublisherId(publisher) for publisher in sorted(present)]

    async def _on_message(self, message: Msg) -> None:
        try:
            packet = decode_packet(message.data)
        except BackendProtocolError:
            self._bus.metrics.add(MALFORMED)
            return
        self._buffer.take(packet)


if TYPE_CHECKING:
    _SUBSCRIPTION: type[SnapshotSubscription] = NatsSubscription
