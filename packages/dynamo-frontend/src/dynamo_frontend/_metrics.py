"""Names of the frontend's metrics, and the series a request touches, bound once per model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prometheus_client import generate_latest

from dynamo_frontend._tallies import Count, Distribution, Tallies

if TYPE_CHECKING:
    from dynamo_core.telemetry import Metrics

REQUESTS_TOTAL = "dynamo_frontend_requests_total"
REQUESTS_STARTED_TOTAL = "dynamo_frontend_requests_started_total"
ACTIVE_REQUESTS = "dynamo_frontend_active_requests"
DISCONNECTED_CLIENTS = "dynamo_frontend_disconnected_clients_total"
REQUEST_DURATION_SECONDS = "dynamo_frontend_request_duration_seconds"
TIME_TO_FIRST_TOKEN_SECONDS = "dynamo_frontend_time_to_first_token_seconds"
INTER_TOKEN_LATENCY_SECONDS = "dynamo_frontend_inter_token_latency_seconds"
INPUT_SEQUENCE_TOKENS = "dynamo_frontend_input_sequence_tokens"
OUTPUT_SEQUENCE_TOKENS = "dynamo_frontend_output_sequence_tokens"
CACHED_TOKENS = "dynamo_frontend_cached_tokens"
OUTPUT_TOKENS_TOTAL = "dynamo_frontend_output_tokens_total"
TOKENIZER_CACHE_HITS_TOTAL = "dynamo_frontend_tokenizer_cache_hits_total"
TOKENIZER_CACHE_MISSES_TOTAL = "dynamo_frontend_tokenizer_cache_misses_total"
TOKENIZER_CACHE_BYTES = "dynamo_frontend_tokenizer_cache_bytes"
MODEL_MIGRATION_TOTAL = "dynamo_frontend_model_migration_total"
MODEL_CANCELLATION_TOTAL = "dynamo_frontend_model_cancellation_total"
MODEL_REJECTION_TOTAL = "dynamo_frontend_model_rejection_total"
MODEL_READY = "dynamo_frontend_model_ready"
MODEL_CONFLICTS = "dynamo_frontend_model_conflicting_cards"
ACCESS_DENIED_TOTAL = "dynamo_frontend_access_denied_total"
TRACE_WRITTEN_TOTAL = "dynamo_frontend_trace_written_total"
TRACE_DROPPED_TOTAL = "dynamo_frontend_trace_dropped_total"
GATEWAY_REQUESTS_TOTAL = "dynamo_frontend_gateway_requests_total"
GATEWAY_UNROUTED_TOTAL = "dynamo_frontend_gateway_unrouted_total"
GATEWAY_UPSTREAM_UP = "dynamo_frontend_gateway_upstream_up"
GATEWAY_IN_FLIGHT_REQUESTS = "dynamo_frontend_gateway_in_flight_requests"
RESUMABLE_STREAMS = "dynamo_frontend_resumable_streams"
REPLAY_BYTES = "dynamo_frontend_replay_bytes"
STREAM_RESUMES_TOTAL = "dynamo_frontend_stream_resumes_total"
ABANDONED_STREAMS_TOTAL = "dynamo_frontend_abandoned_streams_total"
MEDIA_ITEMS_TOTAL = "dynamo_frontend_media_items_total"
MEDIA_BYTES_TOTAL = "dynamo_frontend_media_bytes_total"
CONNECTIONS = "dynamo_frontend_open_connections"

_DURATION_S = (0.0, 1.0, 2.0, 4.1, 8.0, 16.0, 32.0, 64.0, 130.0, 260.0, 512.0)
_TTFT_S = (0.001, 0.0022, 0.0047, 0.01, 0.022, 0.047, 0.1, 0.22, 0.47, 1.0, 2.2, 4.7, 10.0, 22.0, 48.0, 100.0, 480.0)
_ITL_S = (0.001, 0.0019, 0.0035, 0.0067, 0.013, 0.024, 0.045, 0.084, 0.16, 0.3, 0.56, 1.1, 2.0, 3.7, 7.0, 13.0, 80.0)
_INPUT_TOKENS = (50, 100, 210, 430, 870, 1800, 3700, 7500, 15000, 31000, 63000, 128000)
_OUTPUT_TOKENS = (50, 100, 210, 430, 880, 1800, 3700, 7600, 16000, 32000)


@dataclass(slots=True)
class ModelSeries:
    """The series of one model, endpoint and request type, looked up once."""

    started: Count
    succeeded: Count
    active: Count
    duration: Distribution
    ttft: Distribution
    itl: Distribution
    input_tokens: Distribution
    output_tokens: Distribution
    cached_tokens: Distribution
    output_total: Count


class FrontendMetrics:
    """All metrics of a frontend.

    Label values come from model names of the catalog only, so their number is bounded by what is registered.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.registry = metrics.registry
        tallies = Tallies(metrics)
        full = ("model", "endpoint", "request_type")
        self._requests = tallies.counter(REQUESTS_TOTAL, "Requests that ended", (*full, "status", "error_type"))
        self._started = tallies.counter(REQUESTS_STARTED_TOTAL, "Requests that began", full)
        self._active = tallies.gauge(ACTIVE_REQUESTS, "Requests from handler entry to stream end", ("model",))
        self._duration = tallies.histogram(REQUEST_DURATION_SECONDS, "Whole request", ("model",), buckets=_DURATION_S)
        self._ttft = tallies.histogram(
            TIME_TO_FIRST_TOKEN_SECONDS, "Request to first token", ("model",), buckets=_TTFT_S
        )
        self._itl = tallies.histogram(
            INTER_TOKEN_LATENCY_SECONDS, "Mean time between tokens of a request", ("model",), buckets=_ITL_S
        )
        self._input = tallies.histogram(
            INPUT_SEQUENCE_TOKENS, "Prompt tokens of a request", ("model",), buckets=_INPUT_TOKENS
        )
        self._output = tallies.histogram(
            OUTPUT_SEQUENCE_TOKENS, "Output tokens of a request", ("model",), buckets=_OUTPUT_TOKENS
        )
        self._cached = tallies.histogram(
            CACHED_TOKENS, "Prompt tokens found in a cache", ("model",), buckets=_INPUT_TOKENS
        )
        self._output_total = tallies.counter(OUTPUT_TOKENS_TOTAL, "Output tokens", ("model",))
        self._migrations = tallies.counter(
            MODEL_MIGRATION_TOTAL, "Continuations on another worker", ("model", "migration_type")
        )
        self._cancellations = tallies.counter(
            MODEL_CANCELLATION_TOTAL, "Requests whose client left", ("model", "endpoint", "request_type")
        )
        self._rejections = tallies.counter(MODEL_REJECTION_TOTAL, "Requests refused for load", ("model", "endpoint"))
        self.disconnected = metrics.counter(DISCONNECTED_CLIENTS, "Clients that left in mid-response")
        self.tokenizer_hits = metrics.counter(TOKENIZER_CACHE_HITS_TOTAL, "Text pieces found tokenised")
        self.tokenizer_misses = metrics.counter(TOKENIZER_CACHE_MISSES_TOTAL, "Text pieces tokenised")
        self.tokenizer_bytes = metrics.gauge(TOKENIZER_CACHE_BYTES, "Memory of the tokenizer cache")
        self.connections = metrics.gauge(CONNECTIONS, "Open client connections")
        self._ready = metrics.gauge(MODEL_READY, "1 if at least one request can be routed", ("model",))
        self._conflicts = metrics.gauge(
            MODEL_CONFLICTS, "Workers kept out because their card differs from the model's", ("model",)
        )
        self._series: dict[tuple[str, str, str], ModelSeries] = {}

    def series(self, model: str, endpoint: str, request_type: str) -> ModelSeries:
        """Return the bound series."""
        key = (model, endpoint, request_type)
        found = self._series.get(key)
        if found is None:
            found = self._series[key] = ModelSeries(
                started=self._started.labels(model=model, endpoint=endpoint, request_type=request_type),
                succeeded=self._ended(model, endpoint, request_type, "success", ""),
                active=self._active.labels(model=model),
                duration=self._duration.labels(model=model),
                ttft=self._ttft.labels(model=model),
                itl=self._itl.labels(model=model),
                input_tokens=self._input.labels(model=model),
                output_tokens=self._output.labels(model=model),
                cached_tokens=self._cached.labels(model=model),
                output_total=self._output_total.labels(model=model),
            )
        return found

    def failed(self, model: str, endpoint: str, request_type: str, error_type: str) -> None:
        """Count a request that ended with an error."""
        self._ended(model, endpoint, request_type, "error", error_type).inc()
        if error_type == "cancelled":
            self._cancellations.labels(model=model, endpoint=endpoint, request_type=request_type).inc()
        elif error_type == "overload":
            self._rejections.labels(model=model, endpoint=endpoint).inc()

    def _ended(self, model: str, endpoint: str, request_type: str, status: str, error_type: str) -> Count:
        return self._requests.labels(
            model=model, endpoint=endpoint, request_type=request_type, status=status, error_type=error_type
        )

    def migrated(self, model: str, *, ongoing: bool) -> None:
        """Count a continuation."""
        kind = "ongoing_request" if ongoing else "new_request"
        self._migrations.labels(model=model, migration_type=kind).inc()

    def model_state(self, model: str, *, ready: bool, conflicts: int) -> None:
        """Show a model's readiness."""
        self._ready.labels(model=model).set(1 if ready else 0)
        self._conflicts.labels(model=model).set(conflicts)

    def forget_model(self, model: str) -> None:
        """Drop the readiness series of a model that is gone; request series stay for their totals."""
        self._ready.remove(model)
        self._conflicts.remove(model)


