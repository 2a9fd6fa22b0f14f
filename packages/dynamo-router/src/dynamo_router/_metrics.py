"""Metric names of the router, and the object that writes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import Counter, Gauge

    from dynamo_core.telemetry import Metrics

DECISIONS = "dynamo_router_decisions_total"
DECISION_SECONDS = "dynamo_router_decision_seconds"
REFUSED = "dynamo_router_refused_requests_total"
CACHED_TOKENS = "dynamo_router_predicted_cached_tokens_total"
PROMPT_TOKENS = "dynamo_router_prompt_tokens_total"
QUEUED = "dynamo_router_queued_requests"
INDEX_BLOCKS = "dynamo_router_index_blocks"
INDEX_DROPPED = "dynamo_router_index_dropped_blocks"
INDEX_EVENTS = "dynamo_router_index_events"
STREAMS = "dynamo_router_kv_streams"
WORKERS = "dynamo_router_workers"
RESERVATIONS = "dynamo_router_reservations"
EXPIRED = "dynamo_router_reservations_expired_total"
PREFILL_TOKENS = "dynamo_router_projected_prefill_tokens"
DECODE_BLOCKS = "dynamo_router_projected_decode_blocks"
INDEX_MODES = "dynamo_router_index_mode_workers"
TRUTH = "dynamo_router_index_truth_least_ratio"
APPROXIMATE_BLOCKS = "dynamo_router_approximate_index_blocks"
RECEIPTS = "dynamo_router_receipts"
REGRET = "dynamo_router_regret_tokens_total"
RECEIPTS_DROPPED = "dynamo_router_receipts_dropped"
POLICY_FAILURES = "dynamo_router_policy_failures"
POLICY_OVERRUNS = "dynamo_router_policy_overruns"
REPLICAS = "dynamo_router_replicas"
REPLICA_GAPS = "dynamo_router_replica_gaps"
LISTENERS = "dynamo_router_engine_listeners"

_DECISION_BUCKETS_S = (0.00002, 0.00005, 0.0001, 0.0002, 0.0003, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.1)


class RouterMetrics:
    """The router's metrics for one worker set, bound once so that the hot path only adds numbers.

    Args:
        metrics: Where they are collected.
        model: Label that tells the worker sets of one process apart.
    """

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.registry = metrics.registry
        self._model = model
        self._decisions = metrics.counter(DECISIONS, "Routing decisions", ["model", "policy"])
        self._refused = metrics.counter(REFUSED, "Requests that got no worker", ["model", "reason"])
        self._index_events = metrics.gauge(INDEX_EVENTS, "KV events by result since start", ["model", "result"])
        self._streams = metrics.gauge(STREAMS, "KV event streams by state", ["model", "state"])
        self._index_modes = metrics.gauge(
            INDEX_MODES, "Workers by what their cached tokens are predicted from", ["model", "mode"]
        )
        seconds = metrics.histogram(DECISION_SECONDS, "Time to choose a worker", ["model"], buckets=_DECISION_BUCKETS_S)
        self.decision_seconds = seconds.labels(model=model)

        def counter(name: str, text: str) -> Counter:
            return metrics.counter(name, text, ["model"]).labels(model=model)

        def gauge(name: str, text: str) -> Gauge:
            return metrics.gauge(name, text, ["model"]).labels(model=model)

        self.cached_tokens = counter(CACHED_TOKENS, "Prompt tokens that the chosen worker was to have cached")
        self.prompt_tokens = counter(PROMPT_TOKENS, "Prompt tokens of routed requests")
        self.regret = counter(REGRET, "Prefill tokens that another worker's cache would have saved, where recorded")
        self.receipts_dropped = gauge(RECEIPTS_DROPPED, "Receipts that were not written to disk")
        self.policy_failures = gauge(POLICY_FAILURES, "Decisions that the policy failed and the fallback took")
        self.policy_overruns = gauge(POLICY_OVERRUNS, "Decisions for which the policy took longer than its budget")
        self.expired = counter(EXPIRED, "Bookings dropped for lack of progress")
        self.index_blocks = gauge(INDEX_BLOCKS, "Entries of the KV index")
        self.index_dropped = gauge(INDEX_DROPPED, "Blocks the KV index dropped for lack of room")
        self.truth = gauge(TRUTH, "Agreement of predicted with reported cached tokens, the worst worker's")
        self.approximate_blocks = gauge(APPROXIMATE_BLOCKS, "Entries of the index of own decisions")
        self.workers = gauge(WORKERS, "Workers known")
        self.reservations = gauge(RESERVATIONS, "Requests booked and not complete")
        self.prefill_tokens = gauge(PREFILL_TOKENS, "Prompt tokens booked and not computed, all workers")
        self.decode_blocks = gauge(DECODE_BLOCKS, "Distinct blocks of booked requests, all workers")
        self.queued = gauge(QUEUED, "Requests that wait because all workers are busy")
        self.replicas = gauge(REPLICAS, "Other routers whose bookings count as load here")
        self.replica_gaps = gauge(REPLICA_GAPS, "Times that messages of another router were lost")
        self.receipts = gauge(RECEIPTS, "Decisions kept for look-up")

    def decisions(self, policy: str) -> Counter:
        """Return the counter of a policy's decisions."""
        return self._decisions.labels(model=self._model, policy=policy)

    def refused(self, reason: str) -> Counter:
        """Return the counter of requests refused for a reason."""
        return self._refused.labels(model=self._model, reason=reason)

    def index_events(self, result: str) -> Gauge:
        """Return the gauge of events with a result."""
        return self._index_events.labels(model=self._model, result=result)

    def index_modes(self, mode: str) -> Gauge:
        """Return the gauge of workers in a mode."""
        return self._index_modes.labels(model=self._model, mode=mode)

    def streams(self, state: str) -> Gauge:
        """Return the gauge of streams in a state."""
        return self._streams.labels(model=self._model, state=state)
