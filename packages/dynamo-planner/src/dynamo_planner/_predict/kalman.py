"""The Kalman filter of a local linear trend.

State (level, slope); each step the level grows by the slope, and both drift by their process noise. All matrices are
two by two, so they are written out.
"""

from __future__ import annotations

from dynamo_core.errors import ConfigurationError
from dynamo_planner._predict.series import SeriesPredictor

PRIOR_VARIANCE = 1000.0


class LocalLinearTrend:
    """Filter with fixed noise variances.

    Args:
        q_level: Drift variance of the level.
        q_trend: Drift variance of the slope.
        r: Variance of an observation.
        min_points: Below this many points the last value is the forecast.
    """

    def __init__(self, q_level: float, q_trend: float, r: float, min_points: int) -> None:
        self._q_level, self._q_trend, self._r = q_level, q_trend, r
        self._min_points = min_points
        self._level = self._slope = self._last = 0.0
        self._p00, self._p01, self._p11 = PRIOR_VARIANCE, 0.0, PRIOR_VARIANCE
        self._points = 0

    def update(self, value: float) -> None:
        """Predict one step, then correct by what was seen."""
        if self._points == 0:
            self._level = value
        level = self._level + self._slope
        p00 = self._p00 + 2 * self._p01 + self._p11 + self._q_level
        p01 = self._p01 + self._p11
        p11 = self._p11 + self._q_trend
        gain_level, gain_slope = p00 / (p00 + self._r), p01 / (p00 + self._r)
        surprise = value - level
        self._level = level + gain_level * surprise
        self._slope += gain_slope * surprise
        self._p00, self._p01, self._p11 = (1 - gain_level) * p00, (1 - gain_level) * p01, p11 - gain_slope * p01
        self._last = value
        self._points += 1

    def forecast(self, horizon: int) -> float:
        """Return level plus slope per step."""
        if self._points < self._min_points:
            return self._last
        return self._level + horizon * self._slope


class KalmanPredictor(SeriesPredictor):
    """Predicts by a Kalman filter of a local linear trend.

    Args:
        q_level: Drift variance of the level, above 0.
        q_trend: Drift variance of the slope, at least 0.
        r: Variance of an observation, above 0.
        min_points: Points before the filter is trusted.
        log1p: Model ``log(1 + x)``.

    Raises:
        ConfigurationError: if a variance is out of range.
    """

    def __init__(
        self, *, q_level: float = 1.0, q_trend: float = 0.1, r: float = 10.0, min_points: int = 5, log1p: bool = False
    ) -> None:
        if q_level <= 0 or q_trend < 0 or r <= 0:
            raise ConfigurationError(
                f"Kalman variances q_level={q_level}, q_trend={q_trend}, r={r} must be above 0 (q_trend at least 0)"
            )
        super().__init__(LocalLinearTrend(q_level, q_trend, r, min_points), log1p=log1p)
