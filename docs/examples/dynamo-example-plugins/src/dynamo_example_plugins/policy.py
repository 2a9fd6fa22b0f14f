"""A routing policy: the worker with the fewest requests of ours, and the one it used longest ago among equals."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from dynamo_core.errors import ConfigurationError

if TYPE_CHECKING:
    from dynamo_router import Candidate, Query


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of the policy.

    Attributes:
        cached_tokens_per_request: How many cached prompt tokens outweigh one more request on a worker.
    """

    cached_tokens_per_request: int = 1024


class FewestRequests:
    """Costs are requests in progress, less what the worker need not compute."""

    name = "fewest-requests"
    needs_index = True

    def __init__(self, options: Mapping[str, Any]) -> None:
        try:
            self.options = msgspec.convert(dict(options), type=Options, strict=False)
        except msgspec.ValidationError as error:
            raise ConfigurationError(f"options of policy {self.name!r}: {error}") from error
        self._turn = 0
        self._last_turn: dict[object, int] = {}

    def terms(self, query: Query, candidates: Sequence[Candidate]) -> Sequence[Mapping[str, float]]:
        """Return the parts of each cost, for receipts."""
        weight = 1 / self.options.cached_tokens_per_request
        return [{"requests": float(c.active_requests), "cached": -c.cached_tokens * weight} for c in candidates]

    def score(self, query: Query, candidates: Sequence[Candidate]) -> Sequence[float]:
        """Return each cost."""
        return [sum(parts.values()) for parts in self.terms(query, candidates)]

    def pick(self, costs: Sequence[float], candidates: Sequence[Candidate], rng: random.Random) -> int:
        """Take the least cost; of equals the one whose turn is longest ago."""
        return min(range(len(costs)), key=lambda n: (costs[n], self._last_turn.get(candidates[n].worker, -1)))

    def chosen(self, query: Query, candidate: Candidate) -> None:
        """Note the turn."""
        self._turn += 1
        self._last_turn[candidate.worker] = self._turn
