"""What the planner's fleets cost on recorded traces, beside bounds and rules.

Traces are read from the cache folder: ``azure_llm_2023_conv.csv.gz`` (Azure's LLM inference trace of 2023) and
``mooncake_conversation_trace.jsonl.gz``. One that is not there gives no figures. The planner's quantile is chosen on
one half of a trace and judged by the other, both ways; the rules are given the best of their settings on the half that
judges. Spread is over halves and over seeds of the copies that scaling makes. The quick form has one seed, one way, and
two rounds of the day in place of twenty-four.

Studies run side by side, a process a core.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dynamo_planner._capacity import Slo
from dynamo_planner._lab.fleet import FleetOptions
from dynamo_planner._lab.simulate import Study, planner_settings, run_study
from dynamo_planner._timing import AnalyticTiming
from dynamo_planner._trace import Trace, load_trace
from dynamo_tools.bench import Options
from dynamo_tools.bench.figure import Figure

BUDGET = 64
STEP_TOKENS = 2048
BOUND_LIMIT = 1.25
ATTAINED_LIMIT = 99.0
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
        both_ways: Judge by each half; otherwise by the second alone.
    """

    name: str
    file: str
    slo: Slo
    scale: float = 1.0
    day_hours: int = 0
    seeds: tuple[int, ...] = (0,)
    both_ways: bool = True


def worlds(*, quick: bool) -> list[World]:
    """Return what is studied, the longest first."""
    chat, patient = Slo(1.0, 0.1, 99), Slo(30.0, 0.1, 99)
    seeds, both = ((0,), False) if quick else ((0, 1, 2), True)
    return [
        World("azure_day", AZURE, chat, scale=8, day_hours=2 if quick else 24, both_ways=both),
        World("azure_x16", AZURE, chat, scale=16, seeds=seeds, both_ways=both),
        World("mooncake_x8", MOONCAKE, patient, scale=8, seeds=seeds, both_ways=both),
        World("mooncake_as_is", MOONCAKE, patient, both_ways=both),
        World("azure_as_is", AZURE, chat, both_ways=both),
    ]


def studies(options: Options) -> list[Figure]:
    """Study every world whose trace is there."""
    found = [world for world in worlds(quick=options.quick) if (options.cache / world.file).is_file()]
    tasks = [
        (world, options.cache / world.file, seed, swapped)
        for world in found
        for seed in world.seeds
        for swapped in ((False, True) if world.both_ways else (False,))
    ]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        done = list(pool.map(_study, *zip(*tasks, strict=True))) if tasks else []
    runs = {world.name: [run for task, run in zip(tasks, done, strict=True) if task[0] is world] for world in found}
    return [figure for world in found for figure in figures(world, runs[world.name])]


def figures(world: World, runs: Sequence[Study]) -> list[Figure]:
    """Return a world's figures over its runs."""
    rule, rival = _cheaper_rule(runs)
    staffed = [_ours(run) / run.staffed_gpu_hours for run in runs]
    return [
        Figure.of(
            f"{world.name}_of_clairvoyant",
            [_ours(run) / _clairvoyant(run) for run in runs],
            unit="x best schedule that knows the trace",
            better="lower",
            limit_value=BOUND_LIMIT,
        ),
        Figure.of(
            f"{world.name}_gpu_hours_of_bound",
            [_ours(run) / run.bound_gpu_hours for run in runs],
            unit="x work alone",
            better="lower",
            rival=f"{rule} rule at equal attainment",
            rival_value=rival,
            limit_value=_mean([_clairvoyant(run) / run.bound_gpu_hours for run in runs]),
        ),
        Figure.of(f"{world.name}_of_staffed_bound", staffed, unit="x whole replicas", better="lower", limit_value=1.0),
        Figure.of(
            f"{world.name}_attained",
            [100 * run.of("planner").outcome.attained for run in runs],
            unit="% of requests",
            better="higher",
            limit_value=ATTAINED_LIMIT,
        ),
    ]


def study(world: World, trace: Trace, seed: int, *, swapped: bool = False) -> Study:
    """Run one seed of a world; swapped chooses on the second half and judges by the first."""
    scaled = trace.scaled(world.scale, seed=seed) if world.scale != 1 else trace
    whole = scaled.as_day(hours=world.day_hours, seed=seed) if world.day_hours else scaled
    middle_s = whole.duration_s / 2
    past, now = whole.between(0.0, middle_s), whole.between(middle_s, math.inf)
    if swapped:
        past, now = now, past
    options = FleetOptions(AnalyticTiming(max_batched_tokens=STEP_TOKENS), world.slo, max_replicas=BUDGET)
    return run_study(now, options, planner_settings(options, budget=BUDGET), past=past)


def _study(world: World, path: Path, seed: int, swapped: bool) -> Study:
    return study(world, load_trace(path), seed, swapped=swapped)


def _clairvoyant(run: Study) -> float:
    return run.of("clairvoyant schedule").outcome.gpu_hours


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _ours(run: Study) -> float:
    return run.of("planner").outcome.gpu_hours


def _cheaper_rule(runs: Sequence[Study]) -> tuple[str, float | None]:
    """Return the rule that is cheapest at the planner's attainment, and its multiple of the bound; None if none is."""
    costs: dict[str, float] = {}
    for rule in ("HPA-like", "KPA-like"):
        equal = [run.of(rule).equal_gpu_hours for run in runs]
        ratios = [hours / run.bound_gpu_hours for hours, run in zip(equal, runs, strict=True) if hours is not None]
        costs[rule] = _mean(ratios)
    best = min(costs, key=lambda rule: costs[rule])
    return best, costs[best] if math.isfinite(costs[best]) else None
