"""The envelope of bursts: what is planned above a forecast."""

from __future__ import annotations

import numpy as np
import pytest

from dynamo_planner._burst import BurstEnvelope


def fed(demands: list[float], point: float, *, slack_s: float = 0.0, quantile: float = 0.95) -> BurstEnvelope:
    envelope = BurstEnvelope(quantile, 10.0, slack_s)
    for demand in demands:
        envelope.observe(demand)
        envelope.issue(point, 1)
    return envelope


def noisy(count: int = 200) -> list[float]:
    return [float(value) for value in np.random.default_rng(3).normal(100.0, 15.0, count)]


def test_without_errors_the_forecast_is_planned() -> None:
    assert fed([100.0] * 5, 90.0).planned(90.0) == 90.0


def test_what_is_planned_covers_its_share_of_the_windows() -> None:
    demands = noisy()
    planned = fed(demands, 100.0).planned(100.0)
    assert planned > 100
    assert np.mean(np.asarray(demands) <= planned) == pytest.approx(0.95, abs=0.03)


def test_a_queue_that_may_wait_absorbs_short_bursts_and_not_a_lasting_surplus() -> None:
    demands = noisy()
    patient = fed(demands, 100.0, slack_s=30.0).planned(100.0)
    assert patient < fed(demands, 100.0).planned(100.0) - 5
    # Every window is above its forecast, so no wait is long enough to make up for it.
    lasting = fed([value + 50 for value in demands], 100.0, slack_s=30.0).planned(100.0)
    assert lasting > 134


def test_no_room_is_kept_for_another_step() -> None:
    calm = [100.0 + place % 3 for place in range(100)]
    stepped = fed([*calm, 900.0, 900.0, *calm[:20]], 100.0).planned(100.0)
    assert stepped <= 100 + 6 * np.sqrt(100 / 10)


def test_errors_survive_a_change_of_the_start_up_time() -> None:
    envelope = fed(noisy(), 100.0)
    before = envelope.planned(100.0)
    envelope.issue(100.0, 4)
    assert envelope.planned(100.0) == before


def test_errors_of_a_busy_hour_are_small_in_a_quiet_one() -> None:
    busy = fed(noisy(), 100.0)
    above = busy.planned(100.0) - 100
    assert busy.planned(1.0) - 1 == pytest.approx(above / 10, rel=0.01)
