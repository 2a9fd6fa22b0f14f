"""Forecasts of the four series that make a workload."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from dynamo_core.planning import LoadPredictor, SupportsQuantiles
from dynamo_planner._capacity import Workload
from dynamo_planner._observe import TrafficWindow

MAX_HORIZON = 8


@dataclass(frozen=True)
class Forecast:
    """What the next start-up's time will bring.

    Attributes:
        workload: With the request rate at the planning quantile.
        requests_s: Point forecast of the request rate.
        horizon: Windows ahead.
    """

    workload: Workload
    requests_s: float
    horizon: int


class WorkloadForecaster:
    """One forecaster for each of request rate, prompt length, output length and cached share.

    Args:
        make: Makes a forecaster.
        quantile: Quantile of the request rate to plan for; forecasters without quantiles give their point.
        window_s: Seconds of a window.
        idle_s: Seconds without a single request after which the rate is 0, whatever the forecaster hopes for.
    """

    def __init__(self, make: Callable[[], LoadPredictor], *, quantile: float, window_s: float, idle_s: float) -> None:
        self._rate, self._isl, self._osl, self._cached = make(), make(), make(), make()
        self._quantile = quantile
        self._window_s = window_s
        self._idle_windows = max(1, math.ceil(idle_s / window_s))
        self._quiet = 0

    @property
    def idle(self) -> bool:
        """Whether nothing came for so long that nothing is expected."""
        return self._quiet >= self._idle_windows

    def observe(self, window: TrafficWindow) -> None:
        """Take a window. One without requests says nothing about their lengths."""
        self._quiet = 0 if window.requests else self._quiet + 1
        self._rate.observe(window.requests_s)
        for predictor, value in ((self._isl, window.isl), (self._osl, window.osl), (self._cached, window.cached_share)):
            predictor.observe(math.nan if value is None else value)

    def forecast(self, startup_s: float) -> Forecast:
        """Return the workload at the time when a replica asked for now would serve."""
        horizon = min(MAX_HORIZON, 1 + math.ceil(startup_s / self._window_s))
        point = self._rate.predict(horizon)
        upper = point
        if isinstance(self._rate, SupportsQuantiles):
            # A quantile below the point would plan for less than is expected.
            upper = max(point, self._rate.predict_quantile(self._quantile, horizon))
        if self.idle:
            point = upper = 0.0
        workload = Workload(upper, self._isl.predict(1), self._osl.predict(1), min(1.0, self._cached.predict(1)))
        return Forecast(workload, point, horizon)


def usable(forecast: Forecast) -> bool:
    """Whether every value of a forecast is finite; a plug-in may return anything."""
    load = forecast.workload
    return all(map(math.isfinite, (forecast.requests_s, load.requests_s, load.isl, load.osl, load.cached_share)))
