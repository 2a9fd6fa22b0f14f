"""What the planner's fleets cost on recorded traces, beside bounds and rules.

Traces are read from the cache folder: ``azure_llm_2023_conv.csv.gz`` (Azure's LLM inference trace of 2023) and
``mooncake_conversation_trace.jsonl.gz``. One that is not there gives no figures. The planner's quantile is chosen on
the first half of a trace and judged by the second; the rules are given the best of their settings on that second half.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dynamo_planner._capacity import Slo
from dynamo_planner._lab.fleet import FleetOptions
from dynamo_planner._lab.simulate import IN_FLIGHT_TARGETS, Study, planner_settings, run_study
from dynamo_planner._timing import AnalyticTiming
from dynamo_planner._trace import Trace, load_trace
from dynamo_tools.bench import Options
from dynamo_tools.bench.figure import Figure

BUDGET = 64
STEP_TOKENS = 2048
BOUND_LIMIT = 1.25
ATTAINED_LIMIT = 99.0
FEW_TARGETS = (16.0, 44.0, 80.0, 150.0)
AZURE = "azure_llm_2023_conv.csv.gz"
MOONCAKE = "mooncake_conversation_trace.jsonl.gz"


@dataclass(frozen=True)
class World:
    """One trace and what is asked of the fleet.

    Attributes:
        name: Name of its figures.
        file: Trace.
        slo: Targets.
        scale: Times the trace's requests.
        day_hours: Rounds of the day's pattern; 0 leaves the trace as it is.
        seeds: Copies that scaling makes are drawn with each.
        targets: Settings of the rules.
    """

    name: str
    file: str
    slo: Slo
    scale: float = 1.0
    day_hours: int = 0
    seeds: tuple[int, ...] = (0,)
    targets: Sequence[float] = IN_FLIGHT_TARGETS


def worlds(*, quick: bool) -> list[World]:
    """Return what is studied. The quick form has fewer seeds, rules' settings and hours."""
    chat, patient = Slo(1.0, 0.1, 99), Slo(30.0, 0.1, 99)
    seeds = (0,) if quick else (0, 1, 2)
    targets = FEW_TARGETS if quick else IN_FLIGHT_TARGETS
    return [
        World("azure_as_is", AZURE, chat, targets=targets),
        World("azure_x16", AZURE, chat, scale=16, seeds=seeds, targets=targets),
        World("mooncake_as_is", MOONCAKE, patient, targets=targets),
        World("mooncake_x8", MOONCAKE, patient, scale=8, seeds=seeds, targets=targets),
        World("azure_day", AZURE, chat, scale=8, day_hours=2 if quick else 24, targets=FEW_TARGETS),
    ]


def studies(options: Options) -> list[Figure]:
    """Study every world whose trace is there."""
    found = [world for world in worlds(quick=options.quick) if (options.cache / world.file).is_file()]
    return [figure for world in found for figure in figures(world, load_trace(options.cache / world.file))]


def figures(world: World, trace: Trace) -> list[Figure]:
    """Return a world's figures over its seeds."""
    runs = [study(world, trace, seed) for seed in world.seeds]
    rule, rival = _cheaper_rule(runs)
    staffed = [_ours(run) / run.staffed_gpu_hours for run in runs]
    return [
        Figure.of(
            f"{world.name}_gpu_hours_of_bound",
            [_ours(run) / run.bound_gpu_hours for run in runs],
            unit="x work alone",
            better="lower",
            rival=f"{rule} rule at equal attainment",
            rival_value=rival,
            limit_value=BOUND_LIMIT,
        ),
        Figure.of(f"{world.name}_of_staffed_bound", staffed, unit="x whole replicas", better="lower", limit_value=1.0),
        Figure.of(
            f"{world.name}_of_clairvoyant",
            [_ours(run) / run.of("clairvoyant schedule").outcome.gpu_hours for run in runs],
            unit="x timetable that knows the trace",
            better="lower",
            limit_value=1.0,
        ),
        Figure.of(
            f"{world.name}_attained",
            [100 * run.of("planner").outcome.attained for run in runs],
            unit="% of requests",
            better="higher",
            limit_value=ATTAINED_LIMIT,
        ),
    ]


def study(world: World, trace: Trace, seed: int) -> Study:
    """Run one seed of a world."""
    scaled = trace.scaled(world.scale, seed=seed) if world.scale != 1 else trace
    whole = scaled.as_day(hours=world.day_hours, seed=seed) if world.day_hours else scaled
    middle_s = whole.duration_s / 2
    past, now = whole.between(0.0, middle_s), whole.between(middle_s, math.inf)
    options = FleetOptions(AnalyticTiming(max_batched_tokens=STEP_TOKENS), world.slo, max_replicas=BUDGET)
    return run_study(now, options, planner_settings(options, budget=BUDGET), past=past, targets=world.targets)


def _ours(run: Study) -> float:
    return run.of("planner").outcome.gpu_hours


def _cheaper_rule(runs: Sequence[Study]) -> tuple[str, float | None]:
    """Return the rule that is cheapest at the planner's attainment, and its multiple of the bound; None if none is."""
    costs: dict[str, float] = {}
    for rule in ("HPA-like", "KPA-like"):
        equal = [run.of(rule).equal_gpu_hours for run in runs]
        ratios = [hours / run.bound_gpu_hours for hours, run in zip(equal, runs, strict=True) if hours is not None]
        costs[rule] = sum(ratios) / len(ratios)
    best = min(costs, key=lambda rule: costs[rule])
    return best, costs[best] if math.isfinite(costs[best]) else None
