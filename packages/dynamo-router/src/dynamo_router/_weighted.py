"""A sum of normalised scores: cached prefix, queue, free KV blocks, and turns for cold prompts."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from dynamo_router._cost import NonNegative
from dynamo_router._policy import Candidate, PolicyOptions, Query, least, read_options


class WeightedOptions(PolicyOptions, frozen=True):
    """Weights of the scores, each of which lies between 0 and 1.

    Attributes:
        prefix: Share of the prompt that is cached.
        queue: Room in the queue: 1 for the shortest of all prefill queues, 0 for the longest.
        kv: Share of KV blocks that is free.
        cold_turn: For prompts that nobody has cached, how long ago the worker last took one.
    """

    prefix: NonNegative = 3.0
    queue: NonNegative = 2.0
    kv: NonNegative = 2.0
    cold_turn: NonNegative = 2.0


class WeightedPolicy:
    """Least weighted sum of what each score lacks to 1."""

    name = "weighted"
    needs_index = True

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = read_options(WeightedOptions, self.name, options)
        # Slots in the order of their last cold prompt, oldest first.
        self._cold: OrderedDict[int, None] = OrderedDict()

    def score(self, query: Query, candidates: Sequence[Candidate]) -> Sequence[float]:
        """Return the weighted sum."""
        return [sum(parts.values()) for parts in self.terms(query, candidates)]

    def terms(self, query: Query, candidates: Sequence[Candidate]) -> Sequence[Mapping[str, float]]:
        """Return what each score lacks, weighted."""
        knobs = self.options
        queues = [worker.prefill_tokens for worker in candidates]
        shortest, spread = min(queues), max(queues) - min(queues) or 1
        places = self._cold_places(candidates)
        tokens = max(query.prompt_tokens, 1)
        return [
            {
                "prefix": knobs.prefix * (1.0 - worker.cached_tokens / tokens),
                "queue": knobs.queue * (worker.prefill_tokens - shortest) / spread,
                "kv": knobs.kv * _kv_usage(worker),
                "cold_turn": knobs.cold_turn * places.get(worker.slot, 0.0),
            }
            for worker in candidates
        ]

    def pick(self, costs: Sequence[float], candidates: Sequence[Candidate], rng: random.Random) -> int:
        """Take the least, ties broken at random."""
        return least(costs, rng)

    def chosen(self, query: Query, candidate: Candidate) -> None:
        """Remember who took a cold prompt."""
        if not candidate.cached_tokens:
            self._cold[candidate.slot] = None
            self._cold.move_to_end(candidate.slot)

    def _cold_places(self, candidates: Sequence[Candidate]) -> dict[int, float]:
        if any(worker.cached_tokens for worker in candidates):
            return {}
        present = {worker.slot for worker in candidates}
        for slot in [slot for slot in self._cold if slot not in present]:
            del self._cold[slot]
        return {slot: (place + 1) / len(present) for place, slot in enumerate(self._cold)}


def _kv_usage(worker: Candidate) -> float:
    report = worker.reported
    if report is not None and report.kv_total_blocks:
        return min(report.kv_used_blocks / report.kv_total_blocks, 1.0)
    return min(worker.decode_blocks / worker.total_kv_blocks, 1.0) if worker.total_kv_blocks else 0.0
