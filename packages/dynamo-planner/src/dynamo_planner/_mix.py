"""Fleets of several GPU types that serve the same work: the cheapest mix that keeps the targets within the budget.

Each type says what one replica gives the workload. A mix keeps up if its sum does, and keeps the first token in time if
the queue in front of all its replicas, taken as equals of their mean speed, is short enough. The search is exact within
that model: it goes through the types by price for what they serve, and leaves a branch once even fractions of the
cheapest type that is left would not make it cheaper than the best mix found.

What runs is not thrown away for small change: a mix that only adds to the present fleet, or only takes from it, is kept
unless the cheapest one saves a tenth. Nothing is let go before what replaces it serves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from dynamo_core.planning import PoolState
from dynamo_planner._capacity import EPSILON, Offer, Slo, Workload, wait_tail_s
from dynamo_planner._reasons import Reason

SWITCH_GAIN = 0.1

Counts = tuple[int, ...]


class OfferingModel(Protocol):
    """A capacity model that says what one replica gives."""

    def offer(self, workload: Workload, slo: Slo) -> Offer:
        """Return what one replica gives."""
        ...


@dataclass(frozen=True)
class GpuType:
    """One kind of engine.

    Attributes:
        role: Role of its replicas.
        price_per_hour: Price of one replica.
        model: What it can do.
        gpus: GPUs of one replica.
        least: Fewest replicas.
        most: Most replicas.
    """

    role: str
    price_per_hour: float
    model: OfferingModel
    gpus: int = 1
    least: int = 0
    most: int = 8


@dataclass(frozen=True)
class Choice:
    """The mix that is wanted.

    Attributes:
        replicas: By role.
        reason: Why this one.
        note: In words.
        values: Numbers behind it.
    """

    replicas: dict[str, int]
    reason: Reason
    note: str
    values: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class _Problem:
    """One search: types in order of price for what they serve, and what must be served."""

    types: Sequence[GpuType]
    offers: Sequence[Offer]
    workload: Workload
    slo: Slo | None
    max_gpus: int
    max_price: float

    def serves(self, counts: Counts) -> bool:
        """Whether a mix keeps up and in time."""
        if self.workload.requests_s <= 0:
            return True
        used = [(count, offer) for count, offer in zip(counts, self.offers, strict=True) if count]
        planned = self.workload.requests_s
        expected = planned if self.workload.expected_s is None else self.workload.expected_s
        if sum(count * offer.requests_s * offer.burst_share for count, offer in used) < planned - EPSILON:
            return False
        if sum(count * offer.requests_s * offer.steady_share for count, offer in used) < expected - EPSILON:
            return False
        return self.slo is None or _first_token_s(used, planned, expected, self.slo) <= self.slo.ttft_s

    def price(self, counts: Counts) -> float:
        """Return a mix's price an hour."""
        return sum(count * kind.price_per_hour for count, kind in zip(counts, self.types, strict=True))

    def fits(self, counts: Counts) -> bool:
        """Whether a mix is within the budgets."""
        gpus = sum(count * kind.gpus for count, kind in zip(counts, self.types, strict=True))
        return gpus <= self.max_gpus and self.price(counts) <= self.max_price + EPSILON

    def cheapest(self, low: Counts, high: Counts) -> Counts | None:
        """Return the cheapest mix between two that serves and fits; None if none does."""
        return _Search(self, high).run(low)

    def largest(self, low: Counts, high: Counts) -> Counts:
        """Return a mix that fits and serves much, for work that nothing within the budgets serves."""
        orders = (
            sorted(range(len(low)), key=lambda place: -self.offers[place].requests_s / self.types[place].gpus),
            list(range(len(low))),
        )
        return max((self._filled(low, high, order) for order in orders), key=self._capacity)

    def _filled(self, low: Counts, high: Counts, order: Sequence[int]) -> Counts:
        counts = low
        for place in order:
            while counts[place] < high[place] and self.fits(grown := _with(counts, place, counts[place] + 1)):
                counts = grown
        return counts

    def _capacity(self, counts: Counts) -> float:
        return sum(count * offer.requests_s for count, offer in zip(counts, self.offers, strict=True))


