"""Puts a planner together from its settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from dynamo_core import plugins
from dynamo_core.planning import LoadPredictor
from dynamo_planner._budget import Budget, RoleLimits
from dynamo_planner._capacity import (
    AggregatedCapacity,
    CapacityModel,
    DecodeCapacity,
    LearnedCapacity,
    PrefillCapacity,
    RateCapacity,
    Slo,
)
from dynamo_planner._correct import Headroom
from dynamo_planner._forecast import WorkloadForecaster
from dynamo_planner._gpu_types import gpu_types
from dynamo_planner._load import TARGET_THRESHOLDS, LatencyRule, LoadPart, Thresholds
from dynamo_planner._measured import ProfileTiming
from dynamo_planner._mix import GpuMix, GpuType, OfferingModel
from dynamo_planner._observe import TrafficWindow
from dynamo_planner._regress import StepRegression
from dynamo_planner._settings import PlannerSettings
from dynamo_planner._state import Patience, SlaPlanner
from dynamo_planner._throughput import ThroughputPart
from dynamo_planner._timing import AnalyticTiming, TimingModel
from dynamo_planner._trace import Trace, load_trace

CLOCK_JUMP_INTERVALS = 30

PredictorFactory = Callable[[], LoadPredictor]


@dataclass(frozen=True)
class _Engine:
    """What is known of an engine's step times."""

    timing: TimingModel | None
    steps: StepRegression | None = None

    def ready(self) -> bool:
        return self.timing is not None and (self.steps is None or self.steps.ready)


def create_planner(
    settings: PlannerSettings,
    make_predictor: PredictorFactory | None = None,
    *,
    capacity: Mapping[str, CapacityModel] | None = None,
    first_decision_id: int = 1,
) -> SlaPlanner:
    """Return the pure planner that these settings describe.

    Args:
        settings: Options.
        make_predictor: Makes a forecaster; the plug-in that the settings name if omitted.
        capacity: Capacity model by role, in place of the one that the settings name.
        first_decision_id: Identity of the first decision.

    Raises:
        ConfigurationError: if the limits contradict each other, or a plug-in, profile or extra is missing.
    """
    slo = Slo(settings.ttft_ms / 1000, settings.itl_ms / 1000, settings.slo_percentile)
    # With GPU types every type has an engine of its own.
    engine = _Engine(None) if settings.gpu_types else _engine(settings)
    models = dict(capacity) if capacity is not None else _models(settings, engine)
    by_sla = settings.optimization_target == "sla"
    throughput = None
    if by_sla and settings.enable_throughput_scaling:
        throughput = _throughput(settings, make_predictor or predictor_factory(settings), models, slo)
        if settings.warmup_trace is not None:
            throughput.warm_up(windows_of(load_trace(settings.warmup_trace), settings.window_s))
    load = None
    if not by_sla or settings.enable_load_scaling:
        load = _load(settings, engine, slo)
    patience = Patience(
        scale_down_delay_s=settings.scale_down_delay_s,
        start_timeout_s=settings.start_timeout_s,
        manual_hold_s=settings.manual_hold_s,
        revert_manual_edits=settings.manual_edits == "revert",
        max_gap_s=CLOCK_JUMP_INTERVALS * settings.interval_s,
    )
    return SlaPlanner(
        budget_of(settings),
        patience,
        throughput=throughput,
        load=load,
        steps=engine.steps,
        first_decision_id=first_decision_id,
        advisory=settings.advisory,
    )


def predictor_factory(settings: PlannerSettings) -> PredictorFactory:
    """Return the maker of the named forecaster.

    Raises:
        ConfigurationError: if it is not installed.
    """
    plugin = plugins.load("load_predictors", settings.load_predictor)
    return lambda: plugin(log1p=settings.load_predictor_log1p)


def budget_of(settings: PlannerSettings) -> Budget:
    """Return the limits of these settings.

    Raises:
        ConfigurationError: if they contradict each other.
    """
    most = settings.max_replicas
    prefill_least = _either(settings.prefill_min_replicas, settings.min_replicas)
    decode_least = _either(settings.decode_min_replicas, settings.min_replicas)
    prefill = RoleLimits(settings.prefill_role, settings.prefill_gpus, prefill_least, most)
    decode = RoleLimits(settings.decode_role, settings.decode_gpus, decode_least, most)
    whole = RoleLimits(settings.role, settings.worker_gpus, settings.min_replicas, most)
    roles = {"agg": (whole,), "prefill": (prefill,), "decode": (decode,), "disagg": (prefill, decode)}[settings.mode]
    if kinds := gpu_types(settings):
        roles = tuple(RoleLimits(kind.role, kind.gpus, kind.least, kind.most) for kind in kinds)
    ceiling = sum(limit.gpus * limit.max_replicas for limit in roles)
    return Budget(roles, _either(settings.max_gpu_budget, ceiling), settings.min_gpu_budget)


