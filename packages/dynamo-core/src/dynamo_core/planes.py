"""The request plane and the event bus.

**Request plane.** One primitive: open a stream to an endpoint, get items pushed. Payloads and items are opaque bytes;
the endpoint's declared types say how to read them. Pushing instead of awaiting keeps the per-token path free of
tasks and queues: an implementation hands over all items that arrived in one read at once. ``dynamo_core.streams`` has
the async-iterator view for everyone else.

**Event bus.** Topics with a sequence per publisher: duplicates are dropped, gaps are reported, the publisher's ring
can be replayed. Where a publisher offers its whole state, a subscriber that came late can ask for it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import msgspec

from dynamo_core.clock import Clock
from dynamo_core.discovery import Discovery
from dynamo_core.errors import DynamoError
from dynamo_core.events import EventEnvelope, SequenceGap
from dynamo_core.ids import EndpointId, PublisherId

DEFAULT_CREDIT_ITEMS = 256
DEFAULT_SNAPSHOT_TIMEOUT_S = 5.0


class CallOptions(msgspec.Struct, frozen=True):
    """What travels with a call besides its payload.

    Attributes:
        request_id: For logs on both sides.
        deadline_s: Seconds from now; the plane ends the call with ``DeadlineExceededError`` after it.
        headers: Trace context and the like.
        credit_items: Items the server may send before the receiver grants more.
        schema: Schema name of the payload; a server that declares another refuses the call.
    """

    request_id: str = ""
    deadline_s: float | None = None
    headers: dict[str, str] = {}
    credit_items: int = DEFAULT_CREDIT_ITEMS
    schema: str = ""


DEFAULT_CALL_OPTIONS = CallOptions()


class StreamReceiver(Protocol):
    """Where a call's items go. Methods are called on the event loop and must not block."""

    def on_items(self, items: Sequence[bytes]) -> None:
        """Take items in order; all that arrived together come in one call."""
        ...

    def on_end(self, error: DynamoError | None) -> None:
        """The call ended: cleanly with None, else with the typed reason. Called exactly once, last."""
        ...


class Call(Protocol):
    """A running call, as its caller holds it."""

    def grant(self, items: int) -> None:
        """Allow that many more items. A receiver that keeps up grants what it consumed."""
        ...

    def cancel(self, *, kill: bool = False) -> None:
        """Ask the server to stop (it may still send a last item), or with ``kill`` to drop the call at once.

        After a kill the receiver gets ``on_end(CancelledRequestError)`` without waiting for the server. Idempotent.
        """
        ...


class RequestContext(Protocol):
    """A call, as its handler sees it."""

    @property
    def request_id(self) -> str:
        """Request id of the caller."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers of the caller."""
        ...

    @property
    def stopped(self) -> bool:
        """Whether the caller wants no more: it cancelled, left, or the deadline passed."""
        ...

    def remaining_s(self) -> float | None:
        """Seconds to the deadline; None without one."""
        ...

    async def wait_stopped(self) -> None:
        """Return once ``stopped`` is true. Cancellation only ends the wait."""
        ...

    def on_stop(self, callback: Callable[[], None]) -> None:
        """Call back once when ``stopped`` becomes true (at once if it is); then no task need wait for it."""
        ...


class ResponseSink(Protocol):
    """Where a handler puts its items."""

    def send(self, item: bytes) -> None:
        """Queue an item for this tick's write. Never blocks; after the call ended it is dropped."""
        ...

    @property
    def credit(self) -> int:
        """Items that may still be sent before the receiver grants more; may be negative after a burst."""
        ...

    async def wait_credit(self) -> None:
        """Return once ``credit`` is positive or the call has stopped."""
        ...


RequestHandler: TypeAlias = Callable[[bytes, RequestContext, ResponseSink], Awaitable[None]]
"""Serves one call: (payload, context, sink). Returning ends the stream cleanly; a ``DynamoError`` ends it with that
error; anything else ends it with an ``InternalError``. Cancelled when the plane closes or the caller kills the call."""


