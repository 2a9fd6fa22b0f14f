"""Rules of other routers that trade cached prefixes against load, under their own terms."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dynamo_router._cost import NonNegative, Share
from dynamo_router._policies import SimplePolicy
from dynamo_router._policy import Candidate, PolicyOptions, Query, read_options


class LMetricPolicy(SimplePolicy):
    """Least product of prefill work and held blocks; it has no weights to tune.

    ``cost = (prefill_tokens + uncached tokens) / B x (decode_blocks + new blocks + 1)``
    """

    name = "lmetric"
    term = "prefill_times_blocks"
    needs_index = True

    def score(self, query: Query, candidates: Sequence[Candidate]) -> Sequence[float]:
        """Return the product."""
        size, tokens, blocks = query.block_size, query.prompt_tokens, query.blocks
        return [
            (worker.prefill_tokens + tokens - worker.cached_tokens)
            / size
            * (worker.decode_blocks + blocks - worker.active_blocks + 1)
            for worker in candidates
        ]


class PrefixThresholdOptions(PolicyOptions, frozen=True):
    """When balance comes before prefixes.

    Attributes:
        imbalance_requests: Difference of active requests, most to least, that counts as imbalance ...
        imbalance_ratio: ... if the most also exceeds the least by this factor.
        match_share: Share of the prompt that must be cached for the prefix to decide.
    """

    imbalance_requests: int = 32
    imbalance_ratio: NonNegative = 1.1
    match_share: Share = 0.5


class PrefixThresholdPolicy(SimplePolicy):
    """The best match if it is good and the fleet is balanced, else the fewest active requests."""

    name = "prefix-threshold"
    needs_index = True

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._knobs = read_options(PrefixThresholdOptions, self.name, options)

    @property
    def options(self) -> PrefixThresholdOptions:
        """Its options."""
        return self._knobs

    def score(self, query: Query, candidates: Sequence[Candidate]) -> Sequence[float]:
        """Return the missing tokens where the prefix decides, else active requests."""
        if self._prefix_decides(query, candidates):
            return [float(query.prompt_tokens - worker.cached_tokens) for worker in candidates]
        return [float(worker.active_requests) for worker in candidates]

    def terms(self, query: Query, candidates: Sequence[Candidate]) -> Sequence[Mapping[str, float]]:
        """Return the one term, named after what decided."""
        term = "uncached_tokens" if self._prefix_decides(query, candidates) else "active_requests"
        return [{term: cost} for cost in self.score(query, candidates)]

    def _prefix_decides(self, query: Query, candidates: Sequence[Candidate]) -> bool:
        knobs = self._knobs
        active = [worker.active_requests for worker in candidates]
        most, least = max(active), min(active)
        if most - least > knobs.imbalance_requests and most > knobs.imbalance_ratio * least:
            return False
        best = max(worker.cached_tokens for worker in candidates)
        return best > knobs.match_share * max(query.prompt_tokens, 1)


class PrefixBalancedOptions(PolicyOptions, frozen=True):
    """When balance comes before prefixes.

    Attributes:
        imbalance_requests: Difference of active requests, most to least, above which the least loaded is taken.
        deviations: Standard deviations above the mean load that a matching worker may have.
    """

    imbalance_requests: int = 8
    deviations: NonNegative = 1.0


class PrefixBalancedPolicy(SimplePolicy):
    """The best match among workers that are not much busier than the mean, else the fewest active requests."""

    name = "prefix-balanced"
    term = "rank"
    needs_index = True

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._knobs = read_options(PrefixBalancedOptions, self.name, options)

    @property
    def options(self) -> PrefixBalancedOptions:
        """Its options."""
        return self._knobs

    def score(self, query: Query, candidates: Sequence[Candidate]) -> Sequence[float]:
        """Return each candidate's place in the order of preference; equals share a place."""
        active = [worker.active_requests for worker in candidates]
        balanced = max(active) - min(active) <= self._knobs.imbalance_requests
        limit = statistics.fmean(active) + self._knobs.deviations * statistics.pstdev(active)

        def preference(worker: Candidate) -> tuple[bool, int, int]:
            takes_part = balanced and worker.cached_tokens > 0 and worker.active_requests <= limit
            return (not takes_part, -worker.cached_tokens if takes_part else 0, worker.active_requests)

        keys = [preference(worker) for worker in candidates]
        places = {key: float(place) for place, key in enumerate(sorted(set(keys)))}
        return [places[key] for key in keys]
