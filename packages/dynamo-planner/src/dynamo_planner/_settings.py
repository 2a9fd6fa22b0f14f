"""Options of the planner."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from dynamo_core.settings import DynamoSettings


class PlannerSettings(DynamoSettings):
    """Planner: how many replicas of a role the traffic needs."""

    component: ClassVar[str] = "planner"

    role: str = Field("worker", min_length=1, description="Role that is scaled, as the scaling target names it.")
    target: str = Field("supervisor", description="Scaling target plug-in.")
    load_predictor: str = Field("constant", description="Forecaster plug-in for the request rate.")
    requests_per_replica_s: float = Field(
        10.0, gt=0, allow_inf_nan=False, description="Requests a second that one replica serves within its target."
    )
    utilization: float = Field(
        0.8, gt=0, le=1, description="Share of a replica's capacity to plan with; the rest is head-room for bursts."
    )
    min_replicas: int = Field(1, ge=0, description="Never fewer replicas.")
    max_replicas: int = Field(8, ge=1, description="Never more replicas.")
    interval_s: float = Field(10.0, gt=0, allow_inf_nan=False, description="Seconds between decisions.")
    stale_after_s: float = Field(
        60.0, gt=0, allow_inf_nan=False, description="Traffic older than this is missing; the planner then holds."
    )
    scale_down_delay_s: float = Field(
        60.0, ge=0, allow_inf_nan=False, description="Seconds that fewer replicas must suffice before any is let go."
    )
    advisory: bool = Field(False, description="Decide and explain, but leave the replicas alone.")
    decisions_kept: int = Field(1024, ge=1, description="Decisions kept for the admin API.")

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> PlannerSettings:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"--min-replicas {self.min_replicas} exceeds --max-replicas {self.max_replicas}; raise the latter"
            )
        if self.stale_after_s < self.interval_s:
            raise ValueError(f"--stale-after-s {self.stale_after_s} is below --interval-s {self.interval_s}; raise it")
        return self
