"""The facade: a request goes in, a decision comes out. No I/O and no arithmetic of its own."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import structlog

from dynamo_core.cards import ModelCard
from dynamo_core.clock import Clock, SystemClock
from dynamo_core.enums import FinishReason
from dynamo_core.errors import ConfigurationError, DynamoError, InvalidRequestError
from dynamo_core.events import KvEventBatch, KvEventQuery
from dynamo_core.ids import ReservationId, WorkerId
from dynamo_core.load import QueuedLoad, ReportedLoad, WorkerLoad
from dynamo_core.routing import RequestOutcome, RoutingDecision, RoutingRequest
from dynamo_core.stability import deprecated
from dynamo_core.telemetry import Metrics
from dynamo_core.tokens import pack_hashes
from dynamo_router._admission import Admission
from dynamo_router._decide import Decider
from dynamo_router._filters import limits_of
from dynamo_router._fleet import Fleet
from dynamo_router._gauges import refresh_index, refresh_load
from dynamo_router._index import BlockIndex
from dynamo_router._indexer import Indexer
from dynamo_router._load import LoadBook, Reservation
from dynamo_router._metrics import RouterMetrics
from dynamo_router._outlook import OverlapScore, overlap_scores, potential_loads
from dynamo_router._pipeline import Pipeline, load_policy
from dynamo_router._prompt import read_prompt
from dynamo_router._receipt_log import LoggedReceipt, open_log
from dynamo_router._receipts import ReceiptRing, recorded_share, regret_tokens
from dynamo_router._settings import RouterSettings
from dynamo_router._snapshot import IndexSnapshot, restore_worker, take_snapshot
from dynamo_router._truth import IndexMode
from dynamo_router._view import CacheView

if TYPE_CHECKING:
    from dynamo_core.routing import Router, SupportsReceipts, SupportsStaticWorkers

_log = structlog.get_logger(__name__)


class KvRouter:
    """A KV-cache-aware router as a library: tell it workers and KV events, ask it for decisions.

    It watches nothing by itself; ``create_router`` makes one that does. Use from one event loop.

    Args:
        block_size: Tokens a KV block, the same for all workers.
        policy: Name of the routing policy; the settings' if omitted.
        policy_options: Options of the policy by name; the settings' if omitted.
        settings: Limits and records; defaults if omitted.
        clock: Time.
        metrics: Where to count; a registry of its own if omitted.
        model: Label of this router's metrics.
        seed: Seed of tie breaks and draws.
        recoverable: Whether the caller fetches missed KV events when ``apply_events`` asks for them.

    Raises:
        ConfigurationError: for an unknown policy or option, or a block size below 1.
    """

    def __init__(  # noqa: PLR0913 - keyword-only parts of one assembly
        self,
        *,
        block_size: int,
        policy: str = "",
        policy_options: Mapping[str, Any] | None = None,
        settings: RouterSettings | None = None,
        clock: Clock | None = None,
        metrics: Metrics | None = None,
        model: str = "",
        seed: int = 0,
        recoverable: bool = False,
    ) -> None:
        if block_size < 1:
            raise ConfigurationError(f"block_size {block_size} must be at least 1; give the workers' KV block size")
        self.settings = settings or RouterSettings()
        self.block_size = block_size
        self.indexer = Indexer(
            BlockIndex(max_blocks=self.settings.max_index_blocks), block_size=block_size, recoverable=recoverable
        )
        self.metrics = RouterMetrics(metrics or Metrics(), model)
        self._clock = clock or SystemClock()
        self._rng = random.Random(seed)
        given = self.settings.policy_options if policy_options is None else policy_options
        chosen = load_policy(policy or self.settings.policy, given)
        self._pipeline = Pipeline(chosen, self._rng, clock=self._clock, budget_s=self.settings.policy_budget_s)
        self._fleet = Fleet(self.indexer.index, block_size)
        self._book = LoadBook(
            block_size=block_size,
            max_reservations=self.settings.max_reservations,
            idle_s=self.settings.reservation_idle_s,
            track_output=self.settings.track_output_blocks,
        )
        self._view = CacheView(
            self._fleet,
            self.indexer,
            self._book.blocks,
            block_size=block_size,
            ttl_s=self.settings.approximate_ttl_s,
            assume_reuse=self.settings.assume_kv_reuse,
        )
        self._receipts = ReceiptRing(self.settings.receipts_max_decisions)
        self._log = open_log(self.settings, model)
        self._decider = Decider(
            fleet=self._fleet,
            view=self._view,
            book=self._book,
            pipeline=self._pipeline,
            limits=limits_of(self.settings),
            recorded_share=recorded_share(self.settings),
            clock=self._clock,
            rng=self._rng,
        )
        self._admission = Admission(self._decider, self.settings, release=self._drop_booking, clock=self._clock)
        self._counted = self.metrics.decisions(self._pipeline.policy.name)

    async def start(self) -> None:
        """Do nothing: a library router watches nothing."""

    async def stop(self) -> None:
        """Close the log of receipts, if there is one. Idempotent."""
        if self._log is not None:
            self._log.close()

    # -- workers -----------------------------------------------------------------------------------------------------

    def upsert_worker(self, worker: WorkerId, card: ModelCard) -> None:
        """Add a worker (one dp rank) or refresh its card.

        Raises:
            InvalidRequestError: if its block size or hash algorithm is not this router's.
        """
        self.add_worker(worker, card)

    def add_worker(self, worker: WorkerId, card: ModelCard, *, recoverable: bool = True) -> KvEventQuery | None:
        """Do as ``upsert_worker`` does, and tell what to fetch.

        Args:
            worker: Which.
            card: What it serves.
            recoverable: Whether this worker answers queries for KV events.

        Returns:
            The dump of its cache to fetch, if this router is recoverable and the worker is new.

        Raises:
            InvalidRequestError: if its block size or hash algorithm is not this router's.
        """
        if not self._fleet.upsert(worker, card):
            return None
        self._admission.pump()
        return self.indexer.add_worker(worker, recoverable=recoverable) if self.settings.use_kv_events else None

    def remove_worker(self, worker: WorkerId) -> None:
        """Forget a worker, its bookings and what its cache held; unknown ones are ignored."""
        self._book.drop_worker(worker, self._clock.monotonic())
        candidate = self._fleet.remove(worker)
        if candidate is not None:
            self._view.forget(candidate)
            self.indexer.remove_worker(worker)
        self._admission.pump()

    def apply_events(self, batch: KvEventBatch) -> KvEventQuery | None:
        """Apply KV events of a worker.

        Returns:
            What is missing, for the caller to fetch and pass to ``apply_recovered``; None if nothing is.

        Raises:
            InvalidRequestError: for an unknown worker, another block size or another hash algorithm.
        """
        if batch.worker not in self._fleet:
            raise InvalidRequestError(
                f"KV events of unknown worker {batch.worker}; add it with upsert_worker first",
                reason="request.unknown_worker",
                param="worker",
            )
        return self._indexed(batch, self.indexer.apply(batch))

    def apply_recovered(self, batch: KvEventBatch) -> KvEventQuery | None:
        """Apply the answer to a query that ``apply_events`` or ``add_worker`` returned; may return a further one.

        Raises:
            InvalidRequestError: for another block size or hash algorithm.
        """
        return self._indexed(batch, self.indexer.recovered(batch))

    def _indexed(self, batch: KvEventBatch, query: KvEventQuery | None) -> KvEventQuery | None:
        candidate = self._fleet.get(batch.worker)
        if candidate is not None and batch.full_dump:
            self._view.truth.reset_exact(candidate.slot)
        return query

    def snapshot(self) -> IndexSnapshot:
        """Return the index as a value, for ``restore`` of another router. O(blocks)."""
        return take_snapshot(self.indexer)

    def restore(self, snapshot: IndexSnapshot) -> None:
        """Take over another router's index, for the workers that this router knows.

        Raises:
            InvalidRequestError: if it is of another block size or hash algorithm.
        """
        for worker in snapshot.workers:
            if worker.worker in self._fleet:
                restore_worker(self.indexer, snapshot, worker)

    def report_load(self, worker: WorkerId, reported: ReportedLoad) -> None:
        """Take a worker's own load report; one of an unknown worker is ignored."""
        self._fleet.report(worker, reported)
        self._admission.pump()

    def workers(self) -> list[WorkerId]:
        """Return the workers known at this moment, in the order of their ids."""
        return [worker.worker for worker in self._fleet.everyone]

    def loads(self) -> list[WorkerLoad]:
        """Return their loads."""
        return self._fleet.loads()

    def queued(self) -> QueuedLoad:
        """Return what waits in the queue, for any worker."""
        return self._admission.queued()

    def inhibit(self, worker: WorkerId, reason: str) -> None:
        """Leave a worker out for ``inhibit_s`` seconds; unknown ones are ignored."""
        candidate = self._fleet.get(worker)
        if candidate is not None:
            candidate.inhibited_until_s = self._clock.monotonic() + self.settings.inhibit_s
            candidate.inhibited_reason = reason
            self._decider.inhibited_until_s = candidate.inhibited_until_s

    # -- decisions ---------------------------------------------------------------------------------------------------

    async def select(self, request: RoutingRequest, *, deadline_s: float | None = None) -> RoutingDecision:
        """Choose a worker and, if asked, book it.

        Waits in turn while all eligible workers are busy, if a queue is set up; cancelling leaves the queue.

        Args:
            request: What is asked.
            deadline_s: Seconds from now for which it is worth waiting; None for what ``request.hints`` say.

        Raises:
            DeadlineExceededError: if the deadline passes while it waits.
            UnavailableError: if no worker exists or all are excluded.
            CapacityExhaustedError: if all eligible workers are busy and no queue has room, or too many requests are
                booked.
            InvalidRequestError: for an unknown pinned worker, another block size or hash algorithm.
        """
        started = self._clock.monotonic()
        try:
            self.expire()
            prompt = read_prompt(request, self.block_size)
            decision = await self._admission.admit(request, prompt, deadline_s)
        except DynamoError as error:
            self.metrics.refused(error.reason).inc()
            raise
        self._receipts.add(decision)
        self._counted.inc()
        if request.reserve:
            self.metrics.prompt_tokens.inc(prompt.tokens)
            self.metrics.cached_tokens.inc(decision.cached_tokens)
        self.metrics.decision_seconds.observe(self._clock.monotonic() - started - decision.queued_s)
        return decision

    # -- reports -----------------------------------------------------------------------------------------------------

    def first_token(self, reservation: ReservationId) -> None:
        """End the prefill load of a request; unknown reservations are ignored."""
        self._view.settle()
        self._book.first_token(reservation, self._clock.monotonic())
        self._admission.pump()

    def progress(self, reservation: ReservationId, output_tokens: int) -> None:
        """Grow a request's output and renew its reservation; unknown reservations are ignored."""
        self._book.progress(reservation, output_tokens, self._clock.monotonic())

    def grow(self, reservation: ReservationId, blocks: int) -> int:
        """Note that a request has filled further blocks with output; returns its output tokens, 0 if it is unknown."""
        booked = self._book.get(reservation)
        if booked is None:
            return 0
        size = self.block_size
        partial = (booked.prompt_tokens + booked.output_tokens) % size
        tokens = booked.output_tokens + blocks * size - partial
        self.progress(reservation, tokens)
        return tokens

    def complete(self, reservation: ReservationId, outcome: RequestOutcome) -> None:
        """Free a booking and join the outcome with the receipt. Idempotent."""
        booked = self._book.release(reservation, self._clock.monotonic())
        decision = self._receipts.join(outcome.decision_id or str(reservation), outcome)
        if decision is not None and decision.candidates:
            self._record(decision, outcome, booked)
        self._admission.pump()
        if booked is None or outcome.finish_reason is FinishReason.ERROR:
            return
        booked.candidate.inhibited_until_s = 0.0
        if outcome.cached_tokens is not None and self._view.judge(
            booked.candidate, booked.prediction, outcome.cached_tokens
        ):
            self.on_distrust(booked.candidate.worker)

    def on_distrust(self, worker: WorkerId) -> None:
        """Hear that a worker's exact index is not believed any more; a router that can fetch its state does."""
        _log.warning("kv_index_distrusted", worker=str(worker), score=self.truth_of(worker))

    def truth_of(self, worker: WorkerId) -> float | None:
        """Return how well predictions from a worker's exact index agree with its reports, 0 to 1; None without data."""
        candidate = self._fleet.get(worker)
        return None if candidate is None else self._view.truth.exact_score(candidate.slot)

    def index_modes(self) -> dict[WorkerId, IndexMode]:
        """Return what each worker's cached tokens are predicted from."""
        return self._view.modes()

    def made(self, decision_id: str) -> bool:
        """Return whether this router took a decision, by its id."""
        return decision_id.startswith(f"{self._decider.name}-")

    def overlap_scores(self, request: RoutingRequest) -> list[OverlapScore]:
        """Return what every worker that holds any of a prompt holds of it.

        Raises:
            InvalidRequestError: for another block size or hash algorithm.
        """
        return overlap_scores(self._view, read_prompt(request, self.block_size), self._clock.monotonic())

    @deprecated(since="0.2.0", removed_in="0.4.0", use="KvRouter.overlap_scores")
    def overlaps(self, request: RoutingRequest) -> list[tuple[WorkerId, dict[str, int], int]]:
        """Return ``overlap_scores`` as bare tuples."""
        return [(worker, blocks, tokens) for worker, blocks, tokens in self.overlap_scores(request)]

    def potential_loads(self, request: RoutingRequest) -> list[WorkerLoad]:
        """Return the load that each worker would have with this request.

        Raises:
            InvalidRequestError: for another block size or hash algorithm.
        """
        prompt = read_prompt(request, self.block_size)
        return potential_loads(self._fleet, self._view, prompt, self._clock.monotonic())

    def decision(self, decision_id: str) -> tuple[RoutingDecision, RequestOutcome | None] | None:
        """Return a receipt with its outcome, if both are still kept."""
        return self._receipts.get(decision_id)

    def decisions(self, limit: int = 100) -> list[tuple[RoutingDecision, RequestOutcome | None]]:
        """Return the newest receipts, newest first."""
        return self._receipts.recent(limit)

    # -- upkeep ------------------------------------------------------------------------------------------------------

    def expire(self) -> list[ReservationId]:
        """Drop bookings without progress and refuse what waited too long; ``select`` does so too."""
        self._admission.shed()
        gone = self._book.expire(self._clock.monotonic())
        if gone:
            self.metrics.expired.inc(len(gone))
            self._admission.pump()
        return gone

    def refresh_metrics(self) -> None:
        """Set the gauges, which no event sets by itself."""
        refresh_index(self.metrics, self.indexer, self._view)
        refresh_load(self.metrics, self._fleet.everyone, reservations=len(self._book), queued=len(self._admission))
        self.metrics.policy_failures.set(self._pipeline.failures)
        self.metrics.policy_overruns.set(self._pipeline.overruns)
        self.metrics.receipts.set(len(self._receipts))
        self.metrics.receipts_dropped.set(0 if self._log is None else self._log.dropped)

    def _record(self, decision: RoutingDecision, outcome: RequestOutcome, booked: Reservation | None) -> None:
        regret = regret_tokens(decision, outcome)
        self.metrics.regret.inc(regret)
        if self._log is not None and booked is not None:
            hashes = pack_hashes(booked.hashes)
            self._log.add(LoggedReceipt(decision, self.block_size, booked.prompt_tokens, hashes, outcome, regret))

    def _drop_booking(self, reservation: ReservationId) -> None:
        self._book.release(reservation, self._clock.monotonic())
        self._admission.pump()


if TYPE_CHECKING:
    _ROUTER: type[Router] = KvRouter
    _RECEIPTS: type[SupportsReceipts] = KvRouter
    _STATIC_WORKERS: type[SupportsStaticWorkers] = KvRouter
