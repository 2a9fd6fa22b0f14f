"""A forecaster: the median of the last points, which one burst does not move."""

from __future__ import annotations

import math
import statistics
from collections import deque


class MedianForecaster:
    """Predicts the median of the last ``window`` points."""

    def __init__(self, window: int = 9) -> None:
        self._points: deque[float] = deque(maxlen=window)

    def observe(self, value: float) -> None:
        """Add a point; one that is not finite counts as missing."""
        if math.isfinite(value):
            self._points.append(value)

    def predict(self, horizon: int = 1) -> float:
        """Return the median, for any horizon; 0 without data."""
        return max(0.0, statistics.median(self._points)) if self._points else 0.0
