"""The forecaster that expects the recent mean."""

from __future__ import annotations

from collections import deque

from dynamo_core.errors import ConfigurationError
from dynamo_planner._predict.series import SeriesPredictor


class WindowMean:
    """Mean of the last values."""

    def __init__(self, window: int) -> None:
        self._values: deque[float] = deque(maxlen=window)

    def update(self, value: float) -> None:
        """Take the next value."""
        self._values.append(value)

    def forecast(self, horizon: int) -> float:
        """Return the mean."""
        # Summed afresh: a running sum would keep the rounding error of every value that ever passed.
        return sum(self._values) / len(self._values)


class MovingAveragePredictor(SeriesPredictor):
    """Predicts the mean of the last ``window`` values.

    Args:
        window: Values averaged.
        log1p: Average ``log(1 + x)``, so that a single burst weighs less.

    Raises:
        ConfigurationError: if the window is empty.
    """

    def __init__(self, *, window: int = 6, log1p: bool = False) -> None:
        if window < 1:
            raise ConfigurationError(f"moving-average window {window} is below 1; give the number of points to average")
        super().__init__(WindowMean(window), log1p=log1p)
