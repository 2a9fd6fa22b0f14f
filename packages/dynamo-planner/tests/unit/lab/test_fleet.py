from __future__ import annotations

import numpy as np
import pytest

from dynamo_core.planning import Observation, ScalingDecision
from dynamo_planner import create_planner
from dynamo_planner._capacity import Slo
from dynamo_planner._lab.clairvoyant import best_schedule, lower_bound_gpu_hours
from dynamo_planner._lab.engine import SimulatedEngine
from dynamo_planner._lab.fleet import FleetOptions, SimulatedFleet
from dynamo_planner._lab.rivals import FixedFleet, HpaRule, KpaRule, Schedule
from dynamo_planner._lab.simulate import planner_settings, run_study, table
from dynamo_planner._timing import AnalyticTiming
from dynamo_planner._trace import Trace

TIMING = AnalyticTiming()
WORLD = FleetOptions(TIMING, Slo(1.0, 0.1, 99), startup_s=30, interval_s=10, initial_replicas=2, max_replicas=20)


def poisson(rate: float, seconds: float, *, seed: int = 1, prompt: int = 1000, output: int = 100) -> Trace:
    random = np.random.default_rng(seed)
    times = np.cumsum(random.exponential(1 / rate, int(rate * seconds)))
    return Trace.of([(float(at_s), prompt, output) for at_s in times])


def surge() -> Trace:
    calm, rush, after = poisson(4, 300), poisson(40, 300, seed=2), poisson(4, 300, seed=3)
    rows = [(at, 1000.0, 100.0) for at in calm.at_s]
    rows += [(at + 300, 1000.0, 300.0) for at in rush.at_s]
    rows += [(at + 600, 1000.0, 100.0) for at in after.at_s]
    return Trace.of(rows)


def test_one_request_takes_its_prompt_and_its_tokens() -> None:
    ended: list[tuple[int, float, float]] = []
    engine = SimulatedEngine(TIMING, lambda *row: ended.append(row), 0.0)
    engine.submit(7, 5.0, 1000, 51)
    engine.advance(100)
    [(request, first_s, end_s)] = ended
    assert request == 7
    assert first_s == pytest.approx(5 + TIMING.prefill_s(1000))
    assert end_s - first_s == pytest.approx(50 * TIMING.decode_s(1, 1025), rel=0.01)
    assert engine.empty
    assert (engine.kv_tokens, engine.waiting_tokens) == (0.0, 0.0)


def test_prompts_share_a_step_and_long_ones_take_several() -> None:
    ended: list[float] = []
    engine = SimulatedEngine(TIMING, lambda request, first_s, end_s: ended.append(first_s), 0.0)
    engine.submit(0, 0.0, 1000, 1)
    engine.submit(1, 0.0, 1000, 1)
    engine.advance(10)
    assert ended == [pytest.approx(TIMING.chunk_s(2000))] * 2
    engine.submit(2, 10.0, 20_000, 1)
    engine.advance(100)
    assert ended[2] == pytest.approx(10 + TIMING.prefill_s(20_000))


def test_the_cache_is_never_overfilled_and_everything_ends() -> None:
    small = AnalyticTiming(max_kv_tokens=5000)
    ended: list[int] = []
    engine = SimulatedEngine(small, lambda request, first_s, end_s: ended.append(request), 0.0)
    for request in range(20):
        engine.submit(request, 0.0, 1000, 50)
    most = 0.0
    for at_s in range(1, 2000):
        engine.advance(at_s / 10)
        most = max(most, engine.kv_tokens)
    assert sorted(ended) == list(range(20))
    assert most <= 5000 + 5 * 50


def test_a_fixed_fleet_costs_its_size_and_attains_more_the_larger() -> None:
    trace = poisson(45, 600, output=200)
    runs = [SimulatedFleet(trace, FixedFleet(count), _with(count)).run() for count in (1, 2, 8)]
    assert [run.gpu_hours for run in runs] == pytest.approx([count * trace.duration_s / 3600 for count in (1, 2, 8)])
    assert runs[0].attained < runs[1].attained <= runs[2].attained
    assert runs[2].attained > 0.99


