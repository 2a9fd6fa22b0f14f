"""Metrics with fixed labels, and trace context in headers."""

import pytest
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags
from prometheus_client import CollectorRegistry

from dynamo_core.errors import ConfigurationError
from dynamo_core.telemetry import Metrics, trace_context, trace_headers


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_metric_without_labels() -> None:
    metrics = Metrics()
    metrics.counter("requests_total", "x").inc()
    metrics.counter("requests_total", "x").inc()
    assert value(metrics, "requests_total") == 2


def test_fixed_labels_are_filled_in() -> None:
    metrics = Metrics(labels={"namespace": "ns", "component": "router"})
    metrics.gauge("depth", "x").set(3)
    assert value(metrics, "depth", namespace="ns", component="router") == 3


@pytest.mark.parametrize("fixed", [{}, {"namespace": "ns"}])
def test_own_labels_by_position_and_by_name(fixed: dict[str, str]) -> None:
    metrics = Metrics(labels=fixed)
    counter = metrics.counter("errors_total", "x", ("kind", "side"))
    counter.labels("timeout", "client").inc()
    counter.labels(kind="timeout", side="client").inc(2)
    assert value(metrics, "errors_total", kind="timeout", side="client", **fixed) == 3


@pytest.mark.parametrize("fixed", [{}, {"namespace": "ns"}])
def test_series_can_be_removed(fixed: dict[str, str]) -> None:
    metrics = Metrics(labels=fixed)
    gauge = metrics.gauge("depth", "x", ("worker",))
    gauge.labels("1").set(5)
    gauge.remove("1")
    assert value(metrics, "depth", worker="1", **fixed) is None


def test_histogram_takes_its_buckets() -> None:
    metrics = Metrics()
    metrics.histogram("latency_seconds", "x", buckets=(1.0, 2.0)).observe(1.5)
    assert value(metrics, "latency_seconds_bucket", le="1.0") == 0
    assert value(metrics, "latency_seconds_bucket", le="2.0") == 1


def test_child_shares_metrics_under_other_values() -> None:
    parent = Metrics(labels={"component": "host"})
    child = parent.child(component="router")
    parent.counter("x_total", "x").inc()
    child.counter("x_total", "x").inc(2)
    assert child.registry is parent.registry
    assert value(parent, "x_total", component="host") == 1
    assert value(parent, "x_total", component="router") == 2


def test_child_may_not_invent_labels() -> None:
    with pytest.raises(ConfigurationError, match=r"\['worker'\]"):
        Metrics(labels={"component": "host"}).child(worker="1")


def test_name_may_not_change_its_type() -> None:
    metrics = Metrics()
    metrics.counter("x_total", "x")
    with pytest.raises(ConfigurationError, match="x_total exists as Counter, not Gauge"):
        metrics.gauge("x_total", "x")


def test_name_may_not_change_its_labels() -> None:
    metrics = Metrics(labels={"component": "host"})
    metrics.counter("x_total", "x", ("kind",))
    with pytest.raises(ConfigurationError, match=r"x_total has the labels.*kind"):
        metrics.counter("x_total", "x", ("side",))
    with pytest.raises(ConfigurationError, match="x_total"):
        metrics.counter("x_total", "x")


def test_name_taken_by_another_scope_is_a_typed_error() -> None:
    registry = CollectorRegistry()
    Metrics(registry).counter("x_total", "x")
    with pytest.raises(ConfigurationError, match="x_total"):
        Metrics(registry).counter("x_total", "x")


def test_registries_are_apart() -> None:
    one, two = Metrics(), Metrics()
    one.counter("x_total", "x").inc()
    two.counter("x_total", "x")
    assert (value(one, "x_total"), value(two, "x_total")) == (1, 0)


def test_trace_context_round_trips() -> None:
    assert trace_headers() == {}
    context = SpanContext(0xABC, 0xDEF, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))
    with trace.use_span(NonRecordingSpan(context)):
        headers = trace_headers()
    found = trace.get_current_span(trace_context(headers)).get_span_context()
    assert headers["traceparent"].startswith("00-")
    assert (found.trace_id, found.span_id, found.is_remote) == (0xABC, 0xDEF, True)


def test_broken_trace_headers_are_ignored() -> None:
    assert not trace.get_current_span(trace_context({"traceparent": "junk"})).get_span_context().is_valid
