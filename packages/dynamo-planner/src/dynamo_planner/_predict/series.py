"""What all forecasters share: which points count, the log transform, and conformal quantiles.

A forecaster keeps the errors of the forecasts it really made, at several horizons. Their empirical quantiles, with the
finite-sample correction of split conformal prediction, turn any point forecast into a quantile without a
distributional assumption, and their mean is a rolling-origin score that costs nothing extra.
"""

from __future__ import annotations

import math
from collections import deque
from typing import ClassVar, Protocol

from dynamo_core.errors import InvalidRequestError

TRACKED_HORIZONS = (1, 2, 4, 8, 16)
ERRORS_KEPT = 256
FEWEST_ERRORS = 10
MAX_LOG = 700.0


class PointModel(Protocol):
    """One model of a series, fed only finite values."""

    def update(self, value: float) -> None:
        """Take the next value."""
        ...

    def forecast(self, horizon: int) -> float:
        """Return the value expected ``horizon`` steps ahead. Changes nothing."""
        ...


class SeriesPredictor:
    """A point model behind the rules every forecaster keeps.

    Values that are not finite are missing, negative ones are 0, and zeros before the first traffic are dropped, since
    they say when the service was started rather than how its load behaves. Forecasts are never negative.

    Args:
        model: The point model.
        log1p: Model ``log(1 + x)``; steadier for series that grow by factors.
    """

    keeps_phase: ClassVar[bool] = False
    """Whether a missing value is filled with the forecast, so that a season does not shift."""

    def __init__(self, model: PointModel, *, log1p: bool = False) -> None:
        self._model = model
        self._log1p = log1p
        self._pending: dict[int, deque[float]] = {step: deque(maxlen=step) for step in TRACKED_HORIZONS}
        self._errors: dict[int, deque[float]] = {step: deque(maxlen=ERRORS_KEPT) for step in TRACKED_HORIZONS}
        self.points = 0

    def observe(self, value: float) -> None:
        """Take the newest point; one that is not finite counts as missing."""
        if math.isfinite(value):
            if self.points or value > 0:
                self._take(max(value, 0.0))
        elif self.keeps_phase and self.points:
            self._model.update(self._model.forecast(1))

    def predict(self, horizon: int = 1) -> float:
        """Return the forecast ``horizon`` intervals ahead; 0 without data."""
        return self._back(self._raw(horizon)) if self.points else 0.0

    def predict_quantile(self, quantile: float, horizon: int = 1) -> float:
        """Return the value that the series stays below with this probability, ``horizon`` intervals ahead.

        Raises:
            InvalidRequestError: if the quantile is not between 0 and 1.
        """
        if not 0 < quantile < 1:
            raise InvalidRequestError(f"quantile {quantile} is not between 0 and 1; give for example 0.9")
        if not self.points:
            return 0.0
        return self._back(self._raw(horizon) + self._error_quantile(quantile, horizon))

    def mean_error(self, horizon: int = 1) -> float:
        """Mean absolute error of the forecasts made so far at the nearest tracked horizon; infinite before any."""
        errors = self._errors[_tracked(horizon)]
        return sum(map(abs, errors)) / len(errors) if errors else math.inf

    def _take(self, value: float) -> None:
        modelled = math.log1p(value) if self._log1p else value
        for step, issued in self._pending.items():
            if len(issued) == step:
                self._errors[step].append(modelled - issued[0])
        self._model.update(modelled)
        self.points += 1
        for step, issued in self._pending.items():
            issued.append(self._raw(step))

    def _raw(self, horizon: int) -> float:
        forecast = self._model.forecast(max(1, horizon))
        return forecast if math.isfinite(forecast) else 0.0

    def _error_quantile(self, quantile: float, horizon: int) -> float:
        errors = sorted(self._errors[_tracked(horizon)])
        rank = math.ceil((len(errors) + 1) * quantile)
        # So few errors bound no such quantile; the largest of three would only echo the last surprise.
        return errors[rank - 1] if max(rank, FEWEST_ERRORS) <= len(errors) else 0.0

    def _back(self, modelled: float) -> float:
        value = math.expm1(min(modelled, MAX_LOG)) if self._log1p else modelled
        return max(value, 0.0)


def warm_up(predictor: SeriesPredictor, values: list[float]) -> None:
    """Feed a recorded series, so that the first live forecast already rests on history."""
    for value in values:
        predictor.observe(value)


def _tracked(horizon: int) -> int:
    """Return the shortest tracked horizon that is at least this long: its errors are the honest ones."""
    return next((step for step in TRACKED_HORIZONS if step >= horizon), TRACKED_HORIZONS[-1])
