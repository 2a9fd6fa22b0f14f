import pytest
from prometheus_client import generate_latest

from dynamo_core.telemetry import Metrics
from dynamo_frontend._tallies import Tallies


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(labels={"namespace": "n"})


def test_numbers_are_scraped_with_the_fixed_labels(metrics):
    tallies = Tallies(metrics)
    tallies.counter("done_total", "Done", ("model",)).labels(model="m").inc(3)
    gauge = tallies.gauge("active", "Active", ()).labels()
    gauge.inc()
    gauge.dec()
    text = generate_latest(metrics.registry).decode()
    assert 'done_total{model="m",namespace="n"} 3.0' in text
    assert 'active{namespace="n"} 0.0' in text


def test_a_histogram_is_the_one_of_the_client_library(metrics):
    bounds = (0.0, 1.0, 2.5)
    plain = Metrics(labels={"namespace": "n"})
    ours = Tallies(metrics).histogram("size", "Size", ("model",), buckets=bounds).labels(model="m")
    theirs = plain.histogram("size", "Size", ("model",), buckets=bounds).labels(model="m")
    for value in (-1.0, 0.0, 0.5, 1.0, 2.5, 2.6, 100.0):
        ours.observe(abs(value))
        theirs.observe(abs(value))
    assert _samples(metrics) == _samples(plain)


def test_labels_give_the_same_series_again(metrics):
    family = Tallies(metrics).counter("done_total", "Done", ("a", "b"))
    family.labels(a="1", b="2").inc()
    assert family.labels(b="2", a="1").value == 1
    assert family.labels(a="2", b="1").value == 0


def _samples(metrics: Metrics) -> list[str]:
    lines = generate_latest(metrics.registry).decode().splitlines()
    return sorted(line for line in lines if not line.startswith("#") and "_created" not in line)
