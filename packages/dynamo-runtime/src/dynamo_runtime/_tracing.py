"""Traces of a process. Without an OTLP endpoint nothing is configured and spans cost next to nothing."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from dynamo_core.errors import ConfigurationError


def configure_tracing(endpoint: str, sample_ratio: float, service: str, namespace: str) -> Callable[[], None]:
    """Send spans to an OTLP/HTTP endpoint in batches; return what flushes them at the end.

    Args:
        endpoint: Full URL; empty turns tracing off.
        sample_ratio: Share of new traces that are recorded; a caller's decision is kept.
        service: Name of this process.
        namespace: Namespace of the deployment.

    Raises:
        ConfigurationError: if the exporter is not installed.
    """
    if not endpoint:
        return _nothing
    try:
        exporter = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    except ImportError as error:
        raise ConfigurationError(
            f"option --otlp-endpoint has the value {endpoint!r}, but the exporter is not installed; "
            "install it with: pip install 'dynamo-runtime[otlp]'"
        ) from error
    from opentelemetry import trace
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

    resource = Resource.create({"service.name": f"dynamo-{service}", "service.namespace": namespace})
    provider = TracerProvider(sampler=ParentBasedTraceIdRatio(sample_ratio), resource=resource)
    provider.add_span_processor(BatchSpanProcessor(exporter.OTLPSpanExporter(endpoint=endpoint)))
    trace.set_tracer_provider(provider)
    return provider.shutdown


def _nothing() -> None:
    return None
