"""The forecaster that expects the last value to last."""

from __future__ import annotations

from dynamo_planner._predict.series import SeriesPredictor


class LastValue:
    """The newest value, whatever the horizon."""

    def __init__(self) -> None:
        self._last = 0.0

    def update(self, value: float) -> None:
        """Take the next value."""
        self._last = value

    def forecast(self, horizon: int) -> float:
        """Return the last value."""
        return self._last


class ConstantPredictor(SeriesPredictor):
    """Predicts the newest finite value; 0 before the first one.

    Args:
        log1p: Model ``log(1 + x)``; changes the quantiles only.
    """

    def __init__(self, *, log1p: bool = False) -> None:
        super().__init__(LastValue(), log1p=log1p)
