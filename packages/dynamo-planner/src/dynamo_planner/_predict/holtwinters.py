"""Exponential smoothing with a damped trend and an additive season, after Holt, Winters and Gardner."""

from __future__ import annotations

from collections import deque
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dynamo_core.errors import ConfigurationError
from dynamo_planner._predict.series import SeriesPredictor

Floats: TypeAlias = npt.NDArray[np.float64]

REFIT_EVERY = 25
FIRST_FIT = 10
_GRID = np.array(
    [(alpha, beta, phi) for alpha in (0.1, 0.3, 0.6, 0.9) for beta in (0.02, 0.1, 0.3) for phi in (0.8, 0.95)]
)
_SEASON_RATE = 0.2


class DampedTrend:
    """Level, damped slope and season; the smoothing rates are the grid's best on the window, refitted rarely.

    Args:
        period: Points in a season; 0 for none.
        window: Points kept for refitting.
    """

    def __init__(self, period: int, window: int) -> None:
        self._values: deque[float] = deque(maxlen=max(window, 2 * period))
        self._period = period
        self._alpha, self._beta, self._phi = 0.6, 0.1, 0.8
        self._level = self._slope = 0.0
        self._season = [0.0] * max(period, 1)
        self._step = 0

    def update(self, value: float) -> None:
        """Take the next value."""
        self._values.append(value)
        if self._step == 0:
            self._level = value
        self._smooth(value)
        self._step += 1
        if self._period and self._step == 2 * self._period:
            self._start_season()
        if self._step == FIRST_FIT or self._step % REFIT_EVERY == 0:
            self._refit()

    def forecast(self, horizon: int) -> float:
        """Return level, damped slope and season ``horizon`` steps ahead."""
        damped = self._phi * (1 - self._phi**horizon) / (1 - self._phi)
        return self._level + damped * self._slope + self._season[(self._step + horizon - 1) % len(self._season)]

    def _smooth(self, value: float) -> None:
        phase = self._step % len(self._season)
        expected = self._level + self._phi * self._slope
        level = self._alpha * (value - self._season[phase]) + (1 - self._alpha) * expected
        self._slope = self._beta * (level - self._level) + (1 - self._beta) * self._phi * self._slope
        self._level = level
        if self._period and self._step >= 2 * self._period:
            self._season[phase] += _SEASON_RATE * (value - level - self._season[phase])

    def _start_season(self) -> None:
        """Split the first two seasons into level, slope and season; one alone cannot be told from a trend."""
        seasons = np.asarray(self._values)[-2 * self._period :].reshape(2, self._period)
        means = seasons.mean(axis=1, keepdims=True)
        self._season = (seasons - means).mean(axis=0).tolist()
        self._level, self._slope = float(means[1, 0]), 0.0

    def _refit(self) -> None:
        values = np.asarray(self._values) - self._seasons_of_window()
        best = _best_of_grid(values)
        self._alpha, self._beta, self._phi = (float(rate) for rate in _GRID[best])
        level, slope = _run(values, _GRID[best : best + 1])[:2]
        self._level, self._slope = float(level[0]), float(slope[0])

    def _seasons_of_window(self) -> Floats:
        first = self._step - len(self._values)
        phases = (first + np.arange(len(self._values))) % len(self._season)
        return np.asarray(self._season)[phases]


def _best_of_grid(values: Floats) -> int:
    return int(np.argmin(_run(values, _GRID)[2]))


def _run(values: Floats, grid: npt.NDArray[Any]) -> tuple[Floats, Floats, Floats]:
    """Smooth the values with every row of rates at once; return levels, slopes and squared errors."""
    alpha, beta, phi = grid.T
    level = np.full(len(grid), values[0])
    slope = np.zeros(len(grid))
    squared = np.zeros(len(grid))
    for value in values[1:]:
        error = value - level - phi * slope
        squared += error * error
        level = level + phi * slope + alpha * error
        slope = phi * slope + alpha * beta * error
    return level, slope, squared


class HoltWintersPredictor(SeriesPredictor):
    """Predicts by damped-trend exponential smoothing.

    Args:
        period: Points in a season; 0 for none.
        window: Points the rates are fitted on.
        log1p: Model ``log(1 + x)``: trend and season become factors.

    Raises:
        ConfigurationError: for a season of one point or a window below ten.
    """

    keeps_phase = True

    def __init__(self, *, period: int = 0, window: int = 500, log1p: bool = False) -> None:
        if period == 1 or period < 0:
            raise ConfigurationError(f"Holt-Winters season of {period} points; give 0 for none or at least 2")
        if window < FIRST_FIT:
            raise ConfigurationError(f"Holt-Winters window {window} is below {FIRST_FIT}; raise it")
        super().__init__(DampedTrend(period, window), log1p=log1p)
