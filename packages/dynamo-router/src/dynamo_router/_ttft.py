"""Least predicted time to first token.

For each worker, in seconds::

    queue    = booked prefill tokens still to compute / pace
    prefill  = (prompt tokens - cached tokens + transfer cost of lower tiers) / pace
    decode   = decode_weight x blocks of running requests x block size / pace
    spread   = overlap_weight x (most cached tokens of any worker - own) / pace
    cost     = queue + prefill + decode + spread

A worker's pace is measured between its first tokens while work waits, drawn towards the fleet's so that a few odd
requests do not set it. The oldest prefill's share of the queue shrinks as time passes. ``spread`` keeps a prefix from
being copied to ever more workers for a small gain in time. The decode hop of a split request has its prompt computed
elsewhere: there only ``queue`` and ``decode`` count.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec

from dynamo_core.routing import RoutingPhase
from dynamo_router._cost import NonNegative, Share, taint_factor
from dynamo_router._policy import NO_BLOCKS, Candidate, PolicyOptions, Query, least, read_options

PRIOR_TOKENS = 65_536.0


class TtftOptions(PolicyOptions, frozen=True):
    """Knobs of the prediction.

    Attributes:
        prefill_tokens_per_s: Pace assumed until one has been measured.
        learn_pace: Whether to measure; if not, all workers have the assumed pace.
        host_weight: Share of a host block's computation that loading it saves.
        disk_weight: The same for a disk block.
        external_weight: The same for an external block.
        decode_weight: Prefill tokens that one token of running requests' blocks counts for.
        overlap_weight: Prefill tokens that one cached token on another worker, missing here, counts for.
    """

    prefill_tokens_per_s: Annotated[float, msgspec.Meta(gt=0)] = 8000.0
    learn_pace: bool = True
    host_weight: Share = 0.75
    disk_weight: Share = 0.25
    external_weight: Share = 0.25
    decode_weight: NonNegative = 0.02
    overlap_weight: NonNegative = 0.3


class TtftPolicy:
    """Least predicted time to first token."""

    name = "ttft"
    needs_index = True

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = read_options(TtftOptions, self.name, options)

    def score(self, query: Query, candidates: Sequence[Candidate]) -> Sequence[float]:
        """Return the predicted seconds, with the weighted extras."""
        knobs = self.options
        fleet = self._fleet_pace(candidates)
        size, now = query.block_size, query.now_s
        decode, overlap = knobs.decode_weight * size, knobs.overlap_weight
        own = 1.0
        if query.phase is RoutingPhase.DECODE:
            own = overlap = 0.0
        # What all workers share is added once; a cached token saves its own work and its part of the spread.
        most = max([worker.cached_tokens for worker in candidates]) if overlap else 0
        shared, saved = own * query.prompt_tokens + overlap * most, own + overlap
        learns, prior_s = knobs.learn_pace, PRIOR_TOKENS / fleet
        costs: list[float] = []
        for worker in candidates:
            work = shared + decode * worker.decode_blocks
            if worker.cached_tokens:
                work -= saved * worker.cached_tokens
                if own and worker.tier_blocks is not NO_BLOCKS:
                    work += self._loading_tokens(worker.tier_blocks, size)
            queue = worker.prefill
            pace = fleet
            if learns and queue.done_s:
                pace = (queue.done_tokens + PRIOR_TOKENS) / (queue.done_s + prior_s)
            if worker.prefill_tokens:
                work += _remaining(worker, pace, now)
            costs.append(work / pace)
        if query.hints.preferred_taints:
            return [cost * taint_factor(query, worker) for cost, worker in zip(costs, candidates, strict=True)]
        return costs

    def terms(self, query: Query, candidates: Sequence[Candidate]) -> Sequence[Mapping[str, float]]:
        """Return the seconds of each part."""
        fleet = self._fleet_pace(candidates)
        most = max(worker.cached_tokens for worker in candidates)
        return [self._terms(query, worker, self._pace(worker, fleet), most) for worker in candidates]

    def pick(self, costs: Sequence[float], candidates: Sequence[Candidate], rng: random.Random) -> int:
        """Take the least, ties broken at random."""
        return least(costs, rng)

    def chosen(self, query: Query, candidate: Candidate) -> None:
        """Keep no state."""

    def _terms(self, query: Query, worker: Candidate, pace: float, most: int) -> dict[str, float]:
        knobs = self.options
        own = 0.0 if query.phase is RoutingPhase.DECODE else 1.0
        uncached = query.prompt_tokens - worker.cached_tokens
        terms = {
            "queue": _remaining(worker, pace, query.now_s) / pace,
            "prefill": own * (uncached + self._loading_tokens(worker.tier_blocks, query.block_size)) / pace,
            "decode": knobs.decode_weight * worker.decode_blocks * query.block_size / pace,
            "spread": own * knobs.overlap_weight * (most - worker.cached_tokens) / pace,
        }
        if query.hints.preferred_taints:
            terms["taints"] = sum(terms.values()) * (taint_factor(query, worker) - 1.0)
        return terms

    def _loading_tokens(self, held: Sequence[int], size: int) -> float:
        knobs = self.options
        _, host, disk, external = held
        saved = host * knobs.host_weight + disk * knobs.disk_weight + external * knobs.external_weight
        return size * (host + disk + external - saved)

    def _fleet_pace(self, candidates: Sequence[Candidate]) -> float:
        knobs = self.options
        if not knobs.learn_pace:
            return knobs.prefill_tokens_per_s
        queues = [worker.prefill for worker in candidates]
        tokens = sum([queue.done_tokens for queue in queues])
        seconds = sum([queue.done_s for queue in queues])
        # One second at the assumed pace stands for what is not measured yet.
        return (tokens + knobs.prefill_tokens_per_s) / (seconds + 1.0)

    def _pace(self, worker: Candidate, fleet: float) -> float:
        queue = worker.prefill
        if not self.options.learn_pace or not queue.done_s:
            return fleet
        return (queue.done_tokens + PRIOR_TOKENS) / (queue.done_s + PRIOR_TOKENS / fleet)


def _remaining(worker: Candidate, pace: float, now_s: float) -> float:
    """Return booked prefill tokens less what the oldest prefill must have computed by now."""
    tokens = worker.prefill_tokens
    if not tokens:
        return 0.0
    queue = worker.prefill
    oldest = next(iter(queue.waiting.values()), 0)
    return tokens - min(oldest, pace * (now_s - queue.since_s))
