from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest

from dynamo_core import plugins
from dynamo_core.errors import ConfigurationError, InvalidRequestError
from dynamo_core.planning import LoadPredictor, SupportsQuantiles
from dynamo_core.testing import LoadPredictorConformance
from dynamo_planner import ConstantPredictor
from dynamo_planner._predict.arima import ArimaPredictor
from dynamo_planner._predict.auto import AutoPredictor
from dynamo_planner._predict.holtwinters import HoltWintersPredictor
from dynamo_planner._predict.kalman import KalmanPredictor
from dynamo_planner._predict.moving import MovingAveragePredictor
from dynamo_planner._predict.seasonal import SeasonalNaivePredictor
from dynamo_planner._predict.series import SeriesPredictor, warm_up

NAMES = ["arima", "auto", "constant", "holt-winters", "kalman", "moving-average", "seasonal-naive"]


class TestConstant(LoadPredictorConformance):
    def make_predictor(self) -> LoadPredictor:
        return ConstantPredictor()


class TestMovingAverage(LoadPredictorConformance):
    def make_predictor(self) -> LoadPredictor:
        return MovingAveragePredictor(log1p=True)


class TestHoltWinters(LoadPredictorConformance):
    def make_predictor(self) -> LoadPredictor:
        return HoltWintersPredictor(period=7)


class TestSeasonalNaive(LoadPredictorConformance):
    def make_predictor(self) -> LoadPredictor:
        return SeasonalNaivePredictor(period=6, log1p=True)


class TestKalman(LoadPredictorConformance):
    def make_predictor(self) -> LoadPredictor:
        return KalmanPredictor()


class TestArima(LoadPredictorConformance):
    def make_predictor(self) -> LoadPredictor:
        return ArimaPredictor()


class TestAuto(LoadPredictorConformance):
    def make_predictor(self) -> LoadPredictor:
        return AutoPredictor(period=6)


def fed(predictor: SeriesPredictor | AutoPredictor, values: list[float]) -> SeriesPredictor | AutoPredictor:
    for value in values:
        predictor.observe(value)
    return predictor


