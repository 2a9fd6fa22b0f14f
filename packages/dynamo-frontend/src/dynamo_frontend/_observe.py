"""One request as metrics and traffic statistics see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynamo_core.clock import Clock
from dynamo_core.errors import DynamoError
from dynamo_frontend._errors import metric_error_type
from dynamo_frontend._generation import Generation
from dynamo_frontend._metrics import FrontendMetrics
from dynamo_frontend._plan import GeneratePlan
from dynamo_frontend._reply import Reply
from dynamo_frontend._traffic import EndedRequest, TrafficLog


class Observation:
    """Counts one generation request from its start to its end.

    Args:
        metrics: Where to count.
        traffic: Where to sum.
        clock: Time.
        model: Name of a model of the catalog.
        endpoint: API, such as ``chat_completions``.
        stream: Whether the reply is streamed.
    """

    def __init__(
        self, metrics: FrontendMetrics, traffic: TrafficLog, clock: Clock, *, model: str, endpoint: str, stream: bool
    ) -> None:
        self._metrics = metrics
        self._traffic = traffic
        self._clock = clock
        self._model = model
        self._endpoint = endpoint
        self._type = "stream" if stream else "unary"
        self._series = metrics.series(model, endpoint, self._type)
        self._began = clock.monotonic()
        self._series.started.inc()
        self._series.active.inc()

    def end(self, generations: Sequence[Generation], error: DynamoError | None) -> None:
        """Count the end."""
        series = self._series
        series.active.dec()
        series.duration.observe(self._clock.monotonic() - self._began)
        if error is None:
            series.succeeded.inc()
        else:
            self._metrics.failed(self._model, self._endpoint, self._type, metric_error_type(error))
        ended = EndedRequest(self._model, failed=error is not None and error.http_status >= 500)
        for generation in generations:
            self._add(generation, ended)
        self._traffic.note(ended)

    def _add(self, generation: Generation, ended: EndedRequest) -> None:
        usage = generation.usage
        timing = generation.timing
        series = self._series
        ended.prompt_tokens += usage.prompt_tokens
        ended.output_tokens += usage.completion_tokens
        ended.cached_tokens += usage.cached_tokens
        series.input_tokens.observe(usage.prompt_tokens)
        series.output_tokens.observe(usage.completion_tokens)
        series.cached_tokens.observe(usage.cached_tokens)
        series.output_total.inc(usage.completion_tokens)
        first, last = timing.first_token_s, timing.last_token_s
        if first is None or last is None:
            return
        ended.ttft_s = first - self._began
        series.ttft.observe(ended.ttft_s)
        if usage.completion_tokens > 1:
            ended.itl_s = (last - first) / (usage.completion_tokens - 1)
            series.itl.observe(ended.itl_s)


def trace_fields(plan: GeneratePlan, reply: Reply, error: DynamoError | None) -> dict[str, Any]:
    """Return what a trace shows of a request that is over. Nothing of it was written by a person."""
    usage = reply.usage
    first = reply.generations[0] if reply.generations else None
    decision = first.decision if first is not None else None
    timing = first.timing if first is not None else None
    ttft_s = (
        timing.first_token_s - timing.started_s if timing is not None and timing.first_token_s is not None else None
    )
    return {
        "model": plan.model.name,
        "stream": bool(plan.fields.stream),
        "error": error.reason if error is not None else "",
        "input_tokens": usage.prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "cached_tokens": usage.cached_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
        "ttft_ms": round(ttft_s * 1e3, 3) if ttft_s is not None else None,
        "migrations": sum(generation.migrations for generation in reply.generations),
        "worker": str(decision.worker) if decision is not None else "",
        "decision_id": decision.decision_id if decision is not None else "",
    }
