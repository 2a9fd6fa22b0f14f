"""Metrics of the planner."""

from __future__ import annotations

from dynamo_core.planning import ScalingDecision
from dynamo_core.telemetry import Metrics

DECISIONS = "dynamo_planner_decisions_total"
DESIRED_REPLICAS = "dynamo_planner_desired_replicas"
READY_REPLICAS = "dynamo_planner_ready_replicas"
PREDICTED_RATE = "dynamo_planner_predicted_requests_per_second"
FAILED_TICKS = "dynamo_planner_failed_ticks_total"
LOST_REPORTS = "dynamo_planner_lost_reports"


class PlannerMetrics:
    """The instruments, bound to one process's labels."""

    def __init__(self, metrics: Metrics) -> None:
        self._decisions = metrics.counter(DECISIONS, "Decisions by reason.", ("reason",))
        self._desired = metrics.gauge(DESIRED_REPLICAS, "Replicas that the last decision wants.", ("role",))
        self.ready = metrics.gauge(READY_REPLICAS, "Replicas that serve.", ("role",))
        self._predicted = metrics.gauge(PREDICTED_RATE, "Request rate that the last decision expected.")
        self.failed_ticks = metrics.counter(FAILED_TICKS, "Ticks that could not read or scale the target.")
        self.lost_reports = metrics.gauge(LOST_REPORTS, "Traffic reports lost or unreadable since the start.")

    def note(self, decision: ScalingDecision) -> None:
        """Count a decision and show what it wants."""
        self._decisions.labels(decision.reason).inc()
        for role, replicas in decision.replicas.items():
            self._desired.labels(role).set(replicas)
        if (predicted := decision.values.get("predicted_requests_per_second")) is not None:
            self._predicted.set(predicted)
