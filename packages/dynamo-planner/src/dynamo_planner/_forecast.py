"""Forecasts of the four series that make a workload."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from dynamo_core.planning import LoadPredictor
from dynamo_planner._burst import BurstEnvelope
from dynamo_planner._capacity import Workload
from dynamo_planner._observe import TrafficWindow

MAX_HORIZON = 16
LENGTHS_HALF_LIFE_S = 240.0


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
        quantile: Share of bursts to plan for.
        window_s: Seconds of a window.
        idle_s: Seconds without a single request after which the rate is 0, whatever the forecaster hopes for.
        slack_s: Seconds that a request may wait.
    """

    def __init__(
        self,
        make: Callable[[], LoadPredictor],
        *,
        quantile: float,
        window_s: float,
        idle_s: float,
        slack_s: float = 0.0,
    ) -> None:
        self._rate, self._isl, self._osl, self._cached = make(), make(), make(), make()
        self._lengths = LengthMeans(window_s)
        self._bursts = BurstEnvelope(quantile, window_s, slack_s)
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
        self._bursts.observe(window.requests_s * self._lengths.size(window))
        self._rate.observe(window.requests_s)
        means = self._lengths.update(window)
        for predictor, value in zip((self._isl, self._osl, self._cached), means, strict=True):
            predictor.observe(value)

    def forecast(self, startup_s: float) -> Forecast:
        """Return the workload at the time when a replica asked for now would serve."""
        horizon = min(MAX_HORIZON, 1 + math.ceil(startup_s / self._window_s))
        point = self._rate.predict(horizon)
        self._bursts.issue(point, horizon)
        planned = self._bursts.planned(point)
        if self.idle:
            point = planned = 0.0
        cached = min(1.0, self._cached.predict(1))
        workload = Workload(planned, self._isl.predict(1), self._osl.predict(1), cached, expected_s=point)
        return Forecast(workload, point, horizon)


class LengthMeans:
    """Mean lengths over the last few minutes, each request counted once however few came with it.

    The mean of one short window is that of a few dozen requests of very different lengths; its noise is not a change of
    the workload.

    Args:
        window_s: Seconds of a window.
    """

    def __init__(self, window_s: float) -> None:
        self._keep = 0.5 ** (window_s / LENGTHS_HALF_LIFE_S)
        self._sums = [0.0, 0.0, 0.0]
        self._requests = 0.0

    def update(self, window: TrafficWindow) -> tuple[float, float, float]:
        """Take a window; return prompt tokens, output tokens and cached share, not a number before any request."""
        if window.isl is not None and window.osl is not None:
            lengths = (window.isl, window.osl, (window.cached_share or 0.0) * window.isl)
            added = [length * window.requests for length in lengths]
            self._sums = [old * self._keep + new for old, new in zip(self._sums, added, strict=True)]
            self._requests = self._requests * self._keep + window.requests
        if not self._requests:
            return math.nan, math.nan, math.nan
        prompt, output, cached = self._sums
        return prompt / self._requests, output / self._requests, cached / prompt if prompt else 0.0

    def size(self, window: TrafficWindow) -> float:
        """Return how large the window's requests are beside the mean; 1 without either."""
        if window.isl is None or window.osl is None or not self._requests:
            return 1.0
        means = [value / self._requests for value in self._sums]
        ratios = [seen / mean for seen, mean in ((window.isl, means[0]), (window.osl, means[1])) if mean > 0]
        return sum(ratios) / len(ratios) if ratios else 1.0


def usable(forecast: Forecast) -> bool:
    """Whether every value of a forecast is finite; a plug-in may return anything."""
    load = forecast.workload
    return all(map(math.isfinite, (forecast.requests_s, load.requests_s, load.isl, load.osl, load.cached_share)))
