from __future__ import annotations

import math

import numpy as np
import pytest

from dynamo_core.errors import ConfigurationError
from dynamo_core.ids import WorkerId
from dynamo_core.load import ForwardPassMetrics, ScheduledStats
from dynamo_planner._regress import StepRegression


def one_pass(wall_s: float, prefill: int = 0, requests: int = 0, kv_tokens: int = 0) -> ForwardPassMetrics:
    done = ScheduledStats(sum_prefill_tokens=prefill, num_decode_requests=requests, sum_decode_kv_tokens=kv_tokens)
    return ForwardPassMetrics(WorkerId(1), wall_s, done)


def taught(noise: float = 0.0, count: int = 200) -> StepRegression:
    random = np.random.default_rng(5)
    regression = StepRegression(max_samples=256)
    for _ in range(count):
        prefill, requests = int(random.integers(0, 4000)), int(random.integers(1, 64))
        kv_tokens = requests * int(random.integers(100, 4000))
        wall = 0.004 + 2e-5 * prefill + 1e-4 * requests + 3e-8 * kv_tokens + random.normal(0, noise)
        regression.observe(one_pass(wall, prefill, requests, kv_tokens))
    return regression


def test_it_recovers_the_law_that_made_the_samples() -> None:
    regression = taught()
    assert regression.ready
    assert regression.prefill_s(1000) == pytest.approx(0.004 + 0.02, rel=1e-6)
    assert regression.decode_s(32, 1000) == pytest.approx(0.004 + 0.0032 + 0.00096, rel=1e-6)
    assert regression.step_s(100, 2, 500) == pytest.approx(0.004 + 0.002 + 0.0002 + 0.000015, rel=1e-6)
    assert regression.error_s < 1e-9


def test_its_error_is_that_of_its_samples() -> None:
    assert taught(noise=0.001).error_s == pytest.approx(0.001, rel=0.2)


def test_before_enough_samples_it_does_not_answer() -> None:
    regression = taught(count=10)
    assert (regression.ready, regression.error_s, regression.prefill_s(100)) == (False, math.inf, 0.0)


def test_heartbeats_and_nonsense_are_left_out() -> None:
    regression = taught()
    before = regression.prefill_s(500)
    for wall in (0.0, math.nan, math.inf, -1.0):
        regression.observe(one_pass(wall, 100))
    regression.observe(one_pass(0.1, -5))
    assert regression.prefill_s(500) == before


def test_work_that_takes_less_time_the_more_it_is_makes_no_model() -> None:
    regression = StepRegression()
    for prefill in range(10, 60):
        regression.observe(one_pass(1.0 / prefill, prefill))
    assert not regression.ready


def test_a_steady_load_does_not_push_out_what_other_loads_taught() -> None:
    regression = taught(count=60)
    before = regression.prefill_s(3500)
    for _ in range(2000):
        regression.observe(one_pass(0.004 + 2e-5 * 10, 10))
    assert regression.prefill_s(3500) == pytest.approx(before, rel=0.01)


def test_more_is_kept_than_needed() -> None:
    with pytest.raises(ConfigurationError, match="keeps 8 and needs 16"):
        StepRegression(max_samples=8)
