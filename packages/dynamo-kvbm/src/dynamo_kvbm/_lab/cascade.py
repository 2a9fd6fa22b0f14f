"""Replays a trace against a cascade of tiers: where blocks are found, and what their first token waits for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dynamo_core import plugins
from dynamo_core.errors import ConfigurationError
from dynamo_kvbm._eviction.base import EvictionOrder
from dynamo_kvbm._lab.trace import TraceRequest


@dataclass(frozen=True)
class SimulatedTier:
    """One tier, nearest first.

    Attributes:
        name: For the table.
        capacity_blocks: Its size.
        fetch_ms: Time to fetch one block from it.
    """

    name: str
    capacity_blocks: int
    fetch_ms: float = 0.0

    @classmethod
    def parse(cls, text: str) -> SimulatedTier:
        """Read ``name=blocks`` or ``name=blocks@fetch_ms``.

        Raises:
            ConfigurationError: if it is neither.
        """
        name, _, sizes = text.strip().partition("=")
        blocks, _, fetch = sizes.partition("@")
        try:
            tier = cls(name, int(blocks), float(fetch or 0))
        except ValueError as error:
            raise ConfigurationError(f"tier {text!r} is not name=blocks or name=blocks@fetch_ms") from error
        if not name or tier.capacity_blocks < 1 or not 0 <= tier.fetch_ms < math.inf:
            raise ConfigurationError(f"tier {text!r} needs a name, at least 1 block and a time of at least 0 ms")
        return tier


@dataclass(frozen=True)
class CascadeOutcome:
    """What a cascade did.

    Attributes:
        tiers: The tiers.
        hits: Blocks found in each of them.
        asked_blocks: Blocks asked for.
        computed_tokens: Prompt tokens that were not found.
        requests: Requests replayed.
    """

    tiers: tuple[SimulatedTier, ...]
    hits: tuple[int, ...]
    asked_blocks: int
    computed_tokens: int
    requests: int

    def mean_wait_s(self, tokens_per_s: float) -> float:
        """Mean time to fetch what was found and compute the rest."""
        fetch_s = sum(hits * tier.fetch_ms for hits, tier in zip(self.hits, self.tiers, strict=True)) / 1000
        return (fetch_s + self.computed_tokens / tokens_per_s) / self.requests

    def table(self, tokens_per_s: float | None) -> str:
        """Return a text table: a row a tier."""
        lines = [f"{'tier':<12}{'blocks':>10}{'hit %':>10}"]
        for tier, hits in zip(self.tiers, self.hits, strict=True):
            lines.append(f"{tier.name:<12}{tier.capacity_blocks:>10,}{100 * hits / self.asked_blocks:>10.2f}")
        lines.append(f"{'all':<12}{'':>10}{100 * sum(self.hits) / self.asked_blocks:>10.2f}")
        if tokens_per_s is not None:
            lines.append(f"mean wait for prompt {self.mean_wait_s(tokens_per_s):.3f} s")
        return "\n".join(lines)


def simulate_cascade(trace: Sequence[TraceRequest], policy: str, tiers: Sequence[SimulatedTier]) -> CascadeOutcome:
    """Replay a trace: blocks enter the nearest tier, what it evicts sinks, what is found below comes up again.

    Raises:
        ConfigurationError: if the policy is not installed.
    """
    orders: list[EvictionOrder] = [plugins.load("kv_eviction", policy)(tier.capacity_blocks) for tier in tiers]
    hits = [0] * len(tiers)
    computed = 0
    for request in trace:
        path = request.path
        places = _located(path, orders)
        for place in places:
            hits[place] += 1
        found = len(places)
        computed += request.input_tokens - math.ceil(request.input_tokens * found / max(1, len(path)))
        for order in orders:
            order.touch([block for block in path[:found] if block in order])
        _insert(path, orders, tiers, 0)
    asked = sum(len(request.path) for request in trace)
    return CascadeOutcome(tuple(tiers), tuple(hits), asked, computed, len(trace))


def _located(path: Sequence[int], orders: Sequence[EvictionOrder]) -> list[int]:
    """Return the nearest tier of each block of the longest prefix that the tiers hold together."""
    places: list[int] = []
    for block in path:
        place = next((number for number, order in enumerate(orders) if block in order), None)
        if place is None:
            break
        places.append(place)
    return places


def _insert(path: Sequence[int], orders: Sequence[EvictionOrder], tiers: Sequence[SimulatedTier], number: int) -> None:
    """Put the missing blocks of a path into a tier, and its victims, one by one, into the one below."""
    order, capacity = orders[number], tiers[number].capacity_blocks
    parents = dict(zip(path, (None, *path), strict=False))
    held = [block for block in path if block in order]
    order.pin(held)
    fresh = [block for block in path if block not in order][: capacity - len(held)]
    while len(order) + len(fresh) > capacity:
        victim = order.evict()
        if victim is None:
            break
        if number + 1 < len(orders) and victim not in orders[number + 1]:
            _insert([victim], orders, tiers, number + 1)
    order.insert([(block, parents[block]) for block in fresh[: capacity - len(order)]])
    order.unpin(held)