def _either(value: int | None, default: int) -> int:
    return default if value is None else value


def _engine(settings: PlannerSettings) -> _Engine:
    seqs, kv_tokens = settings.engine_max_num_seqs, settings.engine_kv_tokens
    if settings.capacity == "analytic":
        return _Engine(AnalyticTiming(settings.engine_speedup, kv_tokens, seqs, settings.engine_max_batched_tokens))
    if settings.capacity == "profile":
        return _Engine(ProfileTiming.load(settings.profile_dir, max_num_seqs=seqs))
    if settings.capacity == "learned" or settings.enable_load_scaling:
        steps = StepRegression(max_kv_tokens=kv_tokens, max_num_seqs=seqs)
        return _Engine(steps, steps)
    return _Engine(None)


def _models(settings: PlannerSettings, engine: _Engine) -> dict[str, CapacityModel]:
    if settings.gpu_types:
        return {}
    roles = [limit.role for limit in budget_of(settings).roles]
    if settings.capacity == "rate" or engine.timing is None:
        return {role: RateCapacity(settings.requests_per_replica_s, settings.utilization) for role in roles}
    made: dict[str, CapacityModel] = {
        settings.role: AggregatedCapacity(engine.timing, settings.prompt_cv2),
        settings.prefill_role: PrefillCapacity(engine.timing, settings.prompt_cv2),
        settings.decode_role: DecodeCapacity(engine.timing),
    }
    if engine.steps is not None:
        return {role: LearnedCapacity(made[role], engine.steps) for role in roles}
    return {role: made[role] for role in roles}


def _throughput(
    settings: PlannerSettings, make: PredictorFactory, models: Mapping[str, CapacityModel], slo: Slo
) -> ThroughputPart:
    forecaster = WorkloadForecaster(
        make,
        quantile=settings.planning_quantile,
        window_s=settings.window_s,
        idle_s=settings.idle_s,
        slack_s=slo.ttft_s,
    )
    headroom = Headroom(slo, settings.headroom_min, settings.headroom_max)
    mixes = _mixes(settings, models)
    alone = {role: model for role, model in models.items() if not any(role in mix.roles for mix in mixes)}
    return ThroughputPart(alone, forecaster, slo, window_s=settings.window_s, headroom=headroom, mixes=mixes)


def _mixes(settings: PlannerSettings, given: Mapping[str, CapacityModel]) -> list[GpuMix]:
    """Return a choice for each of what is served, if there are GPU types."""
    kinds: dict[str, list[GpuType]] = {}
    for kind in gpu_types(settings):
        # A model that the caller brings takes the place of the type's own.
        model = cast("OfferingModel", given[kind.role]) if kind.role in given else _offering(kind.engine, kind.serves)
        made = GpuType(kind.role, kind.price_per_hour, model, kind.gpus, kind.least, kind.most)
        kinds.setdefault(kind.serves, []).append(made)
    dearest = math.inf if settings.max_price_per_hour is None else settings.max_price_per_hour
    budget = budget_of(settings).max_gpus if kinds else 0
    return [GpuMix(name, types, max_gpus=budget, max_price_per_hour=dearest) for name, types in kinds.items()]


def _offering(settings: PlannerSettings, serves: str) -> OfferingModel:
    timing = _engine(settings).timing
    if settings.capacity == "rate" or timing is None:
        return RateCapacity(settings.requests_per_replica_s, settings.utilization)
    if serves == "prefill":
        return PrefillCapacity(timing, settings.prompt_cv2)
    return DecodeCapacity(timing) if serves == "decode" else AggregatedCapacity(timing, settings.prompt_cv2)


def windows_of(trace: Trace, length_s: float) -> Iterator[TrafficWindow]:
    """Yield the whole windows of a recorded trace."""
    prompts, outputs = trace.means(length_s)
    whole = int(trace.duration_s // length_s)
    for rate, prompt, output in list(zip(trace.rates(length_s), prompts, outputs, strict=True))[:whole]:
        requests = round(float(rate) * length_s)
        lengths = (float(prompt), float(output)) if requests else (None, None)
        yield TrafficWindow(requests, length_s, *lengths, cached_share=None, ttft_s=(), itl_s=())


def _load(settings: PlannerSettings, engine: _Engine, slo: Slo) -> LoadPart:
    uses = {settings.role: (True, True), settings.prefill_role: (True, False), settings.decode_role: (False, True)}
    roles = [limit.role for limit in budget_of(settings).roles]
    own = Thresholds(settings.load_queue_up, settings.load_queue_down, settings.load_kv_up, settings.load_kv_down)
    rule: Thresholds | LatencyRule = TARGET_THRESHOLDS.get(settings.optimization_target, own)
    if settings.optimization_target == "sla":
        assert engine.timing is not None
        rule = LatencyRule(engine.timing, slo, settings.load_sensitivity, engine.ready)
    return LoadPart(rule, {role: uses[role] for role in roles}, context_tokens=settings.load_context_tokens)
