"""Policies that need no index: round-robin, random, power-of-two, least-loaded, direct."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from dynamo_core.errors import InvalidRequestError
from dynamo_core.ids import WorkerId
from dynamo_router._policy import Candidate, PolicyOptions, Query, least, read_options


class NoOptions(PolicyOptions, frozen=True):
    """Options of a policy that has none."""


class SimplePolicy:
    """A policy whose cost is one term and that picks the least.

    Attributes:
        name: Name for receipts.
        term: Name of its one term.
        needs_index: Whether it reads what candidates have cached.
    """

    name = ""
    term = "load"
    needs_index = False

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = read_options(NoOptions, self.name, options)

    @property
    def options(self) -> PolicyOptions:
        """Its options; none."""
        return self._options

    def score(self, query: Query, candidates: Sequence[Candidate]) -> Sequence[float]:
        """Return each candidate's cost; all are equal unless a policy says otherwise."""
        return [0.0] * len(candidates)

    def terms(self, query: Query, candidates: Sequence[Candidate]) -> Sequence[Mapping[str, float]]:
        """Return the one term."""
        return [{self.term: cost} for cost in self.score(query, candidates)]

    def pick(self, costs: Sequence[float], candidates: Sequence[Candidate], rng: random.Random) -> int:
        """Take the least cost, ties broken at random."""
        return least(costs, rng)

    def chosen(self, query: Query, candidate: Candidate) -> None:
        """Keep no state."""


class RandomPolicy(SimplePolicy):
    """Uniform over the candidates: all costs tie."""

    name = "random"
    term = "random"


class LeastLoadedPolicy(SimplePolicy):
    """Fewest active requests."""

    name = "least-loaded"
    term = "active_requests"

    def score(self, query: Query, candidates: Sequence[Candidate]) -> Sequence[float]:
        """Return the number of active requests."""
        return [float(worker.active_requests) for worker in candidates]


class PowerOfTwoPolicy(LeastLoadedPolicy):
    """Of two workers drawn at random, the one with fewer active requests."""

    name = "power-of-two"

    def pick(self, costs: Sequence[float], candidates: Sequence[Candidate], rng: random.Random) -> int:
        """Draw two and take the lesser."""
        pair = rng.sample(range(len(costs)), min(2, len(costs)))
        return pair[least([costs[index] for index in pair], rng)]


class RoundRobinPolicy(SimplePolicy):
    """Each worker in turn, in the order of their ids; those filtered out are passed over."""

    name = "round-robin"
    term = "turns_to_wait"

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self._last = WorkerId(-1)

    def score(self, query: Query, candidates: Sequence[Candidate]) -> Sequence[float]:
        """Return how many turns each candidate is from its own."""
        order = sorted(candidates, key=lambda worker: (worker.worker <= self._last, worker.worker))
        turns = {worker.slot: float(turn) for turn, worker in enumerate(order)}
        return [turns[worker.slot] for worker in candidates]

    def chosen(self, query: Query, candidate: Candidate) -> None:
        """Move the turn on."""
        self._last = candidate.worker


class DirectPolicy(SimplePolicy):
    """The worker that the request names; refuses requests that name none."""

    name = "direct"
    term = "pinned"

    def score(self, query: Query, candidates: Sequence[Candidate]) -> Sequence[float]:
        """Refuse a request without a pin.

        Raises:
            InvalidRequestError: if the request names no instance.
        """
        if query.hints.instance_id is None and query.hints.prefill_instance_id is None:
            raise InvalidRequestError(
                "policy 'direct' needs a worker named by the request; set routing.instance_id or use another policy",
                param="routing.instance_id",
            )
        return [0.0] * len(candidates)