class _Search:
    """Branch and bound over the counts of each type in turn."""

    def __init__(self, problem: _Problem, high: Counts) -> None:
        self._problem = problem
        self._high = high
        self._best: Counts | None = None
        self._best_price = math.inf

    def run(self, low: Counts) -> Counts | None:
        """Return the cheapest mix that has at least these."""
        # Mixes of one type beside what must be are found at once, and spare most of the rest of the search.
        for place in range(len(low)):
            self._fill(low, place)
        self._descend(low, 0)
        return self._best

    def _fill(self, counts: Counts, place: int) -> None:
        for count in range(counts[place], self._high[place] + 1):
            if self._taken(_with(counts, place, count)):
                return

    def _descend(self, counts: Counts, place: int) -> None:
        if place == len(counts) or self._bound(counts, place) >= self._best_price - EPSILON:
            return
        for count in range(counts[place], self._high[place] + 1):
            mix = _with(counts, place, count)
            if self._taken(mix) or not self._problem.fits(mix):
                return
            self._descend(mix, place + 1)

    def _taken(self, counts: Counts) -> bool:
        """Whether a mix serves, in which case more of anything is only dearer; remember the cheapest."""
        if not self._problem.serves(counts):
            return False
        price = self._problem.price(counts)
        if self._problem.fits(counts) and price < self._best_price - EPSILON:
            self._best, self._best_price = counts, price
        return True

    def _bound(self, counts: Counts, place: int) -> float:
        """Return the price below which no mix is that only adds types from this one on."""
        problem = self._problem
        have = sum(
            count * offer.requests_s * offer.burst_share for count, offer in zip(counts, problem.offers, strict=True)
        )
        lacking = max(0.0, problem.workload.requests_s - have)
        offer, kind = problem.offers[place], problem.types[place]
        # Types are in the order of this price, so the first that is left is the cheapest for the rest.
        return problem.price(counts) + lacking * kind.price_per_hour / max(
            offer.requests_s * offer.burst_share, EPSILON
        )


