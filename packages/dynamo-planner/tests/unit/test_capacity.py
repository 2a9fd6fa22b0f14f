from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_core.errors import ConfigurationError
from dynamo_planner import RateCapacity
from dynamo_planner._capacity import (
    AggregatedCapacity,
    DecodeCapacity,
    LearnedCapacity,
    PrefillCapacity,
    Slo,
    Workload,
    operating_point,
    wait_tail_s,
)
from dynamo_planner._regress import StepRegression
from dynamo_planner._timing import AnalyticTiming

TIMING = AnalyticTiming(speedup=0.5)
SLO = Slo(ttft_s=1.0, itl_s=0.05, percentile=99)


def test_the_operating_point_is_the_largest_batch_within_the_target() -> None:
    load = Workload(10, 1000, 200)
    batch, step_s, met = operating_point(TIMING, load, 0.05, prefill_s=TIMING.prefill_s(1000))
    share = TIMING.prefill_s(1000) / 200
    assert met
    assert step_s == pytest.approx(TIMING.decode_s(batch, 1100) + batch * share)
    assert step_s <= 0.05 < TIMING.decode_s(batch + 1, 1100) + (batch + 1) * share


def test_a_target_below_a_single_request_is_said_not_to_be_met() -> None:
    assert operating_point(TIMING, Workload(1, 1000, 200), 0.001, prefill_s=0.0)[::2] == (1.0, False)
    need = AggregatedCapacity(TIMING).need(Workload(5, 1000, 200), Slo(itl_s=0.001))
    assert not need.meets_slo
    assert need.replicas > 0


def test_the_wait_is_erlangs_formula() -> None:
    # One server at half load with exponential service: P(W > t) = 0.5 exp(-t/2).
    assert wait_tail_s(0.5, 1.0, 1, 0.99, 1.0) == pytest.approx(2 * math.log(50))
    assert wait_tail_s(0.5, 1.0, 1, 0.4, 1.0) == 0.0
    assert wait_tail_s(2.0, 1.0, 2, 0.9, 1.0) == math.inf


def test_many_replicas_carry_more_each_than_few() -> None:
    model = PrefillCapacity(TIMING)
    few, many = (model.need(Workload(rate, 1000), SLO).replicas for rate in (10, 100))
    assert many < 10 * few


def test_a_prompt_too_long_for_its_target_gets_a_fleet_that_keeps_up() -> None:
    need = PrefillCapacity(TIMING).need(Workload(1.0, 60_000), SLO)
    assert not need.meets_slo
    assert need.replicas * 1.0 > TIMING.prefill_s(60_000)


def test_cached_prompt_tokens_cost_nothing() -> None:
    model = PrefillCapacity(TIMING)
    assert model.need(Workload(50, 2000, cached_share=0.5), SLO) == model.need(Workload(50, 1000), SLO)


@given(st.floats(0.01, 100), st.floats(0.01, 100), st.floats(10, 8000), st.floats(1, 1000))
def test_more_load_never_needs_fewer(one: float, two: float, isl: float, osl: float) -> None:
    low, high = sorted((one, two))
    for model in (AggregatedCapacity(TIMING), PrefillCapacity(TIMING), DecodeCapacity(TIMING)):
        assert model.need(Workload(low, isl, osl), SLO).replicas <= model.need(Workload(high, isl, osl), SLO).replicas


def test_no_load_needs_nothing() -> None:
    for model in (AggregatedCapacity(TIMING), PrefillCapacity(TIMING), DecodeCapacity(TIMING), RateCapacity(1, 1)):
        assert model.need(Workload(0, 1000, 100), SLO).replicas == 0
    assert DecodeCapacity(TIMING).need(Workload(3, 1000, 0), SLO).replicas == 0


def test_learned_capacity_is_ready_when_its_steps_are() -> None:
    steps = StepRegression()
    model = LearnedCapacity(DecodeCapacity(steps), steps)
    assert not model.ready


@pytest.mark.parametrize(("rate", "replicas"), [(0.0, 0), (5.0, 1), (5.1, 2), (10.0, 2), (0.001, 1)])
def test_a_rate_is_exact_at_its_borders(rate: float, replicas: int) -> None:
    assert RateCapacity(10, 0.5).need(Workload(rate), SLO).replicas == replicas


def test_targets_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="percentile"):
        Slo(percentile=100)


def test_a_rate_keeps_its_reserve_for_bursts() -> None:
    model = RateCapacity(10, 0.8)
    assert model.need(Workload(20), Slo()).replicas == 3
    # Bursts of 19 fit two whole replicas; 16 expected fit their planned share.
    assert model.need(Workload(19, expected_s=16), Slo()).replicas == 2
    assert model.need(Workload(21, expected_s=16), Slo()).replicas == 3
    assert model.need(Workload(21, expected_s=16).plus(10), Slo()).replicas == 4
