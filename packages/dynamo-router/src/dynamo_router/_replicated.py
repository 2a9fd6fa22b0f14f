"""A router that shares its bookings with the others of its endpoint over the event bus."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import structlog

from dynamo_core.cards import ModelCard
from dynamo_core.component import ComponentContext
from dynamo_core.errors import DynamoError
from dynamo_core.events import KvEventQuery, SequenceGap
from dynamo_core.ids import ReservationId, WorkerId
from dynamo_core.planes import Publisher, Subscription, Topic
from dynamo_core.routing import RequestOutcome, RoutingDecision, RoutingRequest
from dynamo_router._replicas import REPLICA_MESSAGE, Replicas
from dynamo_router._router import KvRouter

_log = structlog.get_logger(__name__)


class ReplicatedRouter(KvRouter):
    """A ``KvRouter`` that tells other routers what it books and counts what they book; alone until ``join``."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self._replicas = Replicas(
            self._decider.name, parts["model"], book=self._book, fleet=self._fleet, view=self._view, clock=self._clock
        )
        self._publisher: Publisher | None = None
        self._subscription: Subscription | None = None
        self._following: asyncio.Task[None] | None = None

    async def join(self, *, context: ComponentContext, topic: Topic) -> None:
        """Begin to share bookings over a topic."""
        self._subscription = await context.event_bus.subscribe(topic)
        self._publisher = await context.event_bus.publisher(topic)
        self._following = context.spawn(self._follow_replicas(self._subscription), name="router-replicas")
        self.share(self._publisher.publish)

    def share(self, send: Callable[[bytes], object]) -> None:
        """Begin to tell the other routers through a function; what they say goes into ``hear`` and ``missed``."""
        self._replicas.send = send
        self._replicas.beat()

    def hear(self, publisher: int, payload: bytes) -> None:
        """Take what a router that publishes under a number said; what cannot be read is logged and passed over."""
        try:
            self._replicas.hear(publisher, REPLICA_MESSAGE.decode(payload))
        except DynamoError as error:
            _log.warning("replica_message_refused", error=error.message)
        self._replicas.answer()
        # What a peer's request frees here may let a waiting one go.
        self._admission.pump()

    def missed(self, publisher: int) -> None:
        """Note that messages of a publisher were lost; all its bookings are asked for."""
        self._replicas.lost(publisher)
        self._replicas.answer()

    async def leave(self) -> None:
        """Stop sharing; the others drop what was booked here. Idempotent."""
        self._replicas.leave()
        following, self._following = self._following, None
        if following is not None:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        publisher, self._publisher = self._publisher, None
        if publisher is not None:
            await publisher.close()
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.close()

    def beat(self) -> None:
        """Give the other replicas a sign of life, and drop those that gave none."""
        self._replicas.beat()
        self.metrics.replicas.set(len(self._replicas))
        self.metrics.replica_gaps.set(self._replicas.missed)

    def add_worker(self, worker: WorkerId, card: ModelCard, *, recoverable: bool = True) -> KvEventQuery | None:
        """Add or refresh a worker; see ``KvRouter.add_worker``."""
        new = worker not in self._fleet
        query = super().add_worker(worker, card, recoverable=recoverable)
        if new:
            self._replicas.worker_added()
        return query

    async def select(self, request: RoutingRequest, *, deadline_s: float | None = None) -> RoutingDecision:
        """Choose a worker and, if asked, book it; see ``KvRouter.select``."""
        decision = await super().select(request, deadline_s=deadline_s)
        if decision.reservation is not None:
            # The caller goes on first.
            asyncio.get_running_loop().call_soon(self._view.settle)
            self._replicas.booked(decision.reservation)
        return decision

    def first_token(self, reservation: ReservationId) -> None:
        """End the prefill load of a request; unknown reservations are ignored."""
        self._replicas.first_token(reservation)
        super().first_token(reservation)

    def progress(self, reservation: ReservationId, output_tokens: int) -> None:
        """Grow a request's output and renew its reservation; unknown reservations are ignored."""
        booked = self._book.get(reservation)
        before = 0 if booked is None else booked.output_blocks
        super().progress(reservation, output_tokens)
        self._replicas.progress(reservation, output_tokens, before)

    def complete(self, reservation: ReservationId, outcome: RequestOutcome) -> None:
        """Free a booking and join the outcome with the receipt. Idempotent."""
        if reservation in self._book:
            self._replicas.ended(reservation)
        super().complete(reservation, outcome)

    async def _follow_replicas(self, subscription: Subscription) -> None:
        async for item in subscription:
            if isinstance(item, SequenceGap):
                self.missed(item.publisher_id)
            else:
                self.hear(item.publisher_id, item.payload)
