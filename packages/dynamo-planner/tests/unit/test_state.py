from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_core.planning import LoadPredictor, Observation, Planner, PoolState, ScalingDecision, TrafficStats
from dynamo_planner import ConstantPredictor, PlannerSettings, RateCapacity, create_planner
from dynamo_planner._state import RatePlanner

SETTINGS = PlannerSettings(
    requests_per_replica_s=10, utilization=0.5, min_replicas=1, max_replicas=4, scale_down_delay_s=60, interval_s=10
)


def planner(**changes: object) -> RatePlanner:
    return create_planner(SETTINGS.model_copy(update=changes), ConstantPredictor())


def observation(at_s: float, rate: float | None, desired: int, **pool: int) -> Observation:
    traffic = () if rate is None else (TrafficStats("m", 10.0, requests=round(rate * 10)),)
    return Observation(at_s=at_s, traffic=traffic, pools={"worker": PoolState(ready=desired, desired=desired, **pool)})


def wants(decision: ScalingDecision) -> tuple[int, str]:
    return decision.replicas["worker"], decision.reason


def test_protocols_are_kept() -> None:
    assert isinstance(planner(), Planner)
    assert isinstance(ConstantPredictor(), LoadPredictor)


def test_more_traffic_scales_up_at_once_and_explains_itself() -> None:
    decision = planner().decide(observation(0, 12.0, 1))
    assert wants(decision) == (3, "scale_up")
    assert decision.values == {"rate_requests_s": 12.0, "predicted_requests_s": 12.0, "needed_replicas": 3.0}
    assert decision.previous == {"worker": 1}
    assert decision.explanation == "predicted 12.00 requests/s need 3 replicas"


def test_the_ceiling_limits_and_says_so() -> None:
    assert wants(planner().decide(observation(0, 100.0, 4))) == (4, "limited")
    assert "limited to 4 by 1..4" in planner().decide(observation(0, 100.0, 1)).explanation


def test_less_traffic_scales_down_only_after_the_whole_delay() -> None:
    subject = planner()
    assert wants(subject.decide(observation(0, 20.0, 4))) == (4, "no_change")
    for at_s in range(10, 60, 10):
        assert wants(subject.decide(observation(at_s, 1.0, 4))) == (4, "scale_down_delayed")
    assert wants(subject.decide(observation(61, 1.0, 4))) == (1, "scale_down")


def test_a_fresh_planner_watches_for_the_whole_delay_before_it_lets_a_replica_go() -> None:
    subject = planner()
    assert wants(subject.decide(observation(0, 0.0, 3))) == (3, "scale_down_delayed")
    assert wants(subject.decide(observation(60, 0.0, 3))) == (1, "scale_down")


def test_scale_down_stops_at_the_highest_need_within_the_delay() -> None:
    subject = planner()
    subject.decide(observation(0, 20.0, 4))
    subject.decide(observation(50, 10.0, 4))
    assert wants(subject.decide(observation(70, 1.0, 4))) == (2, "scale_down")


def test_nothing_is_let_go_while_replicas_start_or_drain() -> None:
    subject = planner(scale_down_delay_s=0.0)
    assert wants(subject.decide(observation(0, 1.0, 3, starting=1))) == (3, "scaling_in_progress")
    assert wants(subject.decide(observation(1, 1.0, 3, draining=1))) == (3, "scaling_in_progress")


def test_missing_or_stale_traffic_holds_and_enforces_the_floor() -> None:
    subject = planner()
    assert wants(subject.decide(observation(0, None, 3))) == (3, "no_traffic_data")
    assert wants(subject.decide(observation(0, None, 0))) == (1, "no_traffic_data")
    stale = Observation(
        at_s=0, traffic=(TrafficStats("m", 10.0),), pools={"worker": PoolState(desired=3)}, stale=("traffic",)
    )
    assert wants(subject.decide(stale)) == (3, "no_traffic_data")


def test_an_unknown_pool_changes_nothing() -> None:
    decision = planner().decide(Observation(at_s=0, pools={"other": PoolState(desired=2)}))
    assert (decision.replicas, decision.reason) == ({}, "no_pool_data")


def test_decision_ids_grow_by_one() -> None:
    subject = planner()
    assert [subject.decide(observation(at_s, 1.0, 1)).decision_id for at_s in range(3)] == [1, 2, 3]


def test_constant_load_never_flaps_over_a_day() -> None:
    subject = planner()
    desired, changes = 1, 0
    for at_s in range(0, 24 * 3600, 10):
        wanted = subject.decide(observation(at_s, 12.0, desired)).replicas["worker"]
        changes += wanted != desired
        desired = wanted
    assert (desired, changes) == (3, 1)


@given(st.lists(st.tuples(st.floats(-100, 1000), st.none() | st.floats(0, 500), st.integers(0, 20)), max_size=50))
def test_limits_hold_at_every_instant(steps: list[tuple[float, float | None, int]]) -> None:
    subject = planner()
    for at_s, rate, desired in steps:
        wanted = subject.decide(observation(at_s, rate, desired)).replicas["worker"]
        assert 1 <= wanted <= 4


@pytest.mark.parametrize(("rate", "replicas"), [(0.0, 0), (5.0, 1), (5.1, 2), (10.0, 2), (0.001, 1)])
def test_capacity_is_exact_at_its_borders(rate: float, replicas: int) -> None:
    assert RateCapacity(10, 0.5).replicas_for(rate) == replicas


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_counts_as_missing(value: float) -> None:
    predictor = ConstantPredictor()
    assert predictor.predict() == 0.0
    predictor.observe(3.0)
    predictor.observe(value)
    assert predictor.predict(7) == 3.0
    predictor.observe(-1.0)
    assert predictor.predict() == 0.0