class GpuMix:
    """Chooses among GPU types that serve the same work.

    Args:
        name: What they serve, for reasons and values.
        types: The types.
        max_gpus: GPUs of all of them.
        max_price_per_hour: Price of all of them.
    """

    def __init__(
        self, name: str, types: Sequence[GpuType], *, max_gpus: int, max_price_per_hour: float = math.inf
    ) -> None:
        self.name = name
        self.roles = frozenset(kind.role for kind in types)
        self._types = tuple(types)
        self._max_gpus = max_gpus
        self._max_price = max_price_per_hour

    def woken(self) -> dict[str, int]:
        """Return the fleet of one replica, of the cheapest type, that the first request wakes."""
        first = min(self._types, key=lambda kind: kind.price_per_hour)
        return {kind.role: max(kind.least, int(kind is first)) for kind in self._types}

    def choose(
        self, workload: Workload, slo: Slo, pools: Mapping[str, PoolState], stuck: frozenset[str] = frozenset()
    ) -> Choice:
        """Return the mix for a workload.

        Args:
            workload: What is to be served.
            slo: Targets.
            pools: The present fleet.
            stuck: Roles whose replicas do not get ready, of which no more are counted on.
        """
        problem = self._problem(workload, slo, pools, stuck)
        low = tuple(kind.least for kind in problem.types)
        high = tuple(self._most(problem, place, pools, stuck) for place in range(len(low)))
        now = tuple(pools[kind.role].desired for kind in problem.types)
        counts, reason = self._decided(problem, (low, high), now)
        ready = tuple(min(count, pools[kind.role].ready) for count, kind in zip(counts, problem.types, strict=True))
        # Nothing goes before what replaces it serves, and what does not get ready is left to whoever starts it.
        keep = any(count < there for count, there in zip(counts, now, strict=True)) and not problem.serves(ready)
        wanted = {
            kind.role: max(count, there) if keep or kind.role in stuck else count
            for kind, count, there in zip(problem.types, counts, now, strict=True)
        }
        return self._told(problem, (low, high), (counts, wanted), reason)

    def _most(self, problem: _Problem, place: int, pools: Mapping[str, PoolState], stuck: frozenset[str]) -> int:
        kind = problem.types[place]
        if problem.slo is not None and not problem.offers[place].meets_slo:
            return kind.least
        return max(kind.least, min(kind.most, pools[kind.role].ready)) if kind.role in stuck else kind.most

    def _problem(self, workload: Workload, slo: Slo, pools: Mapping[str, PoolState], stuck: frozenset[str]) -> _Problem:
        offers = {kind.role: kind.model.offer(workload, slo) for kind in self._types}

        def price(kind: GpuType) -> float:
            offer = offers[kind.role]
            return kind.price_per_hour / max(offer.requests_s * offer.burst_share, EPSILON)

        types = sorted(self._types, key=price)
        ordered = [offers[kind.role] for kind in types]
        # Where no type keeps the targets, the cheapest that keeps up is left.
        kept = slo if any(offer.meets_slo for offer in ordered) else None
        held = sum(
            kind.gpus * max(0, pools[kind.role].desired - pools[kind.role].ready)
            for kind in types
            if kind.role in stuck
        )
        return _Problem(types, ordered, workload, kept, self._max_gpus - held, self._max_price)

    def _decided(self, problem: _Problem, limits: tuple[Counts, Counts], now: Counts) -> tuple[Counts, Reason]:
        low, high = limits
        free = problem.cheapest(low, high)
        if free is None:
            return problem.largest(low, high), Reason.MIX_LIMITED
        inside = tuple(max(least, min(most, count)) for least, most, count in zip(low, high, now, strict=True))
        kept = problem.cheapest(low, inside) if problem.serves(inside) else problem.cheapest(inside, high)
        if kept is None or kept == free:
            return free, Reason.MIX_CHEAPEST
        both = tuple(max(pair) for pair in zip(free, now, strict=True))
        saves = problem.price(free) <= problem.price(kept) * (1 - SWITCH_GAIN)
        if saves and replace(problem, max_price=math.inf).fits(both):
            return free, Reason.MIX_CHEAPEST
        return kept, Reason.MIX_KEPT

    def _told(
        self,
        problem: _Problem,
        limits: tuple[Counts, Counts],
        chosen: tuple[Counts, dict[str, int]],
        reason: Reason,
    ) -> Choice:
        (low, high), (counts, wanted) = limits, chosen
        values = {f"mix.{self.name}.price_per_hour": problem.price(counts)}
        parts: list[str] = []
        for place, kind in enumerate(problem.types):
            offer = problem.offers[place]
            if math.isfinite(offer.requests_s):
                values[f"{kind.role}.engine_requests_s"] = offer.requests_s
            values[f"{kind.role}.meets_slo"] = float(offer.meets_slo)
            alone = problem.cheapest(low, _with(low, place, high[place]))
            if alone is not None:
                values[f"{kind.role}.alone_price_per_hour"] = problem.price(alone)
                parts.append(f"{kind.role} alone {problem.price(alone):.2f}")
        mix = " + ".join(f"{count} {kind.role}" for count, kind in zip(counts, problem.types, strict=True) if count)
        note = f"{mix or 'nothing'} at {problem.price(counts):.2f} an hour"
        note += f"; {', '.join(parts)}" if parts else ""
        return Choice(wanted, reason, note, values)


def _with(counts: Counts, place: int, count: int) -> Counts:
    return (*counts[:place], count, *counts[place + 1 :])


def _first_token_s(used: Sequence[tuple[int, Offer]], planned: float, expected: float, slo: Slo) -> float:
    """Return the time to first token at the percentile; 0 where no queue is modelled."""
    queueing = [(count, offer) for count, offer in used if offer.cv2 is not None]
    if not queueing:
        return 0.0
    servers = sum(count for count, _ in queueing)
    service_s = servers / max(sum(count * offer.requests_s for count, offer in queueing), EPSILON)
    cv2 = max(offer.cv2 or 0.0 for _, offer in queueing)
    rate = planned if any(offer.queues_bursts for _, offer in queueing) else expected
    wait_s = wait_tail_s(rate, service_s, servers, slo.percentile / 100, cv2)
    return max(offer.first_s for _, offer in queueing) + wait_s
