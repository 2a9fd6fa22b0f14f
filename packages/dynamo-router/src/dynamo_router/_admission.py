"""Admission: decide at once if that is possible and nobody waits before, else wait in turn."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

import msgspec

from dynamo_core.clock import Clock
from dynamo_core.errors import CapacityExhaustedError, DeadlineExceededError, DynamoError, InvalidRequestError
from dynamo_core.ids import ReservationId
from dynamo_core.load import QueuedLoad
from dynamo_core.routing import RoutingDecision, RoutingRequest
from dynamo_router._decide import Decider
from dynamo_router._filters import pin_of
from dynamo_router._prompt import Prompt
from dynamo_router._queue import DEFAULT_CLASS, ClassOptions, FairQueue, Waiting, read_classes
from dynamo_router._settings import RouterSettings


class Ticket(msgspec.Struct):
    """What a waiting caller holds."""

    request: RoutingRequest
    prompt: Prompt
    arrived_s: float
    deadline_s: float
    gives_up_s: float
    answer: asyncio.Future[RoutingDecision]


class Admission:
    """Puts requests through the decider, in turn when workers are busy.

    Args:
        decider: Decides.
        settings: Where requests wait, and how long.
        release: Frees a booking whose caller left before it heard of it.
        clock: Time.

    Raises:
        ConfigurationError: for a class option that does not exist or is out of range.
    """

    def __init__(
        self,
        decider: Decider,
        settings: RouterSettings,
        *,
        release: Callable[[ReservationId], object],
        clock: Clock,
    ) -> None:
        self._decider = decider
        self._queue = make_queue(settings)
        self._release = release
        self._clock = clock
        self._max_queued_s = math.inf if settings.max_queued_s is None else settings.max_queued_s
        # Nobody gives up before.
        self._soonest_s = math.inf

    def __len__(self) -> int:
        return 0 if self._queue is None else len(self._queue)

    async def admit(self, request: RoutingRequest, prompt: Prompt, deadline_s: float | None = None) -> RoutingDecision:
        """Return a decision, now or when a worker has room. Cancelling leaves the queue.

        Args:
            request: What is asked.
            prompt: Its prompt.
            deadline_s: Seconds from now after which an answer is of no use; None for what the request's hints say.

        Raises:
            DynamoError: as ``Decider.decide`` does; ``CapacityExhaustedError`` also if the queue is full or the
                request has waited too long, ``DeadlineExceededError`` if its deadline passes while it waits.
            InvalidRequestError: for a deadline that is no number.
        """
        now_s = self._clock.monotonic()
        if self._queue is None or not request.reserve:
            return self._decider.decide(request, prompt, now_s)
        if not len(self._queue):
            try:
                return self._decider.decide(request, prompt, now_s)
            except CapacityExhaustedError:
                pass
        else:
            # Raises for a request that could never go, which must not wait.
            self._require_possible(request)
        return await self._wait(self._queue, request, prompt, now_s, now_s + _patience_s(request, deadline_s))

    def shed(self) -> None:
        """Refuse those that have waited too long. To be called now and then; cheap while there are none."""
        now_s = self._clock.monotonic()
        if self._queue is None or now_s < self._soonest_s:
            return
        kept: list[float] = [math.inf]
        for entry in list(self._queue.waiting()):
            ticket = entry.item
            if ticket.gives_up_s > now_s:
                kept.append(ticket.gives_up_s)
                continue
            self._queue.discard(entry)
            if not ticket.answer.done():
                ticket.answer.set_exception(_gave_up(ticket, now_s))
        self._soonest_s = min(kept)

    def pump(self) -> None:
        """Decide for those that wait and can go. To be called whenever load fell or workers changed."""
        self.shed()
        queue = self._queue
        while queue is not None and len(queue):
            entry = queue.pop(self._can_go)
            if entry is None:
                return
            self._answer(entry.item)
            queue.charge(entry.tenant, entry.cost)

    def queued(self) -> QueuedLoad:
        """Return what waits."""
        if self._queue is None:
            return QueuedLoad()
        entries = list(self._queue.waiting())
        return QueuedLoad(
            len(entries), sum(entry.prompt_tokens for entry in entries), sum(entry.cost for entry in entries)
        )

    async def _wait(
        self, queue: FairQueue[Ticket], request: RoutingRequest, prompt: Prompt, now_s: float, deadline_s: float
    ) -> RoutingDecision:
        answer = asyncio.get_running_loop().create_future()
        gives_up_s = min(deadline_s, now_s + self._max_queued_s)
        ticket = Ticket(request, prompt, now_s, deadline_s, gives_up_s, answer)
        hints = request.hints
        instance, rank = pin_of(request)
        entry = Waiting(
            ticket,
            cost=self._decider.uncached_tokens(prompt),
            prompt_tokens=prompt.tokens,
            priority=hints.priority,
            tenant=hints.tenant,
            lane=None if instance is None else (instance, rank),
            deadline_s=deadline_s,
        )
        queue.push(hints.policy_class, entry)
        self._soonest_s = min(self._soonest_s, gives_up_s)
        self.pump()
        try:
            return await ticket.answer
        except asyncio.CancelledError:
            queue.discard(entry)
            if ticket.answer.done() and not ticket.answer.cancelled() and ticket.answer.exception() is None:
                reservation = ticket.answer.result().reservation
                if reservation is not None:
                    self._release(reservation)
            raise

    def _require_possible(self, request: RoutingRequest) -> None:
        try:
            self._decider.eligible(request)
        except CapacityExhaustedError:
            return

    def _can_go(self, entry: Waiting[Ticket]) -> bool:
        try:
            self._decider.eligible(entry.item.request)
        except CapacityExhaustedError:
            return False
        except DynamoError:
            # It can go to its caller, with this error.
            return True
        return True

    def _answer(self, ticket: Ticket) -> None:
        if ticket.answer.done():
            return
        try:
            decision = self._decider.decide(ticket.request, ticket.prompt, ticket.arrived_s)
        except DynamoError as error:
            ticket.answer.set_exception(error)
        else:
            ticket.answer.set_result(decision)


def _patience_s(request: RoutingRequest, deadline_s: float | None) -> float:
    """Return the seconds that a request is worth waiting; infinite without a limit.

    Raises:
        InvalidRequestError: if that is no number, which no order could place.
    """
    found = request.hints.deadline_s if deadline_s is None else deadline_s
    if found is None:
        return math.inf
    if math.isnan(found):
        raise InvalidRequestError(
            "routing.deadline_s is nan; give seconds from now, or leave it out", param="routing.deadline_s"
        )
    return found


def _gave_up(ticket: Ticket, now_s: float) -> DynamoError:
    waited_s = now_s - ticket.arrived_s
    if ticket.deadline_s <= now_s:
        return DeadlineExceededError(
            f"the request waited {waited_s:.3f} s for a worker and its deadline passed; allow more time or add workers"
        )
    return CapacityExhaustedError(
        f"all workers have been busy for {waited_s:.3f} s, the longest that a request may wait; retry later, "
        "add workers or raise max_queued_s",
        reason="capacity.queue_full",
        retry_after_s=1.0,
    )


def make_queue(settings: RouterSettings) -> FairQueue[Ticket] | None:
    """Return the queue that the settings ask for, or None if busy workers are to refuse at once.

    Raises:
        ConfigurationError: for a class option that does not exist or is out of range.
    """
    if not settings.max_queued_requests:
        return None
    default = ClassOptions(max_requests=settings.max_queued_requests)
    return FairQueue({DEFAULT_CLASS: default, **read_classes(settings.queue_classes)})
