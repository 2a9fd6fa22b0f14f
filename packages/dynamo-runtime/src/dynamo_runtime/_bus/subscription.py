"""The receiving side: follows discovery to a topic's publishers and brings their events into order."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

import structlog
import zmq

from dynamo_core.discovery import (
    EVENT_CHANNELS_PREFIX,
    Discovery,
    EventChannel,
    RecordDeleted,
    RecordPut,
    quote_segment,
)
from dynamo_core.errors import BackendProtocolError, DynamoError, UnavailableError
from dynamo_core.events import EventEnvelope, SequenceGap
from dynamo_core.ids import PublisherId
from dynamo_core.planes import DEFAULT_SNAPSHOT_TIMEOUT_S, SnapshotSubscription
from dynamo_core.wire import EVENT_CHANNEL
from dynamo_runtime._bus._metrics import MALFORMED, REPLAYED
from dynamo_runtime._bus.buffer import EventBuffer
from dynamo_runtime._bus.links import BusState, Links
from dynamo_runtime._bus.replay import fetch, state_of
from dynamo_runtime._bus.snapshot import gather
from dynamo_runtime._bus.sockets import SocketReader
from dynamo_runtime._bus.wire import (
    HIGH_WATER_PACKETS,
    PACKET_BYTES,
    ZMTP_HEARTBEAT_MS,
    ZMTP_TIMEOUT_MS,
    Packet,
    ReplayQuery,
    decode_packet,
    topic_frame,
)
from dynamo_runtime._plane.timers import wait_within

logger = structlog.get_logger(__name__)


class ZmqSubscription:
    """Events of one topic, for one reader.

    A publisher that appears later than the subscription owes it all its events: those it sent before the connection
    stood are fetched from its ring. A publisher that was there before is followed from where it stands.

    Args:
        state: What the bus's parts share.
        topic: Full topic name.
    """

    def __init__(self, state: BusState, topic: str) -> None:
        self._state = state
        self._topic = topic
        self._buffer = EventBuffer(topic, state.options.buffer_events, state.metrics)
        self._channels: dict[str, EventChannel] = {}
        self._awaited: set[int] = set()
        self._synced = False
        self._joined = asyncio.Event()
        self._held: dict[int, list[Packet]] = {}
        self._closed = False
        socket = state.context.socket(zmq.SUB)
        socket.setsockopt(zmq.RCVHWM, HIGH_WATER_PACKETS)
        socket.setsockopt(zmq.MAXMSGSIZE, state.options.max_event_bytes + PACKET_BYTES)
        socket.setsockopt(zmq.HEARTBEAT_IVL, ZMTP_HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, ZMTP_TIMEOUT_MS)
        socket.setsockopt(zmq.IPV6, 1)
        socket.subscribe(topic_frame(topic))
        self._reader = SocketReader(socket, self._on_message)
        self._links = Links(self._reader, state.clock)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def buffered(self) -> int:
        """Events that wait for the reader."""
        return len(self._buffer)

    async def join(self) -> None:
        """Connect to the publishers that are there, and wait until it is known where they stand."""
        self._spawn(self._follow(self._state.discovery))
        if not await wait_within(self._state.clock, self._state.options.join_timeout_s, self._joined.wait()):
            logger.warning("event_bus.join_incomplete", topic=self._topic, publishers=len(self._awaited))

    def __aiter__(self) -> ZmqSubscription:
        return self

    async def __anext__(self) -> EventEnvelope | SequenceGap:
        """Return the next event, or the gap that stands before it. Cancelling loses nothing."""
        return await self._buffer.next()

    async def replay(self, publisher: PublisherId, first: int, last: int | None = None) -> list[EventEnvelope]:
        """Fetch events ``first..last`` (None: the newest) from the publisher's ring.

        Raises:
            UnavailableError: if the publisher cannot be reached.
        """
        events = await self._ask(ReplayQuery(publisher, first, last), self._state.options.replay_timeout_s)
        self._state.metrics.add(REPLAYED, len(events))
        return events

    async def snapshots(
        self, *publishers: PublisherId, timeout_s: float = DEFAULT_SNAPSHOT_TIMEOUT_S
    ) -> list[EventEnvelope]:
        """Ask publishers, all of the topic if none is named, and return the state of each that answers in time."""
        return await gather(
            publishers or [PublisherId(channel.publisher_id) for channel in self._channels.values()],
            lambda publisher, left_s: self._ask(state_of(publisher), left_s),
            clock=self._state.clock,
            timeout_s=timeout_s,
            metrics=self._state.metrics,
        )

    async def close(self) -> None:
        """Leave the topic; iteration ends. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._state.subscriptions.pop(self, None)
        self._buffer.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._links.close()
        self._reader.close()

    async def _ask(self, query: ReplayQuery, timeout_s: float) -> list[EventEnvelope]:
        publisher, state = query.publisher_id, self._state
        channel = next((known for known in self._channels.values() if known.publisher_id == publisher), None)
        if channel is None or self._closed:
            raise UnavailableError(f"publisher {publisher:x} is gone", reason="transport.cannot_connect")
        return await fetch(
            state.context,
            channel.replay_address,
            query,
            clock=state.clock,
            options=state.options,
            timeout_s=timeout_s,
        )

    # Publishers come and go.

    async def _follow(self, discovery: Discovery) -> None:
        prefix = f"{EVENT_CHANNELS_PREFIX}{quote_segment(self._topic)}/"
        async for event in discovery.watch(prefix):
            if isinstance(event, RecordPut):
                self._add(event, present=not self._synced)
            elif isinstance(event, RecordDeleted):
                self._remove(event.key)
            else:
                self._check_joined(synced=True)

    def _add(self, record: RecordPut, *, present: bool) -> None:
        try:
            channel = EVENT_CHANNEL.decode(record.value)
        except BackendProtocolError as error:
            self._state.metrics.add(MALFORMED)
            logger.warning("event_bus.malformed_channel", key=record.key, error=error.message)
            return
        if channel == self._channels.get(record.key):
            return
        self._remove(record.key)
        self._channels[record.key] = channel
        if present:
            self._awaited.add(channel.publisher_id)
        else:
            self._buffer.tracker.begin(channel.publisher_id, 0)
        self._links.add(channel.address)

    def _remove(self, key: str) -> None:
        channel = self._channels.pop(key, None)
        if channel is not None:
            self._links.remove(channel.address)
            self._awaited.discard(channel.publisher_id)
            self._check_joined()

    def _check_joined(self, *, synced: bool = False) -> None:
        self._synced = self._synced or synced
        if self._synced and not self._awaited:
            self._joined.set()

    # Events come.

    def _on_message(self, frames: list[bytes]) -> None:
        try:
            packet = decode_packet(frames[-1])
        except BackendProtocolError:
            self._state.metrics.add(MALFORMED)
            return
        publisher_id = packet.publisher_id
        held = self._held.get(publisher_id)
        if held is not None:
            # What finds no room shows as a gap afterwards.
            if len(held) < HIGH_WATER_PACKETS:
                held.append(packet)
        elif self._buffer.tracker.last(publisher_id) == 0 and self._buffer.tracker.missing_before(packet):
            self._held[publisher_id] = [packet]
            self._spawn(self._catch_up(packet))
        else:
            self._buffer.take(packet)
        if publisher_id in self._awaited:
            self._awaited.discard(publisher_id)
            self._check_joined()

    async def _catch_up(self, packet: Packet) -> None:
        """Fetch what a new publisher sent before the connection stood, then go on with what was held meanwhile."""
        publisher_id = packet.publisher_id
        last = packet.events[0].sequence - 1 if packet.events else packet.last
        events: list[EventEnvelope] = []
        try:
            with contextlib.suppress(DynamoError):
                events = await self.replay(PublisherId(publisher_id), 1, last)
        finally:
            held = self._held.pop(publisher_id)
        if events:
            self._buffer.take(Packet(publisher_id, events[-1].sequence, events))
        for later in held:
            self._buffer.take(later)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


if TYPE_CHECKING:
    _SUBSCRIPTION: type[SnapshotSubscription] = ZmqSubscription
