"""A router that takes turns."""

from __future__ import annotations

import asyncio
import bisect
import itertools
from collections import OrderedDict
from dataclasses import dataclass

from dynamo_core.cards import ModelCard
from dynamo_core.component import ComponentContext
from dynamo_core.discovery import INSTANCES_PREFIX, Discovery, RecordDeleted, RecordPut, endpoint_prefix
from dynamo_core.errors import ConfigurationError, InvalidRequestError, UnavailableError
from dynamo_core.ids import DecisionId, InstanceId, ReservationId, WorkerId, parse_instance_id
from dynamo_core.load import ProjectedLoad, WorkerLoad
from dynamo_core.routing import RequestOutcome, RouterScope, RoutingDecision, RoutingPhase, RoutingRequest
from dynamo_core.tokens import require_algorithm

POLICY = "round-robin"
DEFAULT_INHIBIT_S = 5.0
DEFAULT_IDLE_S = 600.0


@dataclass
class _Booking:
    worker: WorkerId
    prefill_tokens: int
    renewed_at: float


class RoundRobinRouter:
    """Gives the next eligible worker after the last one chosen, in order of id.

    Workers come from discovery (instances of the scope's endpoint, one worker a dp rank) and from ``upsert_worker``.

    Args:
        context: Discovery, clock and task spawner are used.
        scope: The worker set.
        inhibit_s: Seconds that ``inhibit`` leaves a worker out while others are there.
        idle_s: Seconds without progress after which a reservation is dropped.
    """

    def __init__(
        self,
        context: ComponentContext,
        scope: RouterScope,
        *,
        inhibit_s: float = DEFAULT_INHIBIT_S,
        idle_s: float = DEFAULT_IDLE_S,
    ) -> None:
        self._context = context
        self._scope = scope
        self._inhibit_s = inhibit_s
        self._idle_s = idle_s
        self._found: dict[WorkerId, ModelCard] = {}
        self._static: dict[WorkerId, ModelCard] = {}
        self._order: list[WorkerId] = []
        self._inhibited: dict[WorkerId, float] = {}
        # In order of renewal, so that what is idle stands in front.
        self._bookings: OrderedDict[ReservationId, _Booking] = OrderedDict()
        self._last: WorkerId | None = None
        self._numbers = itertools.count(1)
        self._watcher: asyncio.Task[None] | None = None
        self._synced = asyncio.Event()

    async def start(self) -> None:
        """Watch discovery; return once the present instances are known."""
        self._watcher = self._context.spawn(self._watch(self._context.discovery), name="round-robin watch")
        await self._synced.wait()

    async def stop(self) -> None:
        """Stop watching. Idempotent."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait([self._watcher])
            self._watcher = None

    async def select(self, request: RoutingRequest) -> RoutingDecision:
        """Choose the next worker and, if asked, book it. Never waits.

        Raises:
            UnavailableError: if no worker is left.
            InvalidRequestError: for an unknown pinned worker, another block size or hash algorithm.
        """
        self._require_same_hashes(request)
        self._drop_idle()
        worker = self._choose(self._eligible(request))
        number = next(self._numbers)
        reservation = None
        if request.reserve:
            self._last = worker
            reservation = ReservationId(f"{request.request_id}/{number}")
            self._bookings[reservation] = _Booking(worker, request.prompt_tokens, self._context.clock.monotonic())
        return RoutingDecision(
            decision_id=DecisionId(f"{request.request_id}/{number}"),
            request_id=request.request_id,
            worker=worker,
            policy=POLICY,
            reservation=reservation,
            reason="next in turn",
            index_mode="load-only",
            decided_at_s=self._context.clock.time(),
        )

    def first_token(self, reservation: ReservationId) -> None:
        """End the reservation's prefill load; unknown ones are ignored."""
        booking = self._renew(reservation)
        if booking is not None:
            booking.prefill_tokens = 0

    def progress(self, reservation: ReservationId, output_tokens: int) -> None:
        """Renew the reservation; unknown ones are ignored."""
        self._renew(reservation)

    def complete(self, reservation: ReservationId, outcome: RequestOutcome) -> None:
        """Free the booking. Idempotent."""
        self._bookings.pop(reservation, None)

    def inhibit(self, worker: WorkerId, reason: str) -> None:
        """Leave a worker out for a while, as long as another is there."""
        if worker in self._found or worker in self._static:
            self._inhibited[worker] = self._context.clock.monotonic() + self._inhibit_s

    def workers(self) -> list[WorkerId]:
        """Workers in order of id."""
        return list(self._order)

    def loads(self) -> list[WorkerLoad]:
        """What this router has booked on each worker."""
        self._drop_idle()
        prefill = dict.fromkeys(self._order, 0)
        active = dict.fromkeys(self._order, 0)
        for booking in self._bookings.values():
            if booking.worker in active:
                active[booking.worker] += 1
                prefill[booking.worker] += booking.prefill_tokens
        return [
            WorkerLoad(worker, projected=ProjectedLoad(prefill_tokens=prefill[worker], active_requests=active[worker]))
            for worker in self._order
        ]

    def upsert_worker(self, worker: WorkerId, card: ModelCard) -> None:
        """Add or refresh a worker that discovery does not know."""
        self._static[worker] = card
        self._reorder()

    def remove_worker(self, worker: WorkerId) -> None:
        """Forget a worker; unknown ones are ignored."""
        self._static.pop(worker, None)
        self._found.pop(worker, None)
        self._reorder()

    async def _watch(self, discovery: Discovery) -> None:
        prefix = INSTANCES_PREFIX + endpoint_prefix(self._scope.endpoint)
        async for event in discovery.watch(prefix):
            if isinstance(event, RecordPut):
                self._add_instance(_instance_of(event.key))
            elif isinstance(event, RecordDeleted):
                self._remove_instance(_instance_of(event.key))
            else:
                self._synced.set()

    def _add_instance(self, instance: InstanceId) -> None:
        runtime = self._scope.card.runtime_config
        first = runtime.data_parallel_start_rank
        for rank in range(first, first + runtime.data_parallel_size):
            self._found[WorkerId(instance, rank)] = self._scope.card
        self._reorder()

    def _remove_instance(self, instance: InstanceId) -> None:
        self._found = {key: card for key, card in self._found.items() if key.instance_id != instance}
        self._reorder()

    def _reorder(self) -> None:
        self._order = sorted(self._found.keys() | self._static.keys())
        self._inhibited = {key: until for key, until in self._inhibited.items() if key in self._order}

    def _require_same_hashes(self, request: RoutingRequest) -> None:
        if not (request.local_hashes or request.sequence_hashes):
            return
        require_algorithm(request.algorithm)
        size = self._scope.card.kv_block_size
        if size and request.block_size != size:
            raise InvalidRequestError(
                f"hashes over blocks of {request.block_size} tokens, but {self._scope.card.name} has blocks of {size}",
                param="block_size",
            )

    def _eligible(self, request: RoutingRequest) -> list[WorkerId]:
        pinned = self._pinned(request)
        excluded = frozenset(request.excluded)
        hints = request.hints
        left = [
            worker
            for worker in (self._order if pinned is None else pinned)
            if worker not in excluded
            and worker.instance_id not in hints.excluded_instance_ids
            and (not hints.allowed_instance_ids or worker.instance_id in hints.allowed_instance_ids)
            and set(hints.required_taints) <= set(self._card(worker).runtime_config.taints)
        ]
        if not left:
            raise UnavailableError(
                f"none of {len(self._order)} workers of {self._scope.endpoint} can take this request",
                reason="backend.worker_unavailable" if self._order else "backend.unavailable",
            )
        now = self._context.clock.monotonic()
        # A worker whose path just failed is better than none.
        return [worker for worker in left if self._inhibited.get(worker, now) <= now] or left

    def _pinned(self, request: RoutingRequest) -> list[WorkerId] | None:
        hints = request.hints
        instance, rank = (
            (hints.prefill_instance_id, hints.prefill_dp_rank)
            if request.phase is RoutingPhase.PREFILL
            else (hints.instance_id, hints.dp_rank)
        )
        if instance is None:
            return None if rank is None else [worker for worker in self._order if worker.dp_rank == rank]
        known = [key for key in self._order if key.instance_id == instance and rank in (None, key.dp_rank)]
        if not known:
            raise InvalidRequestError(
                f"worker {instance:x} of the request is not one of {len(self._order)} known workers",
                param="hints.instance_id",
            )
        return known

    def _choose(self, eligible: list[WorkerId]) -> WorkerId:
        if self._last is None:
            return eligible[0]
        return eligible[bisect.bisect_right(eligible, self._last) % len(eligible)]

    def _card(self, worker: WorkerId) -> ModelCard:
        return self._static.get(worker) or self._found[worker]

    def _renew(self, reservation: ReservationId) -> _Booking | None:
        booking = self._bookings.get(reservation)
        if booking is not None:
            booking.renewed_at = self._context.clock.monotonic()
            self._bookings.move_to_end(reservation)
        return booking

    def _drop_idle(self) -> None:
        oldest = self._context.clock.monotonic() - self._idle_s
        while self._bookings and next(iter(self._bookings.values())).renewed_at < oldest:
            self._bookings.popitem(last=False)


def create_router(context: ComponentContext, scope: RouterScope) -> RoundRobinRouter:
    """Entry point ``round-robin`` of ``dynamo_core.routers``.

    Raises:
        ConfigurationError: for another policy, or an option other than ``inhibit_s`` and ``idle_s``.
    """
    if scope.policy not in ("", POLICY):
        raise ConfigurationError(f"this router has the policy {POLICY!r} only, not {scope.policy!r}")
    options = {"inhibit_s": DEFAULT_INHIBIT_S, "idle_s": DEFAULT_IDLE_S}
    for name, value in scope.options.items():
        if name not in options:
            raise ConfigurationError(f"{POLICY} does not know the option {name!r}; it takes {', '.join(options)}")
        if not isinstance(value, int | float) or value <= 0:
            raise ConfigurationError(f"option {name} of {POLICY} is {value!r}; give seconds above 0")
        options[name] = float(value)
    return RoundRobinRouter(context, scope, **options)


def _instance_of(key: str) -> InstanceId:
    return parse_instance_id(key.rsplit("/", 1)[-1])