def error_over(make: Callable[[], LoadPredictor], values: list[float]) -> float:
    predictor, errors = make(), []
    for value in values:
        errors.append(abs(value - predictor.predict()))
        predictor.observe(value)
    return float(np.mean(errors[len(errors) // 2 :]))


@pytest.mark.parametrize("name", NAMES)
def test_every_forecaster_is_an_entry_point_with_quantiles(name: str) -> None:
    predictor = plugins.load("load_predictors", name)(log1p=True)
    assert isinstance(predictor, LoadPredictor)
    assert isinstance(predictor, SupportsQuantiles)
    assert predictor.predict_quantile(0.9) == 0.0
    for quantile in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(InvalidRequestError, match="between 0 and 1"):
            predictor.predict_quantile(quantile)


def test_zeros_before_the_first_traffic_do_not_count() -> None:
    late, prompt = MovingAveragePredictor(window=4), MovingAveragePredictor(window=4)
    fed(late, [0.0, 0.0, 0.0, 8.0])
    fed(prompt, [8.0])
    assert late.predict() == prompt.predict() == 8.0
    fed(late, [0.0])
    assert late.predict() == 4.0


@pytest.mark.parametrize("log1p", [False, True])
def test_quantiles_cover_what_they_promise(log1p: bool) -> None:
    random = np.random.default_rng(7)
    predictor = MovingAveragePredictor(window=12, log1p=log1p)
    below = {0.5: 0, 0.9: 0}
    values = random.poisson(40, 1200).tolist()
    for step, value in enumerate(values):
        if step >= 200:
            for quantile in below:
                below[quantile] += value <= predictor.predict_quantile(quantile)
        predictor.observe(value)
    assert below[0.5] / 1000 == pytest.approx(0.5, abs=0.07)
    assert below[0.9] / 1000 == pytest.approx(0.9, abs=0.04)


def test_a_constant_series_has_no_spread_and_a_longer_horizon_a_wider_one() -> None:
    assert fed(KalmanPredictor(), [30.0] * 80).predict_quantile(0.99) == pytest.approx(30.0, rel=0.02)
    walk = np.cumsum(np.random.default_rng(3).normal(0, 1, 400)) + 100
    predictor = fed(ConstantPredictor(), walk.tolist())
    spreads = [predictor.predict_quantile(0.95, horizon) - predictor.predict(horizon) for horizon in (1, 4, 8)]
    assert spreads == sorted(spreads)
    assert spreads[0] < spreads[-1]


def test_kalman_follows_a_ramp_that_a_mean_lags() -> None:
    ramp = [float(5 * step) for step in range(80)]
    kalman, mean = fed(KalmanPredictor(), ramp), fed(MovingAveragePredictor(), ramp)
    assert kalman.predict(4) == pytest.approx(5 * 83, rel=0.02)
    assert mean.predict(4) < 400 - 10


def test_kalman_is_the_last_value_before_its_fewest_points() -> None:
    predictor = fed(KalmanPredictor(min_points=5), [10.0, 20.0, 30.0, 40.0])
    assert predictor.predict(3) == 40.0
    predictor.observe(50.0)
    assert predictor.predict(1) > 50.0


def test_holt_winters_damps_a_trend_that_cannot_go_on() -> None:
    predictor = fed(HoltWintersPredictor(), [float(10 * step) for step in range(60)])
    far, further = predictor.predict(50), predictor.predict(100)
    assert 590 < far < 590 + 50 * 10
    assert further - far < 100


def test_seasonal_forecasters_beat_the_last_value_on_a_season() -> None:
    day = [50 + 40 * math.sin(2 * math.pi * step / 24) for step in range(24 * 12)]
    naive = error_over(ConstantPredictor, day)
    assert error_over(lambda: SeasonalNaivePredictor(period=24), day) < naive / 10
    assert error_over(lambda: HoltWintersPredictor(period=24), day) < naive / 2


def test_a_missing_point_does_not_shift_the_season() -> None:
    day = [10.0, 20.0, 30.0, 40.0] * 6
    whole, holed = SeasonalNaivePredictor(period=4), SeasonalNaivePredictor(period=4)
    fed(whole, day)
    fed(holed, [*day[:14], math.nan, *day[15:]])
    assert [holed.predict(step) for step in (1, 2, 3, 4)] == [whole.predict(step) for step in (1, 2, 3, 4)]


def test_arima_finds_the_autoregression_that_others_miss() -> None:
    random = np.random.default_rng(11)
    values, level = [], 0.0
    for _ in range(500):
        level = -0.8 * level + random.normal(0, 5)
        values.append(100 + level)
    assert error_over(ArimaPredictor, values) < 0.75 * error_over(MovingAveragePredictor, values)


def test_arima_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "statsmodels.tsa.arima.estimators", None)
    with pytest.raises(ConfigurationError, match=r"dynamo-planner\[forecast\]"):
        ArimaPredictor()
    assert "arima" not in AutoPredictor().candidates


def test_auto_picks_what_fits_the_series_and_stays_with_it() -> None:
    day = [50 + 40 * math.sin(2 * math.pi * step / 24) for step in range(24 * 10)]
    predictor = AutoPredictor(period=24)
    chosen = []
    for value in day:
        predictor.observe(value)
        chosen.append(predictor.chosen)
    assert error_over(lambda: AutoPredictor(period=24), day) < error_over(ConstantPredictor, day) / 2
    assert sum(one != two for one, two in itertools.pairwise(chosen[100:])) <= 2


def test_auto_over_500_points_costs_less_than_a_decision_may() -> None:
    values = (np.random.default_rng(1).poisson(60, 500) + 20 * np.sin(np.arange(500) / 40)).tolist()
    predictor = AutoPredictor(period=48)
    costs = []
    for value in values:
        before = time.process_time()
        predictor.observe(value)
        predictor.predict_quantile(0.9, 4)
        costs.append(time.process_time() - before)
    # The median is the cost of a decision; refits and selections are rare and are measured by the benchmark.
    assert np.median(costs) < 0.05


def test_a_warm_start_forecasts_from_history() -> None:
    predictor = MovingAveragePredictor(window=3)
    warm_up(predictor, [3.0, 6.0, 9.0])
    assert predictor.predict() == 6.0


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: MovingAveragePredictor(window=0), "window"),
        (lambda: SeasonalNaivePredictor(period=1), "season"),
        (lambda: HoltWintersPredictor(period=1), "season"),
        (lambda: HoltWintersPredictor(window=3), "window"),
        (lambda: KalmanPredictor(r=0), "variances"),
        (lambda: ArimaPredictor(window=3), "window"),
        (lambda: AutoPredictor(candidates={}), "candidates"),
    ],
)
def test_bad_options_name_the_field(make: Callable[[], LoadPredictor], field: str) -> None:
    with pytest.raises(ConfigurationError, match=field):
        make()


def test_prophet_without_its_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prophet", None)
    with pytest.raises(ConfigurationError, match=r"dynamo-planner\[prophet\]"):
        plugins.load("load_predictors", "prophet")()
    with pytest.raises(ConfigurationError, match="window=3"):
        plugins.load("load_predictors", "prophet")(window=3)
