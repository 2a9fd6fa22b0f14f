"""Costs at equal attainment, settings chosen elsewhere, and bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dynamo_core.planning import Planner
from dynamo_planner._capacity import Slo
from dynamo_planner._lab.clairvoyant import best_schedule, lower_bound_gpu_hours, staffed_bound_gpu_hours
from dynamo_planner._lab.compare import Point, chosen_settings, cost_at
from dynamo_planner._lab.fleet import FleetOptions, Outcome
from dynamo_planner._lab.simulate import planner_settings, run_study
from dynamo_planner._lab.simulate import table as study_table
from dynamo_planner._settings import PlannerSettings
from dynamo_planner._timing import AnalyticTiming
from dynamo_planner._trace import Trace

WORLD = FleetOptions(AnalyticTiming(max_batched_tokens=2048), Slo(1.0, 0.1, 99), startup_s=30, max_replicas=12)


def waves(seconds: float, *, seed: int = 5) -> Trace:
    random = np.random.default_rng(seed)
    rows = []
    at_s = 0.0
    while at_s < seconds:
        at_s += float(random.exponential(1 / (20 + 15 * math.sin(at_s / 200))))
        rows.append((at_s, float(random.integers(200, 2000)), float(random.integers(20, 300))))
    return Trace.of(rows)


def test_the_cost_at_an_attainment_lies_between_the_runs_worth_their_cost() -> None:
    runs = [Point(0.9, 10), Point(0.99, 19), Point(0.95, 30), Point(0.999, 40)]
    assert cost_at(runs, 0.99) == 19
    assert cost_at(runs, 0.945) == pytest.approx(14.5)
    assert cost_at(runs, 0.5) == 10
    assert cost_at(runs, 0.9999) == math.inf


def test_the_quantile_chosen_is_the_cheapest_that_leaves_half_of_the_misses() -> None:
    gave = iter([(0.992, 5.0), (0.996, 7.0), (0.999, 6.0), (1.0, 9.0)])

    def run(planner: Planner) -> Outcome:
        attained, hours = next(gave)
        return Outcome(np.zeros(1), np.zeros(1), hours, attained)

    assert (
        chosen_settings(PlannerSettings.model_validate({"load_predictor": "constant"}), run, 0.99).planning_quantile
        == 0.97
    )


def test_bounds_are_in_order_and_whole_replicas_cost_more() -> None:
    trace = waves(900)
    work, staffed = lower_bound_gpu_hours(trace, WORLD), staffed_bound_gpu_hours(trace, WORLD)
    schedule = best_schedule(trace, WORLD, 0.99).outcome
    assert 0 < work < staffed <= schedule.gpu_hours


def test_a_lull_shorter_than_a_start_up_keeps_its_replica_in_the_bound() -> None:
    heavy, light = [(place / 40, 2000.0, 200.0) for place in range(2400)], []
    light = [(60 + place / 2, 50.0, 5.0) for place in range(120)]
    trace = Trace.of([*heavy, *light, *((at_s + 120, prompt, output) for at_s, prompt, output in heavy)])
    quick = staffed_bound_gpu_hours(trace, WORLD)
    slow = FleetOptions(WORLD.timing, WORLD.slo, startup_s=600, max_replicas=12)
    assert staffed_bound_gpu_hours(trace, slow) > quick


def test_a_held_out_study_beats_the_rules_at_equal_attainment() -> None:
    trace = waves(1200)
    past, now = trace.between(0, 600), trace.between(600, math.inf)
    slower = FleetOptions(
        AnalyticTiming(0.3, max_batched_tokens=1024), Slo(3.0, 0.3, 99), startup_s=30, max_replicas=12
    )
    study = run_study(
        now, slower, planner_settings(slower, budget=12).model_copy(update={"load_predictor": "kalman"}), past=past
    )
    ours = study.of("planner").outcome
    assert ours.attained >= 0.98
    for rival in ("HPA-like", "KPA-like"):
        equal = study.of(rival).equal_gpu_hours
        assert equal is not None
        assert ours.gpu_hours < equal
    assert "staffed lower bound" in study_table(study)
