from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_core.errors import ConfigurationError
from dynamo_planner._timing import AnalyticTiming, finite_or, transfer_s


def test_step_times_are_the_fitted_formulas() -> None:
    timing = AnalyticTiming()
    assert timing.prefill_s(1000) == pytest.approx((0.4209989 + 15.18344 + 16.50142) / 1000)
    assert timing.decode_at_s(0.5) == pytest.approx((-25.74 / 4 + 54.01 / 2 + 5.74) / 1000)
    assert timing.decode_s(10, timing.max_kv_tokens / 20) == timing.decode_at_s(0.5)


def test_long_prompts_take_several_steps() -> None:
    timing = AnalyticTiming(max_batched_tokens=1000)
    assert timing.prefill_s(2500) == pytest.approx(2 * timing.chunk_s(1000) + timing.chunk_s(500))
    assert timing.prefill_s(0) == 0.0


@given(st.floats(0, 2), st.floats(0, 2))
def test_a_fuller_cache_is_never_faster(one: float, two: float) -> None:
    timing = AnalyticTiming()
    low, high = sorted((one, two))
    assert timing.decode_at_s(low) <= timing.decode_at_s(high) + 1e-12


def test_speed_up_divides_and_must_be_positive() -> None:
    assert AnalyticTiming(speedup=2).prefill_s(500) == AnalyticTiming().prefill_s(500) / 2
    with pytest.raises(ConfigurationError, match="speedup=0"):
        AnalyticTiming(speedup=0)


def test_moving_a_cache_takes_its_size_over_the_bandwidth() -> None:
    assert transfer_s(1000, 131072, 64e9) == pytest.approx(0.002048)
    assert transfer_s(1000, 131072, 0) == 0.0
    assert (finite_or(math.nan, 3.0), finite_or(2.0, 3.0)) == (3.0, 2.0)
