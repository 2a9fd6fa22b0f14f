"""The linear cost of prefill work and held blocks, and the ``kv`` policy on it.

With B the block size and I the prompt's tokens, for each worker::

    excess   = (prefill_tokens - least prefill_tokens) / B / blocks of the prompt
    credit   = overlap_credit / (1 + credit_decay x excess) x device blocks
               + host_weight x host blocks + disk_weight x disk blocks + external_weight x external blocks
    prefill  = max((prefill_tokens + I) / B - credit, 0)
    decode   = decode_blocks + blocks of the prompt that no running request there uses yet
    cost     = (prefill_scale x prefill + decode + active_request_weight x active_requests) x taint factor

Of a split request, the decode hop has no prefill term, and the prefill hop books no blocks.
The taint factor is ``exp(-tanh(sum of the preferred taints' weights that the worker has))``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec

from dynamo_core.routing import RoutingPhase
from dynamo_router._policy import NO_BLOCKS, Candidate, PolicyOptions, Query, least, read_options

NonNegative = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class KvOptions(PolicyOptions, frozen=True):
    """Knobs of the linear cost.

    Attributes:
        overlap_credit: Blocks of prefill that one cached device block saves.
        credit_decay: How fast a busy worker's credit fades with its backlog over the least busy one's.
        prefill_scale: Weight of prefill work against held blocks.
        host_weight: Credit of a host block.
        disk_weight: Credit of a disk block.
        external_weight: Credit of an external block.
        active_request_weight: Blocks that one active request counts for.
        track_prefill: Whether prefill work counts at all; decode workers behind a prefill pool leave it out.
        temperature: 0 takes the least cost; above, a softmax over normalised costs is drawn from.
    """

    overlap_credit: NonNegative = 1.0
    credit_decay: NonNegative = 0.0
    prefill_scale: NonNegative = 1.0
    host_weight: Share = 0.75
    disk_weight: Share = 0.25
    external_weight: Share = 0.25
    active_request_weight: NonNegative = 0.0
    track_prefill: bool = True
    temperature: NonNegative = 0.0


class KvPolicy:
    """Least linear cost of prefill work and held blocks."""

    name = "kv"
    needs_index = True

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = read_options(KvOptions, self.name, options)

    def score(self, query: Query, candidates: Sequence[Candidate]) -> Sequence[float]:
        """Return the linear cost of each candidate."""
        knobs = self.options
        size, tokens, blocks = query.block_size, query.prompt_tokens, query.blocks
        scale, weight, track = knobs.prefill_scale, knobs.active_request_weight, self._counts_prefill(query)
        credits: dict[tuple[int, ...], float] = {NO_BLOCKS: 0.0}
        decayed = self._decay(query, candidates) if knobs.credit_decay else None
        costs: list[float] = []
        for worker in candidates:
            held = worker.tier_blocks
            credit = credits.get(held)
            if credit is None:
                # Few workers differ in what they hold, so the credit is worked out once for each kind.
                credit = credits[held] = self._credit(held, 1.0)
            if decayed is not None and held[0]:
                credit = self._credit(held, decayed[worker.slot])
            prefill = (worker.prefill_tokens + tokens) / size - credit if track else 0.0
            decode = worker.decode_blocks + blocks - worker.active_blocks
            costs.append((scale * prefill if prefill > 0.0 else 0.0) + decode + weight * worker.active_requests)
        if query.hints.preferred_taints:
            return [cost * taint_factor(query, worker) for cost, worker in zip(costs, candidates, strict=True)]
        return costs

    def terms(self, query: Query, candidates: Sequence[Candidate]) -> Sequence[Mapping[str, float]]:
        """Return the cost's parts. ``credit`` is negative, and ``clamp`` gives back what exceeded the work."""
        decays = self._decay(query, candidates)
        return [self._terms(query, worker, decays[worker.slot]) for worker in candidates]

    def pick(self, costs: Sequence[float], candidates: Sequence[Candidate], rng: random.Random) -> int:
        """Take the least cost, or draw from a softmax if a temperature is set."""
        return softmax_pick(costs, self.options.temperature, rng)

    def chosen(self, query: Query, candidate: Candidate) -> None:
        """Keep no state."""

    def _terms(self, query: Query, worker: Candidate, decay: float) -> dict[str, float]:
        knobs = self.options
        track = self._counts_prefill(query)
        raw = (worker.prefill_tokens + query.prompt_tokens) / query.block_size if track else 0.0
        credit = self._credit(worker.tier_blocks, decay) if track else 0.0
        terms = {
            "prefill": knobs.prefill_scale * raw,
            "credit": -knobs.prefill_scale * credit,
            "clamp": knobs.prefill_scale * max(credit - raw, 0.0),
            "decode": float(worker.decode_blocks + query.blocks - worker.active_blocks),
            "active_requests": knobs.active_request_weight * worker.active_requests,
        }
        if query.hints.preferred_taints:
            terms["taints"] = sum(terms.values()) * (taint_factor(query, worker) - 1.0)
        return terms

    def _counts_prefill(self, query: Query) -> bool:
        # The decode hop of a split request finds its prompt computed elsewhere.
        return self.options.track_prefill and query.phase is not RoutingPhase.DECODE

    def _decay(self, query: Query, candidates: Sequence[Candidate]) -> dict[int, float]:
        floor = min(worker.prefill_tokens for worker in candidates)
        scale = self.options.credit_decay / query.block_size / max(query.blocks, 1)
        return {worker.slot: 1.0 / (1.0 + scale * (worker.prefill_tokens - floor)) for worker in candidates}

    def _credit(self, held: Sequence[int], decay: float) -> float:
        knobs = self.options
        device, host, disk, external = held
        lower = knobs.host_weight * host + knobs.disk_weight * disk + knobs.external_weight * external
        return knobs.overlap_credit * decay * device + lower


def taint_factor(query: Query, worker: Candidate) -> float:
    """Return the factor by which preferred taints change a worker's cost."""
    preferred = query.hints.preferred_taints
    return math.exp(-math.tanh(sum(weight for taint, weight in preferred.items() if taint in worker.taints)))


def softmax_pick(costs: Sequence[float], temperature: float, rng: random.Random) -> int:
    """Draw an index with probability falling in the cost, normalised by the costs' spread.

    Temperature 0 takes the least; equal costs are drawn from uniformly at any temperature.
    """
    low, spread = min(costs), max(costs) - min(costs)
    if temperature <= 0 or spread <= 0:
        return least(costs, rng)
    weights = [math.exp(-(cost - low) / spread / temperature) for cost in costs]
    return rng.choices(range(len(costs)), weights)[0]
