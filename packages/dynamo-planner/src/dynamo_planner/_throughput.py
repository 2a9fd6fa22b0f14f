"""The throughput part: forecast, capacity, replicas that must be there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dynamo_core.planning import Observation, PoolState, TrafficStats, total_traffic
from dynamo_planner._capacity import CapacityModel, Slo, Workload
from dynamo_planner._correct import Headroom
from dynamo_planner._forecast import WorkloadForecaster, usable
from dynamo_planner._mix import GpuMix
from dynamo_planner._observe import Arrivals, TrafficWindow, WindowBuilder
from dynamo_planner._observe import usable as true_report
from dynamo_planner._reasons import Reason

EPSILON = 1e-9
USUAL_STARTUP_S = 60.0


@dataclass(frozen=True)
class Proposal:
    """What one part proposes.

    Attributes:
        replicas: Wanted by role; empty if it knows too little.
        reason: Why.
        values: Numbers behind it.
        choices: Why a mix of GPU types is what it is, by what it serves: reason and words.
    """

    replicas: dict[str, int] = field(default_factory=dict[str, int])
    reason: Reason = Reason.NO_CHANGE
    values: dict[str, float] = field(default_factory=dict[str, float])
    choices: dict[str, tuple[Reason, str]] = field(default_factory=dict[str, tuple[Reason, str]])


class ThroughputPart:
    """Turns traffic into the replicas that the expected load needs.

    Args:
        models: Capacity model by role, of the roles that are not in a mix.
        forecaster: Forecasts of the workload.
        slo: Latency targets.
        window_s: Seconds of a window.
        headroom: Correction by observed latency.
        mixes: GPU types to choose from, by what they serve.
    """

    def __init__(
        self,
        models: Mapping[str, CapacityModel],
        forecaster: WorkloadForecaster,
        slo: Slo,
        *,
        window_s: float,
        headroom: Headroom,
        mixes: Sequence[GpuMix] = (),
    ) -> None:
        self._models = dict(models)
        self._forecaster = forecaster
        self._slo = slo
        self._builder = WindowBuilder(window_s)
        self._arrivals = Arrivals()
        self._headroom = headroom
        self._mixes = tuple(mixes)
        self._last = Proposal(reason=Reason.INSUFFICIENT_DATA)

    def propose(
        self, observation: Observation, pools: Mapping[str, PoolState], stuck: frozenset[str] = frozenset()
    ) -> Proposal:
        """Take the next observation. Between the ends of windows the last proposal stands.

        Args:
            observation: The observation.
            pools: Pools that are planned.
            stuck: Roles whose replicas do not get ready.
        """
        traffic = total_traffic(observation.traffic)
        if traffic is None or "traffic" in observation.stale or not true_report(traffic):
            # A hole must not be bridged: a window over it would spread few requests over too long a time.
            self._builder.reset()
            self._arrivals.reset()
            return Proposal(reason=Reason.NO_TRAFFIC_DATA)
        window = self._builder.add(self._arrivals.counted(traffic, observation, pools))
        if window is not None:
            self._forecaster.observe(window)
            self._headroom.update(window, _startup_s(pools))
            self._last = self._plan(window, pools, observation, stuck)
        return self._woken(traffic, pools) or self._last

    def warm_up(self, windows: Iterable[TrafficWindow]) -> None:
        """Feed recorded windows to the forecasters, which learn their errors from them too."""
        for window in windows:
            self._forecaster.observe(window)
            self._forecaster.forecast(USUAL_STARTUP_S)

    @property
    def idle(self) -> bool:
        """Whether nothing came for so long that nothing is expected."""
        return self._forecaster.idle

    def reset(self) -> None:
        """Drop the window that is being built."""
        self._builder.reset()
        self._arrivals.reset()

    def _woken(self, traffic: TrafficStats, pools: Mapping[str, PoolState]) -> Proposal | None:
        """Ask for one replica of each role at once when requests meet none."""
        mixed = [mix for mix in self._mixes if not any(pools[role].desired for role in mix.roles)]
        alone = [role for role in pools if role in self._models and not pools[role].desired]
        if not (traffic.requests or traffic.errors) or not (mixed or alone):
            return None
        last = self._last.replicas
        asked = {
            role: max(1, last.get(role, 0)) if role in self._models else last.get(role, pool.desired)
            for role, pool in pools.items()
        }
        for mix in mixed:
            asked |= mix.woken()
        self._last = Proposal(asked, Reason.WAKE, {"requests": float(traffic.requests)})
        return self._last

    def _plan(
        self,
        window: TrafficWindow,
        pools: Mapping[str, PoolState],
        observation: Observation,
        stuck: frozenset[str],
    ) -> Proposal:
        forecast = self._forecaster.forecast(_startup_s(pools))
        if not usable(forecast):
            return Proposal(reason=Reason.PREDICT_FAILED)
        backlog_s = _waiting(observation) / max(self._slo.ttft_s, _startup_s(pools))
        workload = forecast.workload.plus(backlog_s)
        values = {
            "observed_requests_per_second": window.requests_s,
            "predicted_requests_per_second": forecast.requests_s,
            "planned_requests_per_second": forecast.workload.requests_s,
            "predicted_input_tokens": forecast.workload.isl,
            "predicted_output_tokens": forecast.workload.osl,
            "predicted_cached_share": forecast.workload.cached_share,
            "backlog_requests_per_second": backlog_s,
            "horizon_windows": float(forecast.horizon),
            "headroom": self._headroom.factor,
            "missed_share": self._headroom.missed,
        }
        replicas: dict[str, int] = {}
        for role, model in self._models.items():
            if not model.ready:
                return Proposal(reason=Reason.MODEL_NOT_READY, values=values)
            need = model.need(workload, self._slo)
            replicas[role] = math.ceil(need.replicas * self._headroom.factor - EPSILON)
            values[f"{role}.needed_replicas"] = float(need.replicas)
            values[f"{role}.meets_slo"] = float(need.meets_slo)
            for name, value in (("requests_s", need.engine_requests_s), ("ttft_s", need.ttft_s), ("itl_s", need.itl_s)):
                if math.isfinite(value) and value > 0:
                    values[f"{role}.engine_{name}"] = value
        choices: dict[str, tuple[Reason, str]] = {}
        for mix in self._mixes:
            chosen = mix.choose(_times(workload, self._headroom.factor), self._slo, pools, stuck)
            replicas |= chosen.replicas
            values |= chosen.values
            choices[mix.name] = (chosen.reason, chosen.note)
        return Proposal(replicas, Reason.SCALE, values, choices)


def _times(workload: Workload, factor: float) -> Workload:
    expected_s = None if workload.expected_s is None else workload.expected_s * factor
    return replace(workload, requests_s=workload.requests_s * factor, expected_s=expected_s)


def _startup_s(pools: Mapping[str, PoolState]) -> float:
    return max((pool.startup_s or 0.0 for pool in pools.values()), default=0.0)


def _waiting(observation: Observation) -> int:
    """Return the requests that wait in engines: work that came already and must be done beside what will come."""
    if "loads" in observation.stale:
        return 0
    return sum(max(0, load.waiting_requests) for load in observation.loads.values())
