"""The forecaster that expects the last value to last."""

from __future__ import annotations

import math


class ConstantPredictor:
    """Predicts the newest finite value; 0 before the first one."""

    def __init__(self) -> None:
        self._last = 0.0

    def observe(self, value: float) -> None:
        """Take the newest point; one that is not finite counts as missing."""
        if math.isfinite(value):
            self._last = max(value, 0.0)

    def predict(self, horizon: int = 1) -> float:
        """Return the last value, whatever the horizon."""
        return self._last