class ServedEndpoint(Protocol):
    """An endpoint that this process serves."""

    @property
    def address(self) -> str:
        """URL under which peers reach it; goes into discovery."""
        ...

    @property
    def in_flight(self) -> int:
        """Calls being served."""
        ...

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new calls as ``backend.draining``, wait for running ones; return whether all ended in time."""
        ...

    async def close(self) -> None:
        """Stop serving and end what still runs with ``backend.engine_shutdown``. Idempotent."""
        ...


@runtime_checkable
class RequestPlane(Protocol):
    """Carries calls between processes.

    A peer that cannot be reached raises ``UnavailableError`` (``transport.cannot_connect``) from ``open``; one that
    is lost later ends each of its calls with ``transport.disconnected``.
    """

    async def start(self) -> None:
        """Get ready to open and serve calls."""
        ...

    async def close(self) -> None:
        """Close all endpoints, calls and connections. Idempotent."""
        ...

    async def serve(self, endpoint: EndpointId, handler: RequestHandler, *, schema: str = "") -> ServedEndpoint:
        """Serve an endpoint. A non-empty ``schema`` refuses calls that name another one."""
        ...

    async def open(
        self,
        address: str,
        endpoint: EndpointId,
        payload: bytes,
        receiver: StreamReceiver,
        options: CallOptions = DEFAULT_CALL_OPTIONS,
    ) -> Call:
        """Open a call; items are pushed to ``receiver``, possibly before this returns.

        Raises:
            UnavailableError: if the address cannot be reached; then the receiver hears nothing.
            PayloadTooLargeError: if the payload exceeds the plane's limit.
        """
        ...


class RequestPlaneFactory(Protocol):
    """Entry of ``dynamo_core.request_planes``: makes a plane for a URL of its scheme."""

    def __call__(self, url: str, *, clock: Clock, options: Mapping[str, object]) -> RequestPlane:
        """Return a plane that is not yet started.

        ``options`` may hold ``metrics``, a ``dynamo_core.telemetry.Metrics`` to register in; who has none ignores it.
        """
        ...


class Topic(msgspec.Struct, frozen=True, order=True):
    """A topic in its scope. Its full name is ``namespace.component.endpoint.name``, empty parts left out."""

    name: str
    namespace: str
    component: str = ""
    endpoint: str = ""

    def __str__(self) -> str:
        parts = (self.namespace, self.component, self.endpoint, self.name)
        return ".".join(part for part in parts if part)

    @classmethod
    def of(cls, name: str, endpoint: EndpointId) -> Topic:
        """Return the topic in an endpoint's scope."""
        return cls(name, endpoint.namespace, endpoint.component, endpoint.endpoint)


KV_EVENTS = "kv-events"
LOAD = "load"
FORWARD_PASS = "forward-pass"
TRAFFIC = "traffic"
DECISIONS = "decisions"


class Publisher(Protocol):
    """Publishes one topic."""

    @property
    def id(self) -> PublisherId:
        """Identity; sequences count per publisher."""
        ...

    def publish(self, payload: bytes, *, schema: str = "") -> int:
        """Queue an event for this tick's write and return its sequence. Never blocks."""
        ...

    async def close(self) -> None:
        """Flush and leave. Idempotent."""
        ...


class Subscription(Protocol):
    """Events of one topic from all publishers: envelopes, and a ``SequenceGap`` where some were missed."""

    def __aiter__(self) -> AsyncIterator[EventEnvelope | SequenceGap]:
        """Iterate until closed."""
        ...

    async def __anext__(self) -> EventEnvelope | SequenceGap:
        """Return the next one; each publisher's come in order, duplicates dropped."""
        ...

    async def replay(self, publisher: PublisherId, first: int, last: int | None = None) -> list[EventEnvelope]:
        """Fetch events ``first..last`` (None: the newest) from the publisher's ring; what left it is missing.

        Raises:
            UnavailableError: if the publisher cannot be reached.
        """
        ...

    async def close(self) -> None:
        """Leave the topic; iteration ends. Idempotent."""
        ...


SnapshotSource: TypeAlias = Callable[[], Awaitable[bytes]]
"""Returns a publisher's state, encoded."""


@runtime_checkable
class SnapshotPublisher(Publisher, Protocol):
    """A publisher that can be asked for its state; a bus may have publishers without it."""

    def offer_snapshot(self, source: SnapshotSource, *, schema: str = "") -> None:
        """Answer whoever asks for a snapshot with what ``source`` returns, in place of an earlier source.

        The answer bears the sequence that the publisher had reached when ``source`` was called. One that does not
        suspend thus returns the state as of that sequence; one that does may know later events already, and whoever
        reads its state must bear to apply an event twice.
        """
        ...


@runtime_checkable
class SnapshotSubscription(Subscription, Protocol):
    """A subscription that can ask publishers for their state: after a late start, or a gap that left their rings."""

    async def snapshots(
        self, *publishers: PublisherId, timeout_s: float = DEFAULT_SNAPSHOT_TIMEOUT_S
    ) -> list[EventEnvelope]:
        """Ask publishers, all of the topic if none is named, and return an envelope for each that answers.

        An envelope's payload is the state as of its ``sequence``: skip the publisher's events up to that, apply those
        after it. The stream of events goes on undisturbed. Absent are publishers that are gone, that offer nothing,
        that do not answer in time, and whose state exceeds the bus's limit. Cancelling drops the question.
        """
        ...


@runtime_checkable
class EventBus(Protocol):
    """Carries events between processes: at most once on the wire, with gaps made visible and replayable."""

    async def start(self) -> None:
        """Connect."""
        ...

    async def close(self) -> None:
        """Close all publishers and subscriptions. Idempotent."""
        ...

    async def publisher(self, topic: Topic) -> Publisher:
        """Return a new publisher of a topic."""
        ...

    async def subscribe(self, topic: Topic) -> Subscription:
        """Subscribe to a topic, from now on."""
        ...


class EventBusFactory(Protocol):
    """Entry of ``dynamo_core.event_buses``: makes a bus for a URL of its scheme."""

    def __call__(self, url: str, *, discovery: Discovery, clock: Clock, options: Mapping[str, object]) -> EventBus:
        """Return a bus that is not yet started; it finds publishers through ``discovery`` if it has no broker.

        ``options`` may hold ``metrics``, a ``dynamo_core.telemetry.Metrics`` to register in; who has none ignores it.
        """
        ...
