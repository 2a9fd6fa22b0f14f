"""How far above its forecast demand goes, for how long, and how much of that a queue absorbs.

A forecast of the mean is met or missed by bursts. A burst of ``T`` seconds at rate ``r`` leaves nobody waiting longer
than ``s`` seconds if the fleet serves ``r * T`` requests in ``T + s``: a short burst needs less than its rate. So the
rate to plan for is the largest, over lengths of bursts, of a quantile of the mean demand over that length, scaled by
``T / (T + s)``. The quantiles are those of errors that were really made, as in conformal prediction.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]

SPANS = (1, 2, 4, 8, 16, 32, 64)
ERRORS_KEPT = 360
FEWEST_ERRORS = 10
FEWEST_HORIZONS = 3
EVENT_DEVIATIONS = 5.0
TO_SIGMA = 1.4826


class BurstEnvelope:
    """Errors of forecasts made as many windows ahead as a replica takes to start.

    Args:
        quantile: Share of bursts to plan for.
        window_s: Seconds of a window.
        slack_s: Seconds that a request may wait.
    """

    def __init__(self, quantile: float, window_s: float, slack_s: float) -> None:
        self._quantile = quantile
        self._window_s = window_s
        self._slack_s = max(0.0, slack_s)
        self._issued: deque[float] = deque()
        self._errors: deque[float] = deque(maxlen=ERRORS_KEPT)

    def observe(self, demand: float) -> None:
        """Take the demand of a window, in requests of mean size a second."""
        if len(self._issued) == self._issued.maxlen:
            level = max(demand, self._issued[0], 1 / self._window_s)
            self._errors.append((demand - self._issued[0]) / math.sqrt(level))

    def issue(self, point: float, horizon: int) -> None:
        """Remember the forecast for so many windows ahead."""
        if self._issued.maxlen != horizon:
            # Errors stay: those of another horizon say more about this series than nothing does.
            self._issued = deque(maxlen=horizon)
        self._issued.append(point)

    def planned(self, point: float) -> float:
        """Return the rate to plan for, at least the forecast."""
        # A step makes an error of every forecast that was under way; those must not be most of what is known.
        if len(self._errors) < max(FEWEST_ERRORS, FEWEST_HORIZONS * (self._issued.maxlen or 1)):
            return point
        # Errors are kept in units of the root of their level, as chance arrivals vary, so that those of a busy hour say
        # something in a quiet one.
        sums = np.cumsum(np.concatenate([[0.0], self._noise() * math.sqrt(max(point, 1 / self._window_s))]))
        return max([point, *(self._of_span(point, sums, span) for span in SPANS if span < len(sums))])

    def _noise(self) -> Floats:
        """Return the errors without events: a step is answered once, and no room is kept for the next."""
        errors = np.asarray(self._errors)
        middle = float(np.median(errors))
        # The deviation of a series that hardly varies is at least that of chance arrivals.
        deviation = max(TO_SIGMA * float(np.median(np.abs(errors - middle))), 1 / math.sqrt(self._window_s))
        return np.minimum(errors, middle + EVENT_DEVIATIONS * deviation)

    def _of_span(self, point: float, sums: Floats, span: int) -> float:
        errors = np.sort(sums[span:] - sums[:-span]) / span
        rank = min(len(errors), math.ceil((len(errors) + 1) * self._quantile))
        length_s = span * self._window_s
        return (point + float(errors[rank - 1])) * length_s / (length_s + self._slack_s)
