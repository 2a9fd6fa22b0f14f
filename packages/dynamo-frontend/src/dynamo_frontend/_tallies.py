"""Metrics that every request touches, as plain numbers that become samples only when they are scraped.

The client library locks and walks the buckets for each observation; a dozen of them cost a tenth of a short request.
Everything here runs on the event loop, so plain additions do.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from dynamo_core.telemetry import Metrics


class Count:
    """A counter or gauge of one label set."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def inc(self, amount: int = 1) -> None:
        """Add."""
        self.value += amount

    def dec(self) -> None:
        """Take one away."""
        self.value -= 1


class Distribution:
    """A histogram of one label set.

    Args:
        bounds: Upper bounds of its buckets, ascending; one more holds what is above.
    """

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """Return the buckets as they are scraped: bound and number of values up to it."""
        found: list[tuple[str, float]] = []
        seen = 0
        for bound, count in zip([*map(_bound_text, self._bounds), "+Inf"], self.counts, strict=True):
            seen += count
            found.append((bound, seen))
        return found


def _bound_text(bound: float) -> str:
    return str(float(bound))


S = TypeVar("S", Count, Distribution)


class Family(Generic[S]):
    """One metric: its series by label values."""

    def __init__(self, names: tuple[str, ...], make: Callable[[], S]) -> None:
        self._names = names
        self._make = make
        self.series: dict[tuple[str, ...], S] = {}

    def labels(self, **values: str) -> S:
        """Return the series of some label values, made if it is new."""
        key = tuple([values[name] for name in self._names])
        found = self.series.get(key)
        if found is None:
            found = self.series[key] = self._make()
        return found


class Tallies:
    """A collector of such metrics; it registers itself.

    Args:
        metrics: Registry and fixed labels.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._fixed = metrics.fixed_labels
        self._parts: list[Callable[[], Metric]] = []
        metrics.registry.register(self)  # type: ignore[arg-type] - the library's Collector is an abstract class, not a protocol

    def collect(self) -> Iterator[Metric]:
        """Make the samples. Called by the registry."""
        for part in self._parts:
            yield part()

    def counter(self, name: str, documentation: str, labels: Sequence[str]) -> Family[Count]:
        """Return a new counter."""
        family = Family(tuple(labels), Count)
        self._parts.append(
            lambda: self._numbers(CounterMetricFamily(name, documentation, None, self._names(labels)), family)
        )
        return family

    def gauge(self, name: str, documentation: str, labels: Sequence[str]) -> Family[Count]:
        """Return a new gauge."""
        family = Family(tuple(labels), Count)
        self._parts.append(
            lambda: self._numbers(GaugeMetricFamily(name, documentation, None, self._names(labels)), family)
        )
        return family

    def histogram(
        self, name: str, documentation: str, labels: Sequence[str], *, buckets: Sequence[float]
    ) -> Family[Distribution]:
        """Return a new histogram."""
        family = Family(tuple(labels), lambda: Distribution(buckets))

        def samples() -> Metric:
            found = HistogramMetricFamily(name, documentation, None, None, self._names(labels))
            for values, series in family.series.items():
                found.add_metric([*self._fixed.values(), *values], series.cumulative(), series.total)
            return found

        self._parts.append(samples)
        return family

    def _numbers(self, found: CounterMetricFamily | GaugeMetricFamily, family: Family[Count]) -> Metric:
        for values, series in family.series.items():
            found.add_metric([*self._fixed.values(), *values], series.value)
        return found

    def _names(self, labels: Sequence[str]) -> list[str]:
        return [*self._fixed, *labels]
