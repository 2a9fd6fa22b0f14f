"""The Prophet forecaster on the real library: ``dyn slow prophet`` installs it and runs this file."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dynamo_core import plugins
from dynamo_core.planning import LoadPredictor, SupportsQuantiles
from dynamo_core.testing import LoadPredictorConformance
from dynamo_planner._lab.backtest import backtest, installed
from dynamo_planner._predict.constant import ConstantPredictor
from dynamo_planner._predict.prophet import ProphetModel, ProphetPredictor

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class TestProphet(LoadPredictorConformance):
    def make_predictor(self) -> LoadPredictor:
        return ProphetPredictor()


def test_it_is_found_by_name_with_quantiles() -> None:
    predictor = plugins.load("load_predictors", "prophet")(log1p=True)
    assert isinstance(predictor, SupportsQuantiles)
    assert "prophet" in installed()


def test_a_trend_is_continued() -> None:
    predictor = ProphetPredictor()
    for step in range(60):
        predictor.observe(100.0 + 2.0 * step)
    assert predictor.predict(8) == pytest.approx(100 + 2 * 67, rel=0.05)


def test_a_season_is_learned_and_beats_the_last_value() -> None:
    series = 100 + 50 * np.sin(2 * np.pi * np.arange(200) / 24) + np.random.default_rng(5).normal(0, 3, 200)
    makers = {"constant": ConstantPredictor, "prophet": ProphetPredictor}
    scores = backtest(series, horizon=4, quantile=0.9, makers=makers, options={"prophet": {"period": 24}})
    # The first two seasons, in which nothing is known, count too.
    mase = {score.name: score.mase for score in scores}
    assert mase["prophet"] < 0.9 * mase["constant"]
    predictor, errors = ProphetPredictor(period=24), []
    for place, value in enumerate(series.tolist()):
        if place >= 96:
            errors.append(abs(value - predictor.predict(1)))
        predictor.observe(value)
    assert np.mean(errors) < 0.5 * np.mean(np.abs(np.diff(series[96:])))


def test_a_fit_that_fails_leaves_the_last_value() -> None:
    model = ProphetModel(window=50, refit_every=5, period=0)
    for _ in range(30):
        model.update(math.inf)
    assert model.forecast(1) == math.inf
    again = ProphetPredictor()
    for _ in range(30):
        again.observe(7.0)
    assert again.predict(3) == pytest.approx(7.0, rel=0.05)
