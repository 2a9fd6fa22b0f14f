"""What could be done at best by someone who knows the trace: bounds that no schedule beats, and a schedule.

The best schedule lies between the bounds, which leave out chance, and the cheapest timetable found, which is one that
was really run. Two kinds of timetable are tried: one in proportion to each minute's work, and one planned by dynamic
programming, which weighs whole replicas, their start-up and the requests that may come late against each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dynamo_planner._capacity import Workload, operating_point
from dynamo_planner._lab.fleet import FleetOptions, Outcome, SimulatedFleet
from dynamo_planner._lab.rivals import Schedule
from dynamo_planner._lab.timetable import Terms, planned_counts
from dynamo_planner._trace import Floats, Trace

WINDOW_S = 60.0
FACTORS = tuple(round(0.8 + 0.05 * step, 2) for step in range(40))
PLANNED_FACTORS = tuple(round(0.4 + 0.05 * step, 2) for step in range(32))
SECOND = 1.0

Counts = tuple[float, list[int]]
"""Length of an entry in seconds, and the replicas of each."""


@dataclass(frozen=True)
class Clairvoyant:
    """The cheapest timetable found.

    Attributes:
        outcome: What it gave.
        kind: How it was made: ``even`` or ``planned``.
        factor: Times the work that it provides for.
    """

    outcome: Outcome
    kind: str
    factor: float


def lower_bound_gpu_hours(trace: Trace, options: FleetOptions, *, least: int = 1) -> float:
    """Return replica-hours below which no schedule can be.

    Every request costs an engine its prompt's tokens at the size of step at which a token is cheapest, and its output
    tokens' share of decode steps at the fullest batch within the inter-token target. That work must be paid for
    wherever it is done, and the minimum of replicas is there throughout. Fractions of replicas are allowed, so the
    bound is lower than any real fleet.
    """
    per_window, lengths = _work(trace, options)
    return float(np.maximum(per_window, least * lengths).sum() / 3600)


def staffed_bound_gpu_hours(trace: Trace, options: FleetOptions, *, least: int = 1) -> float:
    """Return replica-hours of whole replicas that take their time to start, still without chance or ignorance.

    A window's work may wait as long as a first token may. Each replica is kept through a lull or let go and started
    again, whichever is cheaper; the first start is free.
    """
    per_window, lengths = _work(trace, options)
    needs = np.maximum(least, np.ceil(per_window / (WINDOW_S + options.slo.ttft_s) - 1e-9)).astype(int)
    seconds = float((needs * lengths).sum())
    for level in range(least + 1, int(needs.max(initial=least)) + 1):
        needed = np.flatnonzero(needs >= level)
        gaps_s = (np.diff(needed) - 1) * WINDOW_S
        seconds += float(np.minimum(gaps_s, options.startup_s).sum())
    return max(seconds / 3600, lower_bound_gpu_hours(trace, options, least=least))


def best_schedule(trace: Trace, options: FleetOptions, share: float, *, least: int = 1) -> Clairvoyant:
    """Return the cheapest run among timetables made from the trace that attains the share.

    If none attains it, the one that attains most is returned.
    """
    found = [
        _cheapest(trace, options, share, kind, least)
        for kind in (
            _Kind("even", FACTORS, lambda factor: (WINDOW_S, _even_counts(trace, options, factor, least))),
            _Kind("planned", PLANNED_FACTORS, _planner_of(trace, options, share, least)),
        )
    ]
    return min(found, key=lambda run: (run.outcome.attained < share, _worth(run.outcome, share)))


def _worth(outcome: Outcome, share: float) -> float:
    return outcome.gpu_hours if outcome.attained >= share else -outcome.attained


@dataclass(frozen=True)
class _Kind:
    name: str
    factors: Sequence[float]
    make: Callable[[float], Counts]


def _cheapest(trace: Trace, options: FleetOptions, share: float, kind: _Kind, least: int) -> Clairvoyant:
    """Bisect the factors for the least that attains the share."""
    done: dict[float, Outcome] = {}

    def run(factor: float) -> Outcome:
        if factor not in done:
            entry_s, counts = kind.make(factor)
            counts = [min(options.max_replicas, max(least, count)) for count in counts]
            planner = Schedule(entry_s, counts, options.startup_s + options.interval_s)
            done[factor] = SimulatedFleet(trace, planner, replace(options, initial_replicas=counts[0])).run()
        return done[factor]

    low, high = 0, len(kind.factors) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if run(kind.factors[middle]).attained >= share else (middle + 1, high)
    run(kind.factors[low])
    best = min(done, key=lambda factor: (done[factor].attained < share, _worth(done[factor], share)))
    return Clairvoyant(done[best], kind.name, best)


def _even_counts(trace: Trace, options: FleetOptions, factor: float, least: int) -> list[int]:
    """Return replicas in proportion to the work of each minute."""
    per_window, _ = _work(trace, options)
    return [max(least, math.ceil(work / WINDOW_S * factor)) for work in per_window.tolist()]


def _planner_of(trace: Trace, options: FleetOptions, share: float, least: int) -> Callable[[float], Counts]:
    work, _ = _work(trace, options, SECOND)
    terms = Terms(
        slot_s=max(1, round(options.interval_s)),
        startup_s=options.startup_s,
        slack_s=options.slo.ttft_s,
        late_share=(1 - share) / 2,
        least=least,
        most=options.max_replicas,
    )

    def make(factor: float) -> Counts:
        return float(terms.slot_s), planned_counts(work * factor, terms)

    return make


def _work(trace: Trace, options: FleetOptions, window_s: float = WINDOW_S) -> tuple[Floats, Floats]:
    """Return the engine-seconds of the requests of each window, and the windows' lengths in seconds."""
    timing = options.timing
    mean = Workload(1.0, float(np.mean(trace.prompt_tokens)), float(np.mean(trace.output_tokens)))
    token_s = _cheapest_token_s(options)
    batch, _, _ = operating_point(timing, mean, options.slo.itl_s, prefill_s=token_s * mean.isl)
    decode_s = timing.decode_s(batch, mean.isl + mean.osl / 2)
    work = trace.prompt_tokens * token_s + trace.output_tokens * decode_s / batch
    edges = np.arange(0.0, trace.duration_s + window_s, window_s)
    per_window, _ = np.histogram(trace.at_s, bins=edges, weights=work)
    return per_window, np.minimum(window_s, np.maximum(trace.duration_s - edges[:-1], 0.0))


def _cheapest_token_s(options: FleetOptions) -> float:
    """Return the least engine time of a prompt token over all sizes of a step."""
    sizes = np.arange(64.0, options.timing.max_batched_tokens + 1, 64.0)
    return min(options.timing.chunk_s(float(size)) / float(size) for size in sizes)
