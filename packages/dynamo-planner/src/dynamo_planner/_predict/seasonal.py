"""The forecaster that expects what was one season ago."""

from __future__ import annotations

from collections import deque

from dynamo_core.errors import ConfigurationError
from dynamo_planner._predict.series import SeriesPredictor

LEVEL_POINTS = 5


class SeasonAgo:
    """The value one season ago, shifted by how much the level has changed since; before that, the last value."""

    def __init__(self, period: int) -> None:
        self._period = period
        self._values: deque[float] = deque(maxlen=2 * period + LEVEL_POINTS)

    def update(self, value: float) -> None:
        """Take the next value."""
        self._values.append(value)

    def forecast(self, horizon: int) -> float:
        """Return last season's value at that phase, corrected for level."""
        values = self._values
        if len(values) < self._period + LEVEL_POINTS:
            return values[-1]
        phase = (horizon - 1) % self._period
        return values[len(values) - self._period + phase] + self._shift()

    def _shift(self) -> float:
        """Mean change against one season ago over the newest points."""
        newest = len(self._values) - 1
        pairs = [(newest - back, newest - back - self._period) for back in range(LEVEL_POINTS)]
        return sum(self._values[now] - self._values[then] for now, then in pairs) / LEVEL_POINTS


class SeasonalNaivePredictor(SeriesPredictor):
    """Predicts last season's value, level-corrected.

    Args:
        period: Points in a season.
        log1p: Model ``log(1 + x)``: the level correction becomes a factor.

    Raises:
        ConfigurationError: if a season is shorter than two points.
    """

    keeps_phase = True

    def __init__(self, *, period: int = 288, log1p: bool = False) -> None:
        if period < 2:
            raise ConfigurationError(f"season of {period} points is below 2; give the points between two like moments")
        super().__init__(SeasonAgo(period), log1p=log1p)
