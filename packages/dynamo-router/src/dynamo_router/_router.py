"""The facade: a request goes in, a decision comes out. No I/O and no arithmetic of its own."""

from __future__ import annotations

import random
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dynamo_core.cards import ModelCard
from dynamo_core.clock import Clock, SystemClock
from dynamo_core.enums import FinishReason
from dynamo_core.errors import ConfigurationError, DynamoError, InvalidRequestError
from dynamo_core.events import KvEventBatch, KvEventQuery
from dynamo_core.ids import DecisionId, ReservationId, WorkerId
from dynamo_core.load import ReportedLoad, WorkerLoad
from dynamo_core.routing import CandidateScore, RequestOutcome, RoutingDecision, RoutingRequest
from dynamo_core.telemetry import Metrics
from dynamo_router._filters import NO_LIMITS, BusyLimits, eligible, is_plain
from dynamo_router._fleet import Fleet
from dynamo_router._index import TIERS, BlockIndex
from dynamo_router._indexer import Indexer, StreamState
from dynamo_router._load import LoadBook
from dynamo_router._metrics import RouterMetrics
from dynamo_router._pipeline import Choice, Pipeline, load_policy, policy_hash
from dynamo_router._policy import NO_BLOCKS, Candidate, Query
from dynamo_router._prompt import Prompt, read_prompt
from dynamo_router._receipts import ReceiptRing
from dynamo_router._settings import RouterSettings

if TYPE_CHECKING:
    from dynamo_core.routing import Router, SupportsReceipts, SupportsStaticWorkers

