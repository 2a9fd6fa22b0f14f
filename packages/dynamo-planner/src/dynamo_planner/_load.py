"""The load part: what engines report right now, against thresholds or against latency targets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dynamo_core.load import ReportedLoad
from dynamo_core.planning import Observation, PoolState, total_traffic
from dynamo_planner._capacity import Slo
from dynamo_planner._reasons import Reason
from dynamo_planner._throughput import Proposal
from dynamo_planner._timing import TimingModel, finite_or

MOST_GROWTH = 2.0
LONG_PROMPT = 1.5


@dataclass(frozen=True)
class Thresholds:
    """Static limits: above any of the upper ones grow, below all of the lower ones shrink.

    Attributes:
        queue_up: Waiting prompt tokens of an engine, in units of one context.
        queue_down: As above, to shrink.
        kv_up: Share of KV blocks in use.
        kv_down: As above, to shrink.
    """

    queue_up: float = 1.0
    queue_down: float = 0.1
    kv_up: float = 1.0
    kv_down: float = 0.6


TARGET_THRESHOLDS = {"throughput": Thresholds(), "latency": Thresholds(0.1, 0.0, 0.4, 0.1)}
"""Thresholds of the targets that need no profile."""


@dataclass(frozen=True)
class LatencyRule:
    """Estimates from step times, against latency targets.

    Attributes:
        timing: Step times.
        slo: Targets.
        sensitivity: Share of a target that the survivors of a consolidation may use.
        ready: Whether the step times are known.
    """

    timing: TimingModel
    slo: Slo
    sensitivity: float = 0.8
    ready: Callable[[], bool] = lambda: True


class LoadPart:
    """Compares reported load with its rule, one role at a time.

    Args:
        rule: Static thresholds or latency estimates.
        context_tokens: Prompt tokens that make one context, the unit of a queue against thresholds.
        uses: For each role, whether its queue and its KV use count.
    """

    def __init__(
        self,
        rule: Thresholds | LatencyRule,
        uses: Mapping[str, tuple[bool, bool]],
        *,
        context_tokens: float = 8192.0,
    ) -> None:
        self._rule = rule
        self._uses = dict(uses)
        self._context_tokens = context_tokens
        self._prompt_tokens = 0.0

    def propose(self, observation: Observation, role: str, pool: PoolState) -> Proposal:
        """Return the replicas that this role's load asks for."""
        traffic = total_traffic(observation.traffic)
        if traffic is not None and traffic.requests > 0:
            self._prompt_tokens = (traffic.prompt_tokens - traffic.cached_tokens) / traffic.requests
        loads = [] if "loads" in observation.stale else _loads_of(observation, role, len(self._uses) == 1)
        if not loads:
            return Proposal(reason=Reason.NO_FPM_DATA)
        if pool.starting or pool.draining:
            return Proposal(reason=Reason.SCALING_IN_PROGRESS)
        if len(loads) != pool.ready:
            return Proposal(reason=Reason.WORKER_COUNT_MISMATCH, values={f"{role}.reports": float(len(loads))})
        if isinstance(self._rule, LatencyRule):
            if not self._rule.ready():
                return Proposal(reason=Reason.INSUFFICIENT_DATA)
            return self._by_latency(self._rule, role, loads)
        return self._by_thresholds(self._rule, role, loads)

    def _by_thresholds(self, rule: Thresholds, role: str, loads: Sequence[ReportedLoad]) -> Proposal:
        uses_queue, uses_kv = self._uses[role]
        queue = sum(load.waiting_prefill_tokens for load in loads) / len(loads) / self._context_tokens
        kv = sum(_kv_share(load) for load in loads) / len(loads)
        values = {f"{role}.queued_contexts": queue, f"{role}.kv_share": kv}
        ratios = [queue / rule.queue_up] * uses_queue + [kv / rule.kv_up] * uses_kv
        count = len(loads)
        if max(ratios) >= 1.0:
            return Proposal({role: _grown(count, max(ratios))}, Reason.SCALE_UP, values)
        # The survivors carry what the one that leaves carried; only their load decides whether it may go.
        after = count / (count - 1) if count > 1 else 1.0
        quiet = (not uses_queue or queue <= rule.queue_down) and (not uses_kv or kv <= rule.kv_down)
        if not quiet:
            return Proposal({role: count}, Reason.NO_CHANGE, values)
        if uses_kv and kv * after >= rule.kv_up:
            return Proposal({role: count}, Reason.SCALE_DOWN_REFUSED_CONSOLIDATION, values)
        return Proposal({role: count - 1}, Reason.SCALE_DOWN, values)

    def _by_latency(self, rule: LatencyRule, role: str, loads: Sequence[ReportedLoad]) -> Proposal:
        uses_queue, uses_kv = self._uses[role]
        ttfts = [self._ttft_s(rule.timing, load, 1.0) for load in loads]
        itls = [_itl_s(rule.timing, load, 1.0) for load in loads]
        values = {f"{role}.estimated_ttft_s": max(ttfts), f"{role}.estimated_itl_s": max(itls)}
        count = len(loads)
        # The router sends work to the least loaded, so the target is missed once even the best engine misses it.
        # Where a prompt alone takes longer than the target, only what waits on top of it can be helped.
        limit_s = max(rule.slo.ttft_s, LONG_PROMPT * rule.timing.prefill_s(self._prompt_tokens))
        misses = [min(ttfts) / limit_s] * uses_queue + [min(itls) / rule.slo.itl_s] * uses_kv
        if max(misses) > 1.0:
            return Proposal({role: _grown(count, max(misses))}, Reason.SCALE_UP, values)
        if count < 2:
            return Proposal({role: count}, Reason.NO_CHANGE, values)
        after = count / (count - 1)
        survives = all(self._survives(rule, role, load, after) for load in loads)
        if survives:
            return Proposal({role: count - 1}, Reason.SCALE_DOWN, values)
        return Proposal({role: count}, Reason.SCALE_DOWN_REFUSED_CONSOLIDATION, values)

    def _survives(self, rule: LatencyRule, role: str, load: ReportedLoad, after: float) -> bool:
        uses_queue, uses_kv = self._uses[role]
        own = rule.timing.prefill_s(self._prompt_tokens)
        queued = self._ttft_s(rule.timing, load, after) - own
        if uses_queue and queued > max(0.0, rule.slo.ttft_s - own) * rule.sensitivity:
            return False
        fits = _kv_share(load) * after < 1.0 and _itl_s(rule.timing, load, after) < rule.slo.itl_s * rule.sensitivity
        return not uses_kv or fits

    def _ttft_s(self, timing: TimingModel, load: ReportedLoad, factor: float) -> float:
        return timing.prefill_s(load.waiting_prefill_tokens * factor + self._prompt_tokens)


def _itl_s(timing: TimingModel, load: ReportedLoad, factor: float) -> float:
    requests = load.active_requests * factor
    if requests <= 0:
        return 0.0
    return timing.decode_s(requests, _kv_share(load) * factor * timing.max_kv_tokens / requests)


def _kv_share(load: ReportedLoad) -> float:
    return finite_or(load.kv_used_blocks / load.kv_total_blocks, 0.0) if load.kv_total_blocks > 0 else 0.0


def _grown(count: int, ratio: float) -> int:
    return max(count + 1, math.ceil(count * min(ratio, MOST_GROWTH)))


def _loads_of(observation: Observation, role: str, only_role: bool) -> list[ReportedLoad]:
    if observation.roles or not only_role:
        return [load for worker, load in observation.loads.items() if observation.roles.get(worker) == role]
    return list(observation.loads.values())
