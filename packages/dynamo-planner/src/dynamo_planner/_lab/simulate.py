"""The what-if study: one trace, one world, the planner and its rivals, and what each costs at what attainment."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dynamo_core.planning import Planner
from dynamo_planner._build import create_planner
from dynamo_planner._lab.clairvoyant import best_schedule, lower_bound_gpu_hours, staffed_bound_gpu_hours
from dynamo_planner._lab.compare import Point, chosen_settings, cost_at, warmed_planner
from dynamo_planner._lab.fleet import FleetOptions, Outcome, SimulatedFleet
from dynamo_planner._lab.rivals import FixedFleet, HpaRule, KpaRule
from dynamo_planner._settings import PlannerSettings
from dynamo_planner._trace import Trace

IN_FLIGHT_TARGETS = tuple(round(5 * 1.16**step) for step in range(24))
"""Requests in flight of a replica, from 5 to 152."""


NEIGHBOURS = 2


@dataclass(frozen=True)
class Result:
    """One policy's run.

    Attributes:
        name: The policy.
        outcome: What it gave.
        setting: The setting it was tuned to, in words.
        equal_gpu_hours: What it costs at the planner's attainment, over its settings; infinite where none attains it.
    """

    name: str
    outcome: Outcome
    setting: str = ""
    equal_gpu_hours: float | None = None


@dataclass(frozen=True)
class Study:
    """All runs of one trace.

    Attributes:
        results: One for each policy.
        bound_gpu_hours: What no schedule can be below.
        staffed_gpu_hours: The same of whole replicas that take their time to start.
        share: Attainment that the rivals were tuned to.
    """

    results: tuple[Result, ...]
    bound_gpu_hours: float
    staffed_gpu_hours: float
    share: float

    def of(self, name: str) -> Result:
        """Return the run of a policy."""
        return next(result for result in self.results if result.name == name)


def planner_settings(options: FleetOptions, *, budget: int, least: int = 1) -> PlannerSettings:
    """Return the planner that a study tries: both parts, the same step times and targets as the fleet."""
    return PlannerSettings.model_validate(
        {
            "capacity": "analytic",
            "engine_speedup": options.timing.speedup,
            "engine_kv_tokens": options.timing.max_kv_tokens,
            "engine_max_num_seqs": options.timing.max_num_seqs,
            "engine_max_batched_tokens": options.timing.max_batched_tokens,
            "ttft_ms": options.slo.ttft_s * 1000,
            "itl_ms": options.slo.itl_s * 1000,
            "slo_percentile": options.slo.percentile,
            "min_replicas": least,
            "max_replicas": budget,
            "interval_s": options.interval_s,
            "stale_after_s": max(60.0, options.interval_s),
            "throughput_interval_s": options.interval_s,
        }
    )


def run_study(
    trace: Trace,
    options: FleetOptions,
    settings: PlannerSettings,
    *,
    past: Trace | None = None,
    targets: Sequence[float] = IN_FLIGHT_TARGETS,
) -> Study:
    """Try the planner, then each rival at the cheapest of its settings that attains the target share.

    All start with the fleet that the clairvoyant has at the start, so that nobody pays for a cold start.

    Args:
        trace: What all are judged by.
        options: The world.
        settings: The planner's.
        past: Recorded traffic that the planner's quantile is chosen on and its forecasters start from; none if omitted.
        targets: Settings of the rules, in requests in flight of a replica.
    """
    share = options.slo.percentile / 100
    least, most = settings.min_replicas, settings.max_replicas
    best = best_schedule(trace, options, share, least=least)
    clairvoyant = best.outcome
    world = replace(options, initial_replicas=clairvoyant.replicas[0] if clairvoyant.replicas else least)

    def run(planner: Planner, *, keep: bool = False) -> Outcome:
        return SimulatedFleet(trace, planner, world, keep_decisions=keep).run()

    ours = run(_our_planner(settings, options, past), keep=True)
    tune = _Tuning(run, share, ours.attained)
    rivals = (
        tune.cheapest("fixed", lambda count: FixedFleet(int(count)), _around(clairvoyant, most)),
        tune.cheapest("HPA-like", lambda target: HpaRule(target, least, most), sorted(targets, reverse=True)),
        tune.cheapest("KPA-like", lambda target: KpaRule(target, least, most), sorted(targets, reverse=True)),
    )
    schedule = Result("clairvoyant schedule", clairvoyant, f"{best.kind}, {best.factor:.2f} of the true need")
    bound = lower_bound_gpu_hours(trace, options, least=least)
    staffed = staffed_bound_gpu_hours(trace, options, least=least)
    return Study((Result("planner", ours), *rivals, schedule), bound, staffed, share)


def _our_planner(settings: PlannerSettings, options: FleetOptions, past: Trace | None) -> Planner:
    if past is None:
        return create_planner(settings)
    share = options.slo.percentile / 100
    clairvoyant = best_schedule(past, options, share, least=settings.min_replicas).outcome
    world = replace(options, initial_replicas=clairvoyant.replicas[0])
    chosen = chosen_settings(settings, lambda planner: SimulatedFleet(past, planner, world).run(), share)
    return warmed_planner(chosen, past)


def table(study: Study) -> str:
    """Return the study as a table of text."""
    head = (
        f"{'policy':<22}{'attained':>10}{'GPU-hours':>11}{'of bound':>10}"
        f"{'at equal attainment':>21}{'changes':>9}  setting"
    )
    lines = [head, "-" * len(head)]
    for result in study.results:
        outcome = result.outcome
        ratio = outcome.gpu_hours / study.bound_gpu_hours
        lines.append(
            f"{result.name:<22}{outcome.attained:>10.2%}{outcome.gpu_hours:>11.2f}{ratio:>9.2f}x"
            f"{equal_text(result, study):>21}{outcome.changes:>9}  {result.setting}"
        )
    bounds = (
        ("staffed lower bound", study.staffed_gpu_hours, "whole replicas that take their time to start"),
        ("lower bound", study.bound_gpu_hours, "work alone, no waiting"),
    )
    for name, hours, told in bounds:
        ratio = hours / study.bound_gpu_hours
        lines.append(f"{name:<22}{'':>10}{hours:>11.2f}{ratio:>9.2f}x{'':>21}{'':>9}  {told}")
    return "\n".join(lines)


def equal_text(result: Result, study: Study) -> str:
    """Return what a rival costs at the planner's attainment, as a multiple of the bound."""
    hours = result.equal_gpu_hours
    if hours is None:
        return ""
    return f"{hours / study.bound_gpu_hours:.2f}x" if math.isfinite(hours) else "never attained"


