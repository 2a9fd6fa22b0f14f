"""Metrics and trace context for library code, which uses them and never configures them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry import propagate
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from dynamo_core.errors import ConfigurationError

LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_BUCKETS = (1, 8, 32, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


class Metrics:
    """Factory of metrics with fixed labels, over one registry.

    Scopes made with ``child`` share the registry: a metric asked for twice, in any scope, is the same one, and each
    scope sees it bound to its own fixed label values. All scopes of a tree therefore have the same fixed label names.

    Args:
        registry: Where metrics are collected; a new one if omitted.
        labels: Fixed labels: name to value.
    """

    def __init__(self, registry: CollectorRegistry | None = None, labels: Mapping[str, str] | None = None) -> None:
        self.registry = registry if registry is not None else CollectorRegistry()
        self._labels = dict(labels or {})
        self._known: dict[str, tuple[Any, tuple[str, ...]]] = {}

    @property
    def fixed_labels(self) -> dict[str, str]:
        """Labels of every metric of this scope, for collectors that make their own samples."""
        return dict(self._labels)

    def child(self, **labels: str) -> Metrics:
        """Return a scope with other values for some fixed labels.

        Raises:
            ConfigurationError: if a label is not one of this scope's fixed labels.
        """
        unknown = sorted(set(labels) - set(self._labels))
        if unknown:
            raise ConfigurationError(
                f"metric labels {unknown} are not fixed labels of this process {sorted(self._labels)}"
            )
        scope = Metrics(self.registry, {**self._labels, **labels})
        scope._known = self._known
        return scope

    def counter(self, name: str, documentation: str, labels: Sequence[str] = ()) -> Counter:
        """Return the counter, bound to the fixed labels if it has no others.

        Raises:
            ConfigurationError: if the name is taken by a metric of another type or with other labels.
        """
        return self._bound(name, labels, Counter, documentation)

    def gauge(self, name: str, documentation: str, labels: Sequence[str] = ()) -> Gauge:
        """Return the gauge, bound to the fixed labels if it has no others."""
        return self._bound(name, labels, Gauge, documentation)

    def histogram(
        self,
        name: str,
        documentation: str,
        labels: Sequence[str] = (),
        *,
        buckets: Sequence[float] = LATENCY_BUCKETS_S,
    ) -> Histogram:
        """Return the histogram, bound to the fixed labels if it has no others."""
        return self._bound(name, labels, Histogram, documentation, buckets=buckets)

    def _bound(self, name: str, labels: Sequence[str], kind: type[Any], documentation: str, **options: Any) -> Any:
        names = (*self._labels, *labels)
        known = self._known.get(name)
        if known is None:
            known = (self._made(kind, name, documentation, names, options), names)
            self._known[name] = known
        metric, known_names = known
        if type(metric) is not kind:
            raise ConfigurationError(f"metric {name} exists as {type(metric).__name__}, not {kind.__name__}")
        if known_names != names:
            raise ConfigurationError(f"metric {name} has the labels {list(known_names)}, not {list(names)}")
        if labels and self._labels:
            return _PartlyBound(metric, self._labels)
        return metric.labels(**self._labels) if self._labels else metric

    def _made(
        self, kind: type[Any], name: str, documentation: str, names: tuple[str, ...], options: dict[str, Any]
    ) -> Any:
        try:
            return kind(name, documentation, names, registry=self.registry, **options)
        except ValueError as error:
            raise ConfigurationError(f"metric {name} cannot be made: {error}") from error


class _PartlyBound:
    """A metric whose fixed labels are filled in when the others are given."""

    def __init__(self, metric: Any, fixed: Mapping[str, str]) -> None:
        self._metric = metric
        self._fixed = fixed

    def labels(self, *values: str, **named: str) -> Any:
        if values:
            return self._metric.labels(*self._fixed.values(), *values)
        return self._metric.labels(**self._fixed, **named)

    def remove(self, *values: str) -> None:
        self._metric.remove(*self._fixed.values(), *values)


def trace_headers() -> dict[str, str]:
    """Return the current trace context as W3C headers; empty if there is none."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier


def trace_context(headers: Mapping[str, str]) -> otel_context.Context:
    """Return the trace context that the headers carry, to start spans under."""
    return propagate.extract(headers)
