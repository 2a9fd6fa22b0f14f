"""One decision from request to receipt, atomic on the event loop: nothing changes between scoring and booking."""

from __future__ import annotations

import random
import secrets
from collections.abc import Mapping, Sequence

from dynamo_core.clock import Clock
from dynamo_core.ids import DecisionId, ReservationId
from dynamo_core.routing import CandidateScore, RoutingDecision, RoutingPhase, RoutingRequest
from dynamo_router._filters import NO_LIMITS, BusyLimits, eligible, is_plain
from dynamo_router._fleet import Fleet
from dynamo_router._load import NO_PREDICTION, LoadBook
from dynamo_router._match import TIERS
from dynamo_router._pipeline import Choice, Pipeline, policy_hash
from dynamo_router._policy import Candidate, Query
from dynamo_router._prompt import Prompt
from dynamo_router._view import CacheView

_NO_REASONS: Mapping[int, str] = {}


class Decider:
    """Filters, scores, picks and books.

    Args:
        fleet: The candidates.
        view: What they have cached.
        book: Where bookings go.
        pipeline: The policy in its fence.
        limits: When a worker is busy.
        recorded_share: Share of decisions whose receipt names every candidate, 0 to 1.
        clock: Time.
        rng: Draws which receipts are full.
    """

    def __init__(  # noqa: PLR0913 - keyword-only parts of one assembly
        self,
        *,
        fleet: Fleet,
        view: CacheView,
        book: LoadBook,
        pipeline: Pipeline,
        limits: BusyLimits,
        recorded_share: float,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self.inhibited_until_s = 0.0
        self._fleet = fleet
        self._view = view
        self._book = book
        self._pipeline = pipeline
        self._limits = limits
        self._recorded_share = recorded_share
        self._clock = clock
        self._rng = rng
        self._policy_hash = policy_hash(pipeline.policy)
        # Decision ids are unique across routers: a random name of this one, and a counter.
        self.name = secrets.token_hex(6)
        self._decided = 0

    def decide(self, request: RoutingRequest, prompt: Prompt, arrived_s: float) -> RoutingDecision:
        """Choose a worker and, if asked, book it.

        Raises:
            UnavailableError: if no worker exists or all are excluded.
            CapacityExhaustedError: if all eligible workers are busy, or too many requests are booked.
            InvalidRequestError: for an unknown pinned worker.
        """
        now_s = self._clock.monotonic()
        if request.reserve:
            self._book.require_room()
        candidates, rejected = self.eligible(request)
        query = Query(
            prompt_tokens=prompt.tokens,
            blocks=len(prompt.hashes),
            block_size=self._book.block_size,
            hints=request.hints,
            phase=request.phase,
            hashes=prompt.hashes,
            now_s=now_s,
        )
        touched = self._view.show(prompt, now_s)
        try:
            choice = self._pipeline.choose(query, candidates)
            scores: tuple[CandidateScore, ...] = ()
            if self._recorded_share and self._rng.random() < self._recorded_share:
                scores = self._pipeline.explain(query, choice, candidates, self._fleet.everyone, rejected)
            decision = self._receipt(request, choice, scores, now_s - arrived_s)
            if decision.reservation is not None:
                self._reserve(decision.reservation, prompt, query, choice)
            return decision
        finally:
            self._view.hide(touched)

    def eligible(self, request: RoutingRequest) -> tuple[Sequence[Candidate], Mapping[int, str]]:
        """Return the workers that may serve a request now, and the reason per slot for the others.

        Raises:
            DynamoError: as ``decide`` does.
        """
        everyone, now_s = self._fleet.everyone, self._clock.monotonic()
        plain = self._limits == NO_LIMITS and now_s >= self.inhibited_until_s and is_plain(request)
        if everyone and plain:
            return everyone, _NO_REASONS
        return eligible(request, everyone, self._limits, now_s)

    def uncached_tokens(self, prompt: Prompt) -> int:
        """Return the prompt tokens that even the best worker would have to compute."""
        touched = self._view.show(prompt, self._clock.monotonic())
        best = max((worker.cached_tokens for worker in touched), default=0)
        self._view.hide(touched)
        return prompt.tokens - best

    def _receipt(
        self, request: RoutingRequest, choice: Choice, scores: tuple[CandidateScore, ...], queued_s: float
    ) -> RoutingDecision:
        worker = choice.candidate
        self._decided += 1
        decision_id = f"{self.name}-{self._decided:x}"
        return RoutingDecision(
            decision_id=DecisionId(decision_id),
            request_id=request.request_id,
            worker=worker.worker,
            policy=choice.policy.name,
            policy_hash=self._policy_hash,
            reservation=ReservationId(decision_id) if request.reserve else None,
            overlap_blocks=worker.tier_blocks[0],
            tier_blocks={TIERS[rank].value: blocks for rank, blocks in enumerate(worker.tier_blocks) if blocks},
            cached_tokens=worker.cached_tokens,
            candidates=scores,
            margin=choice.margin,
            reason=choice.reason,
            view_age_s=self._view_age(worker),
            index_mode=self._view.mode(worker).value,
            queued_s=queued_s,
            decided_at_s=self._clock.time(),
        )

    def _reserve(self, reservation: ReservationId, prompt: Prompt, query: Query, choice: Choice) -> None:
        worker = choice.candidate
        self._pipeline.confirm(query, choice)
        # Of a split request, one hop computes the prompt and the other one holds its blocks while it decodes.
        computes, holds = query.phase is not RoutingPhase.DECODE, query.phase is not RoutingPhase.PREFILL
        self._book.book(
            reservation,
            worker,
            prompt.hashes if holds else (),
            prompt_tokens=prompt.tokens,
            uncached_tokens=prompt.tokens - worker.cached_tokens if computes else 0,
            now_s=query.now_s,
            prediction=self._view.book(worker, prompt, query.now_s) if computes else NO_PREDICTION,
        )

    def _view_age(self, worker: Candidate) -> float | None:
        if worker.reported is None:
            return None
        return max(0.0, self._clock.time() - worker.reported.reported_at_s)
