"""The what-if study: one trace, one world, the planner and its rivals, and what each costs at what attainment."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dynamo_core.planning import Planner
from dynamo_planner._build import create_planner
from dynamo_planner._lab.clairvoyant import best_schedule, lower_bound_gpu_hours
from dynamo_planner._lab.fleet import FleetOptions, Outcome, SimulatedFleet
from dynamo_planner._lab.rivals import FixedFleet, HpaRule, KpaRule
from dynamo_planner._lab.trace import Trace
from dynamo_planner._settings import PlannerSettings

IN_FLIGHT_TARGETS = (6, 8, 10, 12, 14, 16, 20, 26, 34, 44)
MOST_SIZES = 12


@dataclass(frozen=True)
class Result:
    """One policy's run.

    Attributes:
        name: The policy.
        outcome: What it gave.
        setting: The setting it was tuned to, in words.
    """

    name: str
    outcome: Outcome
    setting: str = ""


@dataclass(frozen=True)
class Study:
    """All runs of one trace.

    Attributes:
        results: One for each policy.
        bound_gpu_hours: What no schedule can be below.
        share: Attainment that the rivals were tuned to.
    """

    results: tuple[Result, ...]
    bound_gpu_hours: float
    share: float


def planner_settings(options: FleetOptions, *, budget: int, least: int = 1) -> PlannerSettings:
    """Return the planner that a study tries: both parts, the same step times and targets as the fleet."""
    return PlannerSettings.model_validate(
        {
            "capacity": "analytic",
            "engine_speedup": options.timing.speedup,
            "engine_kv_tokens": options.timing.max_kv_tokens,
            "engine_max_num_seqs": options.timing.max_num_seqs,
            "enable_load_scaling": True,
            "ttft_ms": options.slo.ttft_s * 1000,
            "itl_ms": options.slo.itl_s * 1000,
            "slo_percentile": options.slo.percentile,
            "min_replicas": least,
            "max_replicas": budget,
            "interval_s": options.interval_s,
            "stale_after_s": max(60.0, options.interval_s),
            "throughput_interval_s": max(60.0, options.interval_s),
        }
    )


def run_study(trace: Trace, options: FleetOptions, settings: PlannerSettings) -> Study:
    """Try the planner, then each rival at the cheapest of its settings that attains the target share.

    All start with the fleet that the clairvoyant has at the start, so that nobody pays for a cold start.
    """
    share = options.slo.percentile / 100
    least, most = settings.min_replicas, settings.max_replicas
    clairvoyant, factor = best_schedule(trace, options, share, least=least)
    world = replace(options, initial_replicas=clairvoyant.replicas[0] if clairvoyant.replicas else least)

    def run(planner: Planner, *, keep: bool = False) -> Outcome:
        return SimulatedFleet(trace, planner, world, keep_decisions=keep).run()

    ours = Result("planner", run(create_planner(settings), keep=True))
    fixed_counts = _around(clairvoyant, most)
    rivals = (
        _cheapest("fixed", lambda count: FixedFleet(int(count)), fixed_counts, (run, share)),
        _cheapest("HPA-like", lambda target: HpaRule(target, least, most), IN_FLIGHT_TARGETS, (run, share)),
        _cheapest("KPA-like", lambda target: KpaRule(target, least, most), IN_FLIGHT_TARGETS, (run, share)),
    )
    schedule = Result("clairvoyant schedule", clairvoyant, f"{factor:.2f} of the true need")
    return Study((ours, *rivals, schedule), lower_bound_gpu_hours(trace, options, least=least), share)


def table(study: Study) -> str:
    """Return the study as a table of text."""
    head = f"{'policy':<22}{'attained':>10}{'GPU-hours':>11}{'of bound':>10}{'changes':>9}  setting"
    lines = [head, "-" * len(head)]
    for result in study.results:
        outcome = result.outcome
        ratio = outcome.gpu_hours / study.bound_gpu_hours
        lines.append(
            f"{result.name:<22}{outcome.attained:>10.2%}{outcome.gpu_hours:>11.2f}{ratio:>9.2f}x"
            f"{outcome.changes:>9}  {result.setting}"
        )
    lines.append(f"{'lower bound':<22}{'':>10}{study.bound_gpu_hours:>11.2f}{1:>9.2f}x{'':>9}  work alone, no waiting")
    return "\n".join(lines)


def _cheapest(
    name: str,
    make: Callable[[float], Planner],
    choices: Sequence[float],
    how: tuple[Callable[[Planner], Outcome], float],
) -> Result:
    run, share = how
    results = [Result(name, run(make(choice)), f"{choice:g} {_UNITS[name]}") for choice in choices]
    attaining = [result for result in results if result.outcome.attained >= share]
    if attaining:
        return min(attaining, key=lambda result: result.outcome.gpu_hours)
    return max(results, key=lambda result: result.outcome.attained)


_UNITS = {"fixed": "replicas", "HPA-like": "in flight", "KPA-like": "in flight"}


def _around(clairvoyant: Outcome, most: int) -> list[int]:
    """Return fleet sizes from half the clairvoyant's mean to a little above its most."""
    counts = clairvoyant.ready or [1]
    low, high = math.floor(sum(counts) / len(counts) / 2), max(counts) + 2
    step = max(1, (high - low) // MOST_SIZES)
    return sorted({min(most, max(1, count)) for count in range(low, high + step, step)})
