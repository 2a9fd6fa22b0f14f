"""Metrics of the planner."""

from __future__ import annotations

from dynamo_core.planning import Observation, ScalingDecision
from dynamo_core.telemetry import Metrics

DECISIONS = "dynamo_planner_decisions_total"
PARTS = "dynamo_planner_part_decisions_total"
DESIRED_REPLICAS = "dynamo_planner_desired_replicas"
READY_REPLICAS = "dynamo_planner_ready_replicas"
STARTING_REPLICAS = "dynamo_planner_starting_replicas"
OBSERVED_RATE = "dynamo_planner_observed_requests_per_second"
PREDICTED_RATE = "dynamo_planner_predicted_requests_per_second"
PLANNED_RATE = "dynamo_planner_planned_requests_per_second"
PREDICTED_INPUT = "dynamo_planner_predicted_input_tokens"
PREDICTED_OUTPUT = "dynamo_planner_predicted_output_tokens"
MISSED_SHARE = "dynamo_planner_missed_target_ratio"
HEADROOM = "dynamo_planner_headroom_ratio"
GPUS = "dynamo_planner_gpus"
LEADING = "dynamo_planner_leading"
PAUSED = "dynamo_planner_paused"
FAILED_TICKS = "dynamo_planner_failed_ticks_total"
LOST_REPORTS = "dynamo_planner_lost_reports"
LOST_RECORDS = "dynamo_planner_lost_records_total"

_VALUES = {
    "observed_requests_per_second": (OBSERVED_RATE, "Request rate of the last window."),
    "predicted_requests_per_second": (PREDICTED_RATE, "Request rate that the last decision expected."),
    "planned_requests_per_second": (PLANNED_RATE, "Quantile of the request rate that the last decision planned for."),
    "predicted_input_tokens": (PREDICTED_INPUT, "Mean prompt tokens that the last decision expected."),
    "predicted_output_tokens": (PREDICTED_OUTPUT, "Mean output tokens that the last decision expected."),
    "missed_share": (MISSED_SHARE, "Share of the last window's requests that missed a target."),
    "headroom": (HEADROOM, "Factor on the replicas that the capacity model asks for."),
    "gpus": (GPUS, "GPUs that the last decision wants."),
}


class PlannerMetrics:
    """The instruments, bound to one process's labels."""

    def __init__(self, metrics: Metrics) -> None:
        self._decisions = metrics.counter(DECISIONS, "Decisions by reason.", ("reason",))
        self._parts = metrics.counter(PARTS, "Reasons of each part of a decision.", ("part", "reason"))
        self._desired = metrics.gauge(DESIRED_REPLICAS, "Replicas that the last decision wants.", ("role",))
        self._ready = metrics.gauge(READY_REPLICAS, "Replicas that serve.", ("role",))
        self._starting = metrics.gauge(STARTING_REPLICAS, "Replicas that do not serve yet.", ("role",))
        self._values = {key: metrics.gauge(name, text) for key, (name, text) in _VALUES.items()}
        self.leading = metrics.gauge(LEADING, "1 while this planner of several decides.")
        self.paused = metrics.gauge(PAUSED, "1 while an operator has paused the planner.")
        self.failed_ticks = metrics.counter(FAILED_TICKS, "Ticks that could not read or scale the target.")
        self.lost_reports = metrics.gauge(LOST_REPORTS, "Reports lost or unreadable since the start.")
        self.lost_records = metrics.counter(LOST_RECORDS, "Decisions that could not be written to the log.")

    def note(self, decision: ScalingDecision, observation: Observation) -> None:
        """Count a decision and show what it saw and wants."""
        self._decisions.labels(decision.reason).inc()
        for part, reason in decision.reasons.items():
            self._parts.labels(part, reason).inc()
        for role, replicas in decision.replicas.items():
            self._desired.labels(role).set(replicas)
        for role, pool in observation.pools.items():
            self._ready.labels(role).set(pool.ready)
            self._starting.labels(role).set(pool.starting)
        for key, gauge in self._values.items():
            if key in decision.values:
                gauge.set(decision.values[key])