class ResumeMetrics:
    """Metrics of streams that can be resumed."""

    def __init__(self, metrics: Metrics) -> None:
        self.streams = metrics.gauge(RESUMABLE_STREAMS, "Streams whose events are kept for a client that comes back")
        self.size_bytes = metrics.gauge(REPLAY_BYTES, "Memory of kept events")
        self.resumes = metrics.counter(STREAM_RESUMES_TOTAL, "Clients that came back for a stream", ("outcome",))
        self.abandoned = metrics.counter(ABANDONED_STREAMS_TOTAL, "Streams ended because no client came back")


class TraceMetrics:
    """Requests of the trace."""

    def __init__(self, metrics: Metrics) -> None:
        self.written = metrics.counter(TRACE_WRITTEN_TOTAL, "Requests written to the trace")
        self.dropped = metrics.counter(TRACE_DROPPED_TOTAL, "Requests missing from the trace")


class AccessMetrics:
    """Requests that were turned away at the door."""

    def __init__(self, metrics: Metrics) -> None:
        self._denied = metrics.counter(
            ACCESS_DENIED_TOTAL, "Requests without a valid key, or above its limits", ("reason",)
        )

    def denied(self, reason: str) -> None:
        """Count one; reasons are those of this package's errors."""
        self._denied.labels(reason=reason).inc()


