"""Options of the planner."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, SecretStr, model_validator

from dynamo_core.settings import DynamoSettings


class PlannerSettings(DynamoSettings):
    """Planner: how many replicas of each role the traffic needs."""

    component: ClassVar[str] = "planner"

    mode: Literal["agg", "prefill", "decode", "disagg"] = Field(
        "agg", description="What is planned: whole engines, prefill or decode engines alone, or both together."
    )
    role: str = Field("worker", min_length=1, description="Role of whole engines, as the scaling target names it.")
    prefill_role: str = Field("prefill", min_length=1, description="Role of prefill engines.")
    decode_role: str = Field("decode", min_length=1, description="Role of decode engines.")
    target: str = Field("supervisor", description="Scaling target plug-in.")
    target_options: dict[str, Any] = Field({}, description="Options of the scaling target, as a JSON object.")
    source: Literal["bus", "prometheus"] = Field("bus", description="Where traffic is read from.")

    optimization_target: Literal["sla", "throughput", "latency", "load"] = Field(
        "sla", description="What replicas are for: latency targets, or static load thresholds."
    )
    enable_throughput_scaling: bool = Field(True, description="With sla: plan from the forecast load.")
    enable_load_scaling: bool = Field(False, description="With sla: also act on what engines report now.")
    ttft_ms: float = Field(500.0, gt=0, allow_inf_nan=False, description="Target of the time to first token.")
    itl_ms: float = Field(50.0, gt=0, allow_inf_nan=False, description="Target of the inter-token latency.")
    slo_percentile: float = Field(99.0, gt=0, lt=100, description="Percent of requests that must meet each target.")

    load_predictor: str = Field("auto", description="Forecaster plug-in.")
    load_predictor_log1p: bool = Field(False, description="Forecast log(1 + x).")
    planning_quantile: float = Field(0.97, gt=0, lt=1, description="Share of bursts above the forecast to plan for.")
    warmup_trace: Path | None = Field(None, description="Trace whose request rate the forecasters start from.")

    capacity: Literal["rate", "analytic", "profile", "learned"] = Field(
        "rate", description="What an engine can do: a given rate, formulas, measured profiles, or learned step times."
    )
    requests_per_replica_s: float = Field(
        10.0, gt=0, allow_inf_nan=False, description="Rate: requests a second that one replica serves in time."
    )
    utilization: float = Field(
        0.8, gt=0, le=1, description="Rate: share of a replica's capacity to plan with; the rest is for bursts."
    )
    profile_dir: Path = Field(Path("profiling_results"), description="Profile: folder of the measured profiles.")
    engine_speedup: float = Field(1.0, gt=0, allow_inf_nan=False, description="Analytic: divides every step time.")
    engine_kv_tokens: float = Field(1_048_576, gt=0, allow_inf_nan=False, description="KV tokens of one engine.")
    engine_max_num_seqs: int = Field(256, ge=1, description="Requests that one engine runs at once.")
    engine_max_batched_tokens: int = Field(8192, ge=1, description="Analytic: prompt tokens of one step.")
    prompt_cv2: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="Squared coefficient of variation of prompt times."
    )
    headroom_min: float = Field(1.0, gt=0, le=1, description="Least factor on needed replicas while targets are met.")
    headroom_max: float = Field(2.0, ge=1, allow_inf_nan=False, description="Most, while targets are missed.")

    load_queue_up: float = Field(1.0, gt=0, allow_inf_nan=False, description="Load: queued contexts to grow at.")
    load_queue_down: float = Field(0.1, ge=0, allow_inf_nan=False, description="Load: queued contexts to shrink at.")
    load_kv_up: float = Field(1.0, gt=0, le=1, description="Load: share of KV in use to grow at.")
    load_kv_down: float = Field(0.6, ge=0, le=1, description="Load: share of KV in use to shrink at.")
    load_context_tokens: float = Field(
        8192, gt=0, allow_inf_nan=False, description="Prompt tokens that count as one queued context."
    )
    load_sensitivity: float = Field(0.8, gt=0, le=1, description="Share of a target that survivors may use.")

    min_replicas: int = Field(1, ge=0, description="Never fewer replicas of a role; 0 allows scaling to zero.")
    max_replicas: int = Field(8, ge=1, description="Never more replicas of a role.")
    prefill_min_replicas: int | None = Field(None, ge=0, description="Minimum of the prefill role; the common one.")
    decode_min_replicas: int | None = Field(None, ge=0, description="Minimum of the decode role; the common one.")
    worker_gpus: int = Field(1, ge=1, description="GPUs of one whole engine.")
    prefill_gpus: int = Field(1, ge=1, description="GPUs of one prefill engine.")
    decode_gpus: int = Field(1, ge=1, description="GPUs of one decode engine.")
    gpu_types: dict[str, Any] = Field(
        {},
        description="GPU types to choose from by price, as a JSON object: role to price_per_hour and what differs.",
    )
    max_price_per_hour: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="GPU types: no mix that is dearer; unlimited if omitted."
    )
    max_gpu_budget: int | None = Field(None, ge=1, description="Never more GPUs; what max replicas take if omitted.")
    min_gpu_budget: int = Field(0, ge=0, description="Not fewer GPUs, to within one engine.")

    interval_s: float = Field(10.0, gt=0, allow_inf_nan=False, description="Seconds between decisions.")
    throughput_interval_s: float = Field(
        10.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds of traffic that make one point of the forecast; the interval if that is longer.",
    )
    stale_after_s: float = Field(
        60.0, gt=0, allow_inf_nan=False, description="Input older than this is missing; the planner then holds."
    )
    scale_down_delay_s: float = Field(
        60.0, ge=0, allow_inf_nan=False, description="Seconds that fewer replicas must suffice before any is let go."
    )
    idle_s: float = Field(
        300.0, gt=0, allow_inf_nan=False, description="Seconds without a request after which none is expected."
    )
    start_timeout_s: float = Field(
        300.0, gt=0, allow_inf_nan=False, description="Seconds without progress after which a start has failed."
    )
    manual_edits: Literal["keep", "revert"] = Field("keep", description="What to do about someone else's replicas.")
    manual_hold_s: float = Field(
        600.0, gt=0, allow_inf_nan=False, description="Seconds an edit is kept, or until it may be reverted again."
    )
    advisory: bool = Field(False, description="Decide and explain, but leave the replicas alone.")

    decisions_kept: int = Field(1024, ge=1, description="Decisions kept for the APIs.")
    decision_log: Path | None = Field(None, description="File that each decision is appended to with its input.")
    decision_log_bytes: int = Field(64_000_000, ge=100_000, description="Size at which the log starts anew.")
    leader_election: bool = Field(False, description="Run several planners, of which one at a time decides.")
    api_host: str = Field("127.0.0.1", description="Address of the operation API.")
    api_port: int | None = Field(None, ge=0, le=65535, description="Port of the operation API; off if omitted.")
    prometheus_url: str = Field("http://127.0.0.1:9090", description="Prometheus: its address.")
    prometheus_token: SecretStr | None = Field(None, description="Prometheus: bearer token.")
    prometheus_timeout_s: float = Field(10.0, gt=0, allow_inf_nan=False, description="Prometheus: limit of a query.")
    prometheus_prefix: str = Field("dynamo_frontend", description="Prometheus: prefix of the frontend's metrics.")
    prometheus_model: str = Field("", description="Prometheus: only this model; all if empty.")

    @model_validator(mode="after")
    def _fits_together(self) -> PlannerSettings:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"--min-replicas {self.min_replicas} exceeds --max-replicas {self.max_replicas}; raise the latter"
            )
        if self.stale_after_s < self.interval_s:
            raise ValueError(f"--stale-after-s {self.stale_after_s} is below --interval-s {self.interval_s}; raise it")
        if self.throughput_interval_s < self.interval_s and "throughput_interval_s" in self.model_fields_set:
            raise ValueError(
                f"--throughput-interval-s {self.throughput_interval_s} is below --interval-s {self.interval_s}; "
                "raise it"
            )
        if not (self.enable_throughput_scaling or self.enable_load_scaling):
            raise ValueError("--no-enable-throughput-scaling needs --enable-load-scaling, or nothing would scale")
        return self

    @property
    def window_s(self) -> float:
        """Seconds of a window of the forecast, which no tick is longer than."""
        return max(self.throughput_interval_s, self.interval_s)
