from __future__ import annotations

import sys

import pytest
from opentelemetry import trace

from dynamo_core.errors import ConfigurationError
from dynamo_runtime._tracing import configure_tracing


def test_without_an_endpoint_nothing_is_configured() -> None:
    configure_tracing("", 1.0, "worker", "test")()
    assert type(trace.get_tracer_provider()).__name__ == "ProxyTracerProvider"


def test_a_missing_exporter_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigurationError, match=r"dynamo-runtime\[otlp\]"):
        configure_tracing("http://127.0.0.1:4318/v1/traces", 1.0, "worker", "test")
