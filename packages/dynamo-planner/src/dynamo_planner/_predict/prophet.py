"""Prophet, the only file that imports it (extra ``prophet``).

A fit takes tenths of a second, so the model is fitted anew only every few points; in between its forecast of those
points stands.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

from dynamo_core.errors import ConfigurationError
from dynamo_planner._predict.series import SeriesPredictor

MIN_POINTS = 10
LONGEST_HORIZON = 16
FOURIER_ORDER = 5
FIRST_DAY = "2000-01-01"


@dataclass(frozen=True)
class _Library:
    prophet: Any
    frames: Any


class ProphetModel:
    """Prophet on a window of points.

    Args:
        window: Points that it is fitted on.
        refit_every: Points between fits.
        period: Points in a season; 0 for none.

    Raises:
        ConfigurationError: if Prophet is not installed.
    """

    def __init__(self, window: int, refit_every: int, period: int) -> None:
        self._library = _library()
        self._values: deque[float] = deque(maxlen=window)
        self._refit_every = refit_every
        self._period = period
        # A season that was seen once may be anything else as well.
        self._fewest = max(MIN_POINTS, 2 * period)
        self._path: list[float] = []
        self._since_fit = 0

    def update(self, value: float) -> None:
        """Take the next value, fitting anew now and then."""
        self._values.append(value)
        self._since_fit += 1
        if len(self._values) >= self._fewest and (not self._path or self._since_fit >= self._refit_every):
            self._path = self._fitted() or self._path
            self._since_fit = 0

    def forecast(self, horizon: int) -> float:
        """Return the fit's forecast; the last value while there are too few points or no fit is found."""
        if not self._path:
            return self._values[-1]
        found = self._path[min(self._since_fit + horizon, len(self._path)) - 1]
        return found if math.isfinite(found) else self._values[-1]

    def _fitted(self) -> list[float]:
        """Return the forecast of all points up to the longest horizon before the next fit; nothing if none is found."""
        # A point is a day to Prophet, so that a season of so many points has a period of so many days.
        season = dict.fromkeys(("daily_seasonality", "weekly_seasonality", "yearly_seasonality"), False)
        model = self._library.prophet.Prophet(uncertainty_samples=0, **season)
        if self._period:
            model.add_seasonality("season", period=self._period, fourier_order=min(FOURIER_ORDER, self._period // 2))
        frames, count = self._library.frames, len(self._values)
        days = frames.date_range(FIRST_DAY, periods=count + self._refit_every + LONGEST_HORIZON, freq="D")
        try:
            model.fit(frames.DataFrame({"ds": days[:count], "y": list(self._values)}))
            return [float(value) for value in model.predict(frames.DataFrame({"ds": days[count:]}))["yhat"]]
        except (RuntimeError, ValueError):
            return []


def _library() -> _Library:
    try:
        import pandas
        import prophet  # pyright: ignore[reportMissingImports] # comes with the extra alone
    except ImportError as error:
        raise ConfigurationError(
            "forecaster 'prophet' needs Prophet; install it with: pip install 'dynamo-planner[prophet]'"
        ) from error
    return _Library(prophet, pandas)


class ProphetPredictor(SeriesPredictor):
    """Predicts by Prophet: a trend with change points, and a season if one is given.

    Args:
        window: Points that it is fitted on.
        refit_every: Points between fits.
        period: Points in a season; 0 for none.
        log1p: Model ``log(1 + x)``.

    Raises:
        ConfigurationError: if Prophet is not installed or an option is out of range.
    """

    keeps_phase = True

    def __init__(self, *, window: int = 200, refit_every: int = 10, period: int = 0, log1p: bool = False) -> None:
        if window < max(MIN_POINTS, 2 * period) or refit_every < 1 or period < 0 or period == 1:
            raise ConfigurationError(
                f"Prophet's window={window}, refit_every={refit_every} and period={period} must be at least "
                f"{MIN_POINTS} and two seasons, 1, and 2 (or 0 for none)"
            )
        super().__init__(ProphetModel(window, refit_every, period), log1p=log1p)
