"""The forecaster that picks among the others by how they did on this very series."""

from __future__ import annotations

from collections.abc import Mapping

from dynamo_core.errors import ConfigurationError
from dynamo_planner._predict.arima import ArimaPredictor
from dynamo_planner._predict.constant import ConstantPredictor
from dynamo_planner._predict.holtwinters import HoltWintersPredictor
from dynamo_planner._predict.kalman import KalmanPredictor
from dynamo_planner._predict.moving import MovingAveragePredictor
from dynamo_planner._predict.seasonal import SeasonalNaivePredictor
from dynamo_planner._predict.series import SeriesPredictor

RESELECT_EVERY = 20
MUST_BE_BETTER_BY = 0.05
LONG_WINDOW = 30


class AutoPredictor:
    """Runs the candidates side by side and forecasts with the one whose own forecasts erred least.

    The comparison is a rolling-origin one: every candidate's error is that of forecasts it made before the value was
    known. The choice is looked at every twenty points and changes only for a clear gain, so that it does not flap.

    Args:
        horizon: Horizon the errors are compared at; the one that was asked for last if omitted.
        period: Points in a season, for the seasonal candidates; 0 for none.
        log1p: Model ``log(1 + x)``.
        candidates: Forecasters to choose from, by name; all that are installed if omitted.

    Raises:
        ConfigurationError: if there is no candidate.
    """

    def __init__(
        self,
        *,
        horizon: int | None = None,
        period: int = 0,
        log1p: bool = False,
        candidates: Mapping[str, SeriesPredictor] | None = None,
    ) -> None:
        self.candidates = _installed(period, log1p) if candidates is None else dict(candidates)
        if not self.candidates:
            raise ConfigurationError("forecaster 'auto' has no candidates; name at least one")
        self._horizon = horizon
        self._asked_horizon = 1
        self._points = 0
        self.chosen = next(iter(self.candidates))

    def observe(self, value: float) -> None:
        """Give the point to every candidate; now and then look whether another does better."""
        for candidate in self.candidates.values():
            candidate.observe(value)
        self._points += 1
        if self._points % RESELECT_EVERY == 0:
            self._select()

    def predict(self, horizon: int = 1) -> float:
        """Return the chosen candidate's forecast."""
        self._asked_horizon = horizon
        return self.candidates[self.chosen].predict(horizon)

    def predict_quantile(self, quantile: float, horizon: int = 1) -> float:
        """Return the chosen candidate's quantile.

        Raises:
            InvalidRequestError: if the quantile is not between 0 and 1.
        """
        return self.candidates[self.chosen].predict_quantile(quantile, horizon)

    def _select(self) -> None:
        horizon = self._asked_horizon if self._horizon is None else self._horizon
        errors = {name: candidate.mean_error(horizon) for name, candidate in self.candidates.items()}
        best = min(errors, key=lambda name: errors[name])
        if errors[best] < errors[self.chosen] * (1 - MUST_BE_BETTER_BY):
            self.chosen = best


def _installed(period: int, log1p: bool) -> dict[str, SeriesPredictor]:
    found: dict[str, SeriesPredictor] = {
        "constant": ConstantPredictor(log1p=log1p),
        "moving-average": MovingAveragePredictor(log1p=log1p),
        "moving-average-long": MovingAveragePredictor(window=LONG_WINDOW, log1p=log1p),
        "holt-winters": HoltWintersPredictor(log1p=log1p),
        "kalman": KalmanPredictor(log1p=log1p),
    }
    if period:
        found["seasonal-naive"] = SeasonalNaivePredictor(period=period, log1p=log1p)
    try:
        found["arima"] = ArimaPredictor(log1p=log1p)
    except ConfigurationError:
        # Without the extra the others remain; `auto` promises the best of what is installed.
        return found
    return found
