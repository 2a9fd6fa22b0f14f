"""Figures of a replay with bootstrap intervals, and comparison of policies on the same requests."""

from __future__ import annotations

import operator
import random
import re
from collections.abc import Callable, Mapping, Sequence

import msgspec

from dynamo_core.errors import ConfigurationError
from dynamo_router._lab_replay import ReplayedRequest

Figure = Callable[[Sequence[ReplayedRequest]], float]


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which that share of the values lies (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def _ttft_percentile(share: float) -> Figure:
    return lambda results: percentile([one.ttft_s for one in results], share)


def _hit_rate(results: Sequence[ReplayedRequest]) -> float:
    return sum(one.cached_tokens for one in results) / max(sum(one.prompt_tokens for one in results), 1)


def _ttft_mean(results: Sequence[ReplayedRequest]) -> float:
    return sum(one.ttft_s for one in results) / len(results)


def _duration_mean(results: Sequence[ReplayedRequest]) -> float:
    return sum(one.duration_s for one in results) / len(results)


FIGURES: Mapping[str, Figure] = {
    "hit_rate": _hit_rate,
    "ttft_mean": _ttft_mean,
    "ttft_p50": _ttft_percentile(0.50),
    "ttft_p90": _ttft_percentile(0.90),
    "ttft_p99": _ttft_percentile(0.99),
    "duration_mean": _duration_mean,
}
"""Figures of a replay by name; seconds, or a share for the hit rate."""


class Estimate(msgspec.Struct, frozen=True):
    """A figure with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def summarize(results: Sequence[ReplayedRequest], *, resamples: int, seed: int) -> dict[str, Estimate]:
    """Return every figure with its interval over resampled requests."""
    rng = random.Random(seed)
    drawn: dict[str, list[float]] = {name: [] for name in FIGURES}
    for _ in range(resamples):
        sample = rng.choices(results, k=len(results))
        for name, figure in FIGURES.items():
            drawn[name].append(figure(sample))
    found: dict[str, Estimate] = {}
    for name, figure in FIGURES.items():
        value = figure(results)
        values = drawn[name] or [value]
        found[name] = Estimate(value, percentile(values, 0.025), percentile(values, 0.975))
    return found


class Gate(msgspec.Struct, frozen=True):
    """A condition under which a comparison fails: a figure's change against the first policy.

    Attributes:
        figure: Name of the figure.
        above: Whether a change above the limit fails, else one below it.
        limit: Relative change, 0.03 for +3 %.
    """

    figure: str
    above: bool
    limit: float

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Read ``ttft_p99 > +3%``.

        Raises:
            ConfigurationError: if it is not of that form or names no figure.
        """
        match = re.fullmatch(r"\s*(\w+)\s*([<>])\s*([+-]?\d+(?:\.\d+)?)\s*%\s*", text)
        if match is None or match[1] not in FIGURES:
            raise ConfigurationError(
                f"--fail-if {text!r} is not 'FIGURE > +N%' or 'FIGURE < -N%' with a figure of {', '.join(FIGURES)}"
            )
        return cls(match[1], match[2] == ">", float(match[3]) / 100.0)

    def failure(self, policy: str, base: Mapping[str, Estimate], other: Mapping[str, Estimate]) -> str:
        """Return why a policy fails against the first one, in words; empty if it passes."""
        before, after = base[self.figure].value, other[self.figure].value
        change = (after - before) / before if before else 0.0
        beyond = operator.gt if self.above else operator.lt
        if not beyond(change, self.limit):
            return ""
        return f"{policy}: {self.figure} changed by {change:+.1%}, limit {self.limit:+.1%}"