@dataclass(frozen=True)
class _Tuning:
    """Runs a rival at the settings that matter: around the target share, and around the planner's attainment."""

    run: Callable[[Planner], Outcome]
    share: float
    attained: float

    def cheapest(self, name: str, make: Callable[[float], Planner], choices: Sequence[float]) -> Result:
        """Return the cheapest run that attains the share, or the one that attains most.

        Args:
            name: The rival.
            make: Makes it from a setting.
            choices: Settings, in the order in which they attain more.
        """
        runs: dict[int, Outcome] = {}

        def attained(place: int) -> float:
            if place not in runs:
                runs[place] = self.run(make(choices[place]))
            return runs[place].attained

        for wanted in (self.share, self.attained):
            found = _first(len(choices), lambda place, wanted=wanted: attained(place) >= wanted)
            # Attainment rises with cost but not smoothly, so the neighbours have their chance.
            for place in range(max(0, found - NEIGHBOURS), min(len(choices), found + NEIGHBOURS + 1)):
                attained(place)
        equal = cost_at([Point(outcome.attained, outcome.gpu_hours) for outcome in runs.values()], self.attained)
        attaining = [place for place in runs if attained(place) >= self.share]
        best = (
            min(attaining, key=lambda place: runs[place].gpu_hours)
            if attaining
            else max(runs, key=lambda place: runs[place].attained)
        )
        return Result(name, runs[best], f"{choices[best]:g} {_UNITS[name]}", equal_gpu_hours=equal)


def _first(count: int, holds: Callable[[int], bool]) -> int:
    """Return the first place at which something holds that holds from some place on; the last if it never does."""
    low, high = 0, count - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


_UNITS = {"fixed": "replicas", "HPA-like": "in flight", "KPA-like": "in flight"}


def _around(clairvoyant: Outcome, most: int) -> list[int]:
    """Return fleet sizes from half the clairvoyant's mean to twice its most."""
    counts = clairvoyant.ready or [1]
    low, high = max(1, math.floor(sum(counts) / len(counts) / 2)), 2 * max(counts) + 2
    return list(range(min(low, most), min(high, most) + 1))