class MediaMetrics:
    """Metrics of images, audio and video in requests."""

    def __init__(self, metrics: Metrics) -> None:
        self.items = metrics.counter(MEDIA_ITEMS_TOTAL, "Images, sounds and films of requests", ("kind", "outcome"))
        self.size_bytes = metrics.counter(MEDIA_BYTES_TOTAL, "Their bytes, where the frontend has them")


class GatewayMetrics:
    """Metrics of a gateway. Labels are the engines' URLs and status classes, so their number is bounded."""

    def __init__(self, metrics: Metrics) -> None:
        self._registry = metrics.registry
        self._requests = metrics.counter(
            GATEWAY_REQUESTS_TOTAL,
            "Requests passed to an engine, by status class",
            ("upstream", "status"),
        )
        self._up = metrics.gauge(GATEWAY_UPSTREAM_UP, "1 if the engine answers", ("upstream",))
        self._in_flight = metrics.gauge(GATEWAY_IN_FLIGHT_REQUESTS, "Requests at the engine", ("upstream",))
        self._unrouted = metrics.counter(
            GATEWAY_UNROUTED_TOTAL, "Requests that could not be routed by their content", ("reason",)
        )
        self._series: dict[tuple[str, int], Any] = {}
        self._states: Callable[[], Iterable[tuple[str, bool, int]]] = tuple

    def unrouted(self, reason: str) -> None:
        """Count a request that could not be routed by its content; reasons are those of errors."""
        self._unrouted.labels(reason=reason).inc()

    def follow(self, states: Callable[[], Iterable[tuple[str, bool, int]]]) -> None:
        """Ask here for each engine's URL, whether it is up, and its requests in flight."""
        self._states = states

    def ended(self, upstream: str, status: int) -> None:
        """Count a request that ended."""
        key = (upstream, status // 100)
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = self._requests.labels(upstream=upstream, status=f"{key[1]}xx")
        series.inc()

    def text(self) -> bytes:
        """Return the text form."""
        for upstream, up, in_flight in self._states():
            self._up.labels(upstream=upstream).set(1 if up else 0)
            self._in_flight.labels(upstream=upstream).set(in_flight)
        return generate_latest(self._registry)
