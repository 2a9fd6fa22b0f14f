"""What could be done at best by someone who knows the trace: a bound that no schedule beats, and a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from dynamo_planner._capacity import Workload, operating_point
from dynamo_planner._lab.fleet import FleetOptions, Outcome, SimulatedFleet
from dynamo_planner._lab.rivals import Schedule
from dynamo_planner._trace import Floats, Trace

WINDOW_S = 60.0
FACTORS = tuple(round(0.8 + 0.05 * step, 2) for step in range(40))


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


def best_schedule(trace: Trace, options: FleetOptions, share: float, *, least: int = 1) -> tuple[Outcome, float]:
    """Return the cheapest run among timetables in proportion to the true need that attains the share, and its factor.

    If none attains it, the one that attains most is returned.
    """
    needs = _true_needs(trace, options)
    runs = _run_of(trace, options, needs, least)
    low, high = 0, len(FACTORS) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if runs(FACTORS[middle]).attained >= share else (middle + 1, high)
    return runs(FACTORS[low]), FACTORS[low]


def _run_of(trace: Trace, options: FleetOptions, needs: Floats, least: int) -> Callable[[float], Outcome]:
    done: dict[float, Outcome] = {}

    def run(factor: float) -> Outcome:
        if factor not in done:
            counts = [min(options.max_replicas, max(least, math.ceil(need * factor))) for need in needs.tolist()]
            planner = Schedule(WINDOW_S, counts, options.startup_s + options.interval_s)
            done[factor] = SimulatedFleet(trace, planner, _started(options, counts[0])).run()
        return done[factor]

    return run


def _started(options: FleetOptions, replicas: int) -> FleetOptions:
    return FleetOptions(
        options.timing, options.slo, options.startup_s, options.interval_s, replicas, options.max_replicas
    )


def _true_needs(trace: Trace, options: FleetOptions) -> Floats:
    """Return the replicas that each window's own work keeps busy, fractions included."""
    per_window, _ = _work(trace, options)
    return per_window / WINDOW_S


def _work(trace: Trace, options: FleetOptions) -> tuple[Floats, Floats]:
    """Return the engine-seconds of the requests of each window, and the windows' lengths in seconds."""
    timing = options.timing
    mean = Workload(1.0, float(np.mean(trace.prompt_tokens)), float(np.mean(trace.output_tokens)))
    token_s = _cheapest_token_s(options)
    batch, _, _ = operating_point(timing, mean, options.slo.itl_s, prefill_s=token_s * mean.isl)
    decode_s = timing.decode_s(batch, mean.isl + mean.osl / 2)
    work = trace.prompt_tokens * token_s + trace.output_tokens * decode_s / batch
    edges = np.arange(0.0, trace.duration_s + WINDOW_S, WINDOW_S)
    per_window, _ = np.histogram(trace.at_s, bins=edges, weights=work)
    return per_window, np.minimum(WINDOW_S, np.maximum(trace.duration_s - edges[:-1], 0.0))


def _cheapest_token_s(options: FleetOptions) -> float:
    """Return the least engine time of a prompt token over all sizes of a step."""
    sizes = np.arange(64.0, options.timing.max_batched_tokens + 1, 64.0)
    return min(options.timing.chunk_s(float(size)) / float(size) for size in sizes)