_NO_REASONS: Mapping[int, str] = {}


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
        chosen_options = self.settings.policy_options if policy_options is None else policy_options
        self._pipeline = Pipeline(load_policy(policy or self.settings.policy, chosen_options), self._rng)
        self._policy_hash = policy_hash(self._pipeline.policy)
        self._fleet = Fleet(self.indexer.index, block_size)
        self._book = LoadBook(
            block_size=block_size,
            max_reservations=self.settings.max_reservations,
            idle_s=self.settings.reservation_idle_s,
            track_output=self.settings.track_output_blocks,
        )
        self._receipts = ReceiptRing(self.settings.receipts_max_decisions)
        self._limits = BusyLimits(
            self.settings.busy_kv_usage, self.settings.busy_prefill_tokens, self.settings.busy_prefill_batches
        )
        self._inhibited_until_s = 0.0
        # Decision ids are unique across routers: a random name of this one, and a counter.
        self._name = secrets.token_hex(6)
        self._decided = 0
        self._counted = self.metrics.decisions(self._pipeline.policy.name)

    async def start(self) -> None:
        """Do nothing: a library router watches nothing."""

    async def stop(self) -> None:
        """Do nothing: a library router holds no resources."""

    # -- workers -----------------------------------------------------------------------------------------------------

    def upsert_worker(self, worker: WorkerId, card: ModelCard) -> None:
        """Add a worker (one dp rank) or refresh its card.

        Raises:
            InvalidRequestError: if its block size or hash algorithm is not this router's.
        """
        self.add_worker(worker, card)

    def add_worker(self, worker: WorkerId, card: ModelCard) -> KvEventQuery | None:
        """Do as ``upsert_worker`` does, and tell what to fetch.

        Returns:
            The dump of its cache to fetch, if this router is recoverable and the worker is new.

        Raises:
            InvalidRequestError: if its block size or hash algorithm is not this router's.
        """
        if not self._fleet.upsert(worker, card):
            return None
        return self.indexer.add_worker(worker) if self.settings.use_kv_events else None

    def remove_worker(self, worker: WorkerId) -> None:
        """Forget a worker, its bookings and what its cache held; unknown ones are ignored."""
        self._book.drop_worker(worker, self._clock.monotonic())
        if self._fleet.remove(worker) is not None:
            self.indexer.remove_worker(worker)

    def apply_events(self, batch: KvEventBatch) -> KvEventQuery | None:
        """Apply KV events of a worker.

        Returns:
            What is missing, for the caller to fetch and pass to ``indexer.recovered``; None if nothing is.

        Raises:
            InvalidRequestError: for an unknown worker, another block size or another hash algorithm.
        """
        if batch.worker not in self._fleet:
            raise InvalidRequestError(
                f"KV events of unknown worker {batch.worker}; add it with upsert_worker first",
                reason="request.unknown_worker",
                param="worker",
            )
        return self.indexer.apply(batch)

    def report_load(self, worker: WorkerId, reported: ReportedLoad) -> None:
        """Take a worker's own load report; one of an unknown worker is ignored."""
        self._fleet.report(worker, reported)

    def workers(self) -> list[WorkerId]:
        """Return the workers known at this moment, in the order of their ids."""
        return [worker.worker for worker in self._fleet.everyone]

    def loads(self) -> list[WorkerLoad]:
        """Return their loads."""
        return self._fleet.loads()

    def inhibit(self, worker: WorkerId, reason: str) -> None:
        """Leave a worker out for ``inhibit_s`` seconds; unknown ones are ignored."""
        candidate = self._fleet.get(worker)
        if candidate is not None:
            candidate.inhibited_until_s = self._clock.monotonic() + self.settings.inhibit_s
            candidate.inhibited_reason = reason
            self._inhibited_until_s = candidate.inhibited_until_s

    # -- decisions ---------------------------------------------------------------------------------------------------

    async def select(self, request: RoutingRequest) -> RoutingDecision:
        """Choose a worker and, if asked, book it.

        Raises:
            UnavailableError: if no worker exists or all are excluded.
            CapacityExhaustedError: if all eligible workers are busy, or too many requests are booked.
            InvalidRequestError: for an unknown pinned worker, another block size or hash algorithm.
        """
        started = self._clock.monotonic()
        try:
            decision = self._decide(request, started)
        except DynamoError as error:
            self.metrics.refused(error.reason).inc()
            raise
        self._receipts.add(decision)
        self._counted.inc()
        self.metrics.decision_seconds.observe(self._clock.monotonic() - started)
        return decision

    def _decide(self, request: RoutingRequest, now_s: float) -> RoutingDecision:
        prompt = read_prompt(request, self.block_size)
        self.expire()
        if request.reserve:
            self._book.require_room()
        everyone = self._fleet.everyone
        candidates, rejected = self._eligible(request, now_s)
        query = Query(
            prompt_tokens=prompt.tokens,
            blocks=len(prompt.hashes),
            block_size=self.block_size,
            hints=request.hints,
            phase=request.phase,
            first_hash=prompt.hashes[0] if len(prompt.hashes) else 0,
            now_s=now_s,
        )
        touched = self._match(prompt)
        try:
            choice = self._pipeline.choose(query, candidates)
            scores: tuple[CandidateScore, ...] = ()
            if self._records_candidates():
                scores = self._pipeline.explain(query, choice, candidates, everyone, rejected)
            return self._commit(request, prompt, query, choice, scores)
        finally:
            for worker in touched:
                worker.tier_blocks, worker.cached_tokens, worker.active_blocks = NO_BLOCKS, 0, 0

    def _eligible(self, request: RoutingRequest, now_s: float) -> tuple[Sequence[Candidate], Mapping[int, str]]:
        everyone = self._fleet.everyone
        if everyone and is_plain(request) and self._nobody_is_left_out(now_s):
            return everyone, _NO_REASONS
        return eligible(request, everyone, self._limits, now_s)

    def _nobody_is_left_out(self, now_s: float) -> bool:
        return self._limits == NO_LIMITS and now_s >= self._inhibited_until_s

    def _match(self, prompt: Prompt) -> list[Candidate]:
        touched: list[Candidate] = []
        if not len(prompt.hashes):
            return touched
        mask, fleet = self._fleet.mask, self._fleet
        if len(self.indexer.index):
            for blocks, bits in self.indexer.index.match(prompt.hashes, mask).groups():
                cached = min(sum(blocks) * self.block_size, prompt.tokens)
                holders = fleet.within(bits)
                for worker in holders:
                    worker.tier_blocks = blocks
                    worker.cached_tokens = cached
                touched += holders
        for depth, bits in self._book.blocks.depths(prompt.hashes, mask):
            users = fleet.within(bits)
            expected = min(depth * self.block_size, prompt.tokens) if self.settings.assume_kv_reuse else 0
            for worker in users:
                worker.active_blocks = depth
                # What an earlier request there is about to compute, this one will find.
                worker.cached_tokens = max(worker.cached_tokens, expected)
            touched += users
        return touched

    def _records_candidates(self) -> bool:
        mode = self.settings.receipts
        return mode == "on" or (mode == "sampled" and self._rng.random() < self.settings.receipts_sample_share)

    def _commit(
        self,
        request: RoutingRequest,
        prompt: Prompt,
        query: Query,
        choice: Choice,
        scores: tuple[CandidateScore, ...],
    ) -> RoutingDecision:
        worker = choice.candidate
        self._decided += 1
        decision_id = f"{self._name}-{self._decided:x}"
        tier_blocks = {TIERS[rank].value: blocks for rank, blocks in enumerate(worker.tier_blocks) if blocks}
        decision = RoutingDecision(
            decision_id=DecisionId(decision_id),
            request_id=request.request_id,
            worker=worker.worker,
            policy=choice.policy.name,
            policy_hash=self._policy_hash,
            reservation=ReservationId(decision_id) if request.reserve else None,
            overlap_blocks=worker.tier_blocks[0],
            tier_blocks=tier_blocks,
            cached_tokens=worker.cached_tokens,
            candidates=scores,
            margin=choice.margin,
            reason=choice.reason,
            view_age_s=self._view_age(worker),
            index_mode=self._index_mode(worker.worker),
            decided_at_s=self._clock.time(),
        )
        if decision.reservation is not None:
            self._reserve(decision.reservation, prompt, query, choice)
        return decision

    def _reserve(self, reservation: ReservationId, prompt: Prompt, query: Query, choice: Choice) -> None:
        worker = choice.candidate
        self.metrics.prompt_blocks.inc(query.blocks)
        self.metrics.overlap_blocks.inc(worker.tier_blocks[0])
        choice.policy.chosen(query, worker)
        self._book.book(
            reservation,
            worker,
            prompt.hashes,
            prompt_tokens=prompt.tokens,
            uncached_tokens=prompt.tokens - worker.cached_tokens,
            now_s=query.now_s,
        )

    def _view_age(self, worker: Candidate) -> float | None:
        if worker.reported is None:
            return None
        return max(0.0, self._clock.time() - worker.reported.reported_at_s)

    def _index_mode(self, worker: WorkerId) -> str:
        return _INDEX_MODES.get(self.indexer.stream(worker).state, "load-only")

    # -- reports -----------------------------------------------------------------------------------------------------

    def first_token(self, reservation: ReservationId) -> None:
        """End the prefill load of a request; unknown reservations are ignored."""
        self._book.first_token(reservation, self._clock.monotonic())

    def progress(self, reservation: ReservationId, output_tokens: int) -> None:
        """Grow a request's output and renew its reservation; unknown reservations are ignored."""
        self._book.progress(reservation, output_tokens, self._clock.monotonic())

    def complete(self, reservation: ReservationId, outcome: RequestOutcome) -> None:
        """Free a booking and join the outcome with the receipt. Idempotent."""
        worker = self._book.release(reservation, self._clock.monotonic())
        self._receipts.join(outcome.decision_id or str(reservation), outcome)
        if worker is not None and outcome.finish_reason is not FinishReason.ERROR:
            worker.inhibited_until_s = 0.0

    def decision(self, decision_id: str) -> tuple[RoutingDecision, RequestOutcome | None] | None:
        """Return a receipt with its outcome, if both are still kept."""
        return self._receipts.get(decision_id)

    def decisions(self, limit: int = 100) -> list[tuple[RoutingDecision, RequestOutcome | None]]:
        """Return the newest receipts, newest first."""
        return self._receipts.recent(limit)

    # -- upkeep ------------------------------------------------------------------------------------------------------

    def expire(self) -> list[ReservationId]:
        """Drop bookings without progress; ``select`` does so too."""
        gone = self._book.expire(self._clock.monotonic())
        if gone:
            self.metrics.expired.inc(len(gone))
        return gone

    def refresh_metrics(self) -> None:
        """Set the gauges, which no event sets by itself."""
        metrics, index = self.metrics, self.indexer.index
        metrics.index_blocks.set(len(index))
        metrics.index_dropped.set(index.dropped_blocks)
        for result, count in self.indexer.counts.items():
            metrics.index_events(result).set(count)
        states = [stream.state for stream in self.indexer.streams().values()]
        for state in StreamState:
            metrics.streams(state.value).set(states.count(state))
        everyone = self._fleet.everyone
        metrics.workers.set(len(everyone))
        metrics.prefill_tokens.set(sum(worker.prefill_tokens for worker in everyone))
        metrics.decode_blocks.set(sum(worker.decode_blocks for worker in everyone))
        metrics.reservations.set(len(self._book))
        metrics.receipts.set(len(self._receipts))


if TYPE_CHECKING:
    _ROUTER: type[Router] = KvRouter
    _RECEIPTS: type[SupportsReceipts] = KvRouter
    _STATIC_WORKERS: type[SupportsStaticWorkers] = KvRouter

_INDEX_MODES = {StreamState.LIVE: "exact", StreamState.LOSSY: "approximate"}
