"""What a planner's decision costs, and how fast its laboratory runs."""

from __future__ import annotations

import math
import random
import time

from dynamo_core.planning import Observation, PoolState, TrafficStats
from dynamo_planner import PlannerSettings, create_planner
from dynamo_planner._lab.fleet import FleetOptions, SimulatedFleet
from dynamo_planner._lab.rivals import FixedFleet
from dynamo_planner._lab.simulate import planner_settings
from dynamo_planner._trace import Trace
from dynamo_tools.bench import Options
from dynamo_tools.bench.figure import Figure
from dynamo_tools.bench.measure import repeat
from dynamo_tools.bench.planner_study import studies

_HISTORY_POINTS = 500
_DECISIONS = 50
_DECISION_LIMIT_MS = 50.0
_SIMULATION_LIMIT = 200_000.0
_REPLICAS = 8
_REQUESTS_S = 20.0


def run(options: Options) -> list[Figure]:
    """Measure decision and laboratory, which have no rival to install, and what plans cost on recorded traces."""
    requests = 5_000 if options.quick else 50_000
    decisions = repeat(_decision_ms, options.runs)
    simulations = repeat(lambda: _simulated_requests_per_minute(requests), options.runs)
    return [
        Figure.of("decision_auto_500_points", decisions, unit="ms CPU", better="lower", limit_value=_DECISION_LIMIT_MS),
        Figure.of(
            "simulate_with_planner",
            simulations,
            unit="requests/CPU-minute",
            better="higher",
            rival="fixed fleet, nothing decided",
            rival_value=_simulated_requests_per_minute(requests, fixed=True),
            limit_value=_SIMULATION_LIMIT,
        ),
        *studies(options),
    ]


def _decision_ms() -> float:
    """Return the mean CPU time of a decision once the forecasters hold 500 points."""
    chosen = {"load_predictor": "auto", "capacity": "analytic", "interval_s": 30.0, "throughput_interval_s": 30.0}
    settings = PlannerSettings.model_validate(chosen)
    planner = create_planner(settings)
    seeded = random.Random(7)
    for step in range(_HISTORY_POINTS):
        planner.decide(_observation(step, seeded))
    started = time.process_time()
    for step in range(_HISTORY_POINTS, _HISTORY_POINTS + _DECISIONS):
        planner.decide(_observation(step, seeded))
    return (time.process_time() - started) / _DECISIONS * 1000


def _observation(step: int, seeded: random.Random) -> Observation:
    rate = 40 + 20 * math.sin(step / 40) + seeded.gauss(0, 3)
    requests = max(0, round(rate * 30))
    traffic = TrafficStats("m", 30.0, requests, requests * 500, requests * 120)
    pool = PoolState(ready=_REPLICAS, desired=_REPLICAS)
    return Observation(at_s=step * 30.0, traffic=(traffic,), pools={"worker": pool})


def _simulated_requests_per_minute(requests: int, *, fixed: bool = False) -> float:
    options = FleetOptions(initial_replicas=_REPLICAS, max_replicas=2 * _REPLICAS)
    planner = FixedFleet(_REPLICAS) if fixed else create_planner(planner_settings(options, budget=2 * _REPLICAS))
    trace = _trace(requests)
    started = time.process_time()
    SimulatedFleet(trace, planner, options).run()
    return requests / (time.process_time() - started) * 60


def _trace(requests: int) -> Trace:
    seeded = random.Random(11)
    at_s = 0.0
    rows: list[tuple[float, float, float]] = []
    for _ in range(requests):
        at_s += seeded.expovariate(_REQUESTS_S)
        rows.append((at_s, float(seeded.randint(50, 2000)), float(seeded.randint(10, 300))))
    return Trace.of(rows)
