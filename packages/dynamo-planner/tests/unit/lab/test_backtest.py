from __future__ import annotations

import numpy as np
import pytest

from dynamo_core.errors import ConfigurationError
from dynamo_planner._lab.backtest import backtest, installed, table
from dynamo_planner._predict.constant import ConstantPredictor
from dynamo_planner._predict.moving import MovingAveragePredictor
from dynamo_planner._predict.seasonal import SeasonalNaivePredictor

NOISE = np.random.default_rng(4).poisson(50, 400).astype(float)


def test_the_last_value_scores_one_and_a_mean_beats_it_on_noise() -> None:
    makers = {"constant": ConstantPredictor, "moving-average": MovingAveragePredictor}
    scores = {score.name: score for score in backtest(NOISE, horizon=2, quantile=0.9, makers=makers)}
    assert scores["constant"].mase == pytest.approx(1.0)
    assert scores["moving-average"].mase < 0.9
    assert scores["moving-average"].cost < scores["constant"].cost
    assert scores["moving-average"].coverage == pytest.approx(0.9, abs=0.05)


def test_options_reach_the_forecaster() -> None:
    series = 50 + 30 * np.sin(2 * np.pi * np.arange(300) / 20)
    [score] = backtest(
        series,
        horizon=1,
        quantile=0.9,
        makers={"seasonal-naive": SeasonalNaivePredictor},
        options={"seasonal-naive": {"period": 20}},
    )
    assert score.mase < 0.2


def test_every_installed_forecaster_is_scored_cheapest_first() -> None:
    scores = backtest(NOISE[:50], horizon=1, quantile=0.9)
    assert {score.name for score in scores} == set(installed()) >= {"constant", "kalman", "auto", "arima"}
    assert [score.cost for score in scores] == sorted(score.cost for score in scores)
    assert table(scores).count("\n") == 1 + len(scores)


def test_a_series_too_short_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="gives 5"):
        backtest(NOISE[:5], horizon=1, quantile=0.9)
