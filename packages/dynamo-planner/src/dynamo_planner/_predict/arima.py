"""ARIMA through statsmodels, the only file that imports it (extra ``forecast``).

The order is chosen by corrected AIC among a few, with Hannan-Rissanen estimates, which take milliseconds where a
maximum-likelihood fit takes seconds. Between refits the coefficients stay and only the state moves on.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections import deque
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from dynamo_core.errors import ConfigurationError
from dynamo_planner._predict.series import MAX_LOG, SeriesPredictor

Floats: TypeAlias = npt.NDArray[np.float64]

ORDERS = ((1, 0, 0), (2, 0, 0), (1, 0, 1), (0, 1, 1), (1, 1, 0), (1, 1, 1))
MIN_POINTS = 20
REFIT_EVERY = 100
LONGEST_USUAL_HORIZON = 8
# The influence of older points on the errors fades geometrically; this many decide the forecast.
TAIL_POINTS = 60


class Fit(NamedTuple):
    """Coefficients of one fitted order."""

    difference: int
    mean: float
    ar: tuple[float, ...]
    ma: tuple[float, ...]


class Arima:
    """ARIMA with its order searched now and then.

    Args:
        window: Points the coefficients are fitted on.

    Raises:
        ConfigurationError: if statsmodels is not installed.
    """

    def __init__(self, window: int) -> None:
        self._estimators = _estimators()
        self._values: deque[float] = deque(maxlen=window)
        self._fit: Fit | None = None
        self._seen = 0
        self._path: list[float] = []

    def update(self, value: float) -> None:
        """Take the next value, refitting now and then."""
        self._values.append(value)
        self._path = []
        self._seen += 1
        if self._seen == MIN_POINTS or self._seen % REFIT_EVERY == 0:
            self._fit = self._search()

    def forecast(self, horizon: int) -> float:
        """Return the forecast; the last value while there are too few points or no order fits."""
        last = self._values[-1]
        if self._fit is None:
            return last
        if len(self._path) < horizon:
            self._path = _extend(list(self._values)[-TAIL_POINTS:], self._fit, max(horizon, LONGEST_USUAL_HORIZON))
        forecast = self._path[horizon - 1]
        return forecast if math.isfinite(forecast) and abs(forecast) < math.exp(MAX_LOG) else last

    def _search(self) -> Fit | None:
        values = np.asarray(self._values)
        if np.ptp(values) == 0:
            return None
        scored = [self._try(values, order) for order in ORDERS]
        best = min(scored, key=lambda item: item[0])
        return best[1] if math.isfinite(best[0]) else None

    def _try(self, values: Floats, order: tuple[int, int, int]) -> tuple[float, Fit | None]:
        ar_order, difference, ma_order = order
        series = np.diff(values, n=difference) if difference else values
        mean = float(series.mean()) if difference == 0 else 0.0
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found, _ = self._estimators.hannan_rissanen(series - mean, ar_order, ma_order, demean=False)
        except (ValueError, np.linalg.LinAlgError):
            return math.inf, None
        if not (found.is_stationary and found.is_invertible):
            return math.inf, None
        fit = Fit(difference, mean, tuple(map(float, found.ar_params)), tuple(map(float, found.ma_params)))
        return _corrected_aic(_residuals(series - mean, fit), ar_order + ma_order + 1, len(values)), fit


def _corrected_aic(residuals: Floats, parameters: int, points: int) -> float:
    variance = float(np.mean(residuals[-points + 2 :] ** 2))
    if variance <= 0 or not math.isfinite(variance):
        return math.inf
    penalty = 2 * parameters * (1 + (parameters + 1) / max(points - parameters - 1, 1))
    return points * math.log(variance) + penalty


def _residuals(series: Floats, fit: Fit) -> Floats:
    """Return the one-step errors of a zero-mean ARMA, taking errors before the start as 0."""
    errors: list[float] = []
    values: list[float] = series.tolist()
    for step, value in enumerate(values):
        expected = sum(weight * values[step - lag] for lag, weight in enumerate(fit.ar, 1) if lag <= step)
        expected += sum(weight * errors[step - lag] for lag, weight in enumerate(fit.ma, 1) if lag <= step)
        errors.append(value - expected)
    return np.asarray(errors)


def _extend(tail: list[float], fit: Fit, horizon: int) -> list[float]:
    """Return the forecasts of all horizons up to this one."""
    values = np.asarray(tail)
    series = (np.diff(values) if fit.difference else values) - fit.mean
    errors: list[float] = _residuals(series, fit).tolist()
    known: list[float] = series.tolist()
    path: list[float] = []
    for _ in range(horizon):
        step = sum(weight * known[-lag] for lag, weight in enumerate(fit.ar, 1) if lag <= len(known))
        step += sum(weight * errors[-lag] for lag, weight in enumerate(fit.ma, 1) if lag <= len(errors))
        known.append(step)
        errors.append(0.0)
        before = (path[-1] if path else tail[-1]) if fit.difference else fit.mean
        path.append(before + step)
    return path


def _estimators() -> Any:
    try:
        return importlib.import_module("statsmodels.tsa.arima.estimators.hannan_rissanen")
    except ImportError as error:
        raise ConfigurationError(
            "forecaster 'arima' needs statsmodels; install it with: pip install 'dynamo-planner[forecast]'"
        ) from error


class ArimaPredictor(SeriesPredictor):
    """Predicts by an ARIMA model of searched order.

    Args:
        window: Points the model is fitted on.
        log1p: Model ``log(1 + x)``.

    Raises:
        ConfigurationError: if statsmodels is not installed or the window is too short.
    """

    def __init__(self, *, window: int = 500, log1p: bool = False) -> None:
        if window < MIN_POINTS:
            raise ConfigurationError(f"ARIMA window {window} is below {MIN_POINTS}; raise it")
        super().__init__(Arima(window), log1p=log1p)