def _with(count: int) -> FleetOptions:
    return FleetOptions(TIMING, WORLD.slo, WORLD.startup_s, WORLD.interval_s, count, WORLD.max_replicas)


def test_replicas_start_late_and_drain_before_they_end() -> None:
    trace = poisson(20, 300)
    outcome = SimulatedFleet(trace, Schedule(100, [2, 4, 1], 0), WORLD).run()
    asked = outcome.times_s[outcome.replicas.index(4)]
    served = outcome.times_s[outcome.ready.index(4)]
    assert served - asked == 30
    assert outcome.replicas[-1] == 1
    assert np.isfinite(outcome.ttft_s).all()


def test_requests_that_meet_no_replica_wait_for_the_first() -> None:
    trace = poisson(2, 200)
    settings = planner_settings(WORLD, budget=4, least=0)
    world = FleetOptions(TIMING, WORLD.slo, 30, 10, 0, 4)
    none = SimulatedFleet(trace, FixedFleet(0), world).run()
    assert none.attained == 0.0
    rising = SimulatedFleet(trace, Schedule(60, [0, 1, 1, 1], 0), world).run()
    assert np.isfinite(rising.ttft_s).all()
    assert settings.min_replicas == 0


def test_the_planner_follows_a_surge_for_less_than_the_rules_at_equal_attainment() -> None:
    study = run_study(surge(), WORLD, planner_settings(WORLD, budget=20))
    found = {result.name: result.outcome for result in study.results}
    assert study.bound_gpu_hours < found["clairvoyant schedule"].gpu_hours
    for outcome in found.values():
        assert outcome.gpu_hours > study.bound_gpu_hours
    assert max(found["planner"].replicas) > 2 * min(found["planner"].replicas)
    assert found["planner"].decisions
    text = table(study)
    assert text.count("\n") == 8
    assert "HPA-like" in text


def test_the_clairvoyant_attains_what_is_asked_at_less_than_a_fixed_fleet() -> None:
    best = best_schedule(surge(), WORLD, 0.99)
    outcome = best.outcome
    assert outcome.attained >= 0.99
    assert 0.3 <= best.factor <= 1.85
    assert outcome.gpu_hours < max(outcome.replicas) * surge().duration_s / 3600


def test_the_bound_is_at_least_the_minimum_fleet() -> None:
    quiet = poisson(0.1, 3600)
    assert lower_bound_gpu_hours(quiet, WORLD, least=2) >= 2 * quiet.duration_s / 3600


@pytest.mark.parametrize("rule", [HpaRule(10, 1, 20), KpaRule(10, 1, 20)])
def test_the_rules_grow_with_requests_in_flight_and_stay_in_their_limits(rule: HpaRule | KpaRule) -> None:
    outcome = SimulatedFleet(surge(), rule, WORLD).run()
    assert max(outcome.replicas) > 2 * outcome.replicas[25]
    assert 1 <= min(outcome.replicas) <= max(outcome.replicas) <= 20


def test_a_run_is_the_same_each_time() -> None:
    trace = poisson(20, 300)
    one, two = (SimulatedFleet(trace, create_planner(planner_settings(WORLD, budget=8)), WORLD).run() for _ in "ab")
    assert np.array_equal(one.ttft_s, two.ttft_s)
    assert one.replicas == two.replicas


def test_a_planner_that_asks_for_nothing_leaves_the_fleet() -> None:
    class Silent:
        def decide(self, observation: Observation) -> ScalingDecision:
            return ScalingDecision(1, observation.at_s)

    assert set(SimulatedFleet(poisson(5, 200), Silent(), WORLD).run().replicas) == {2}
