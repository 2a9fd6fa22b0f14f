"""Head-room that follows the latency that was really seen.

A capacity model is wrong by a factor: lengths vary more than it assumes, or the engine is faster than its profile. The
share of requests that missed their targets says in which direction, whatever the distribution, so head-room grows
quickly on misses and shrinks slowly without.
"""

from __future__ import annotations

from dataclasses import dataclass

from dynamo_planner._capacity import Slo
from dynamo_planner._observe import TrafficWindow

GROW = 1.1
SHRINK_PER_MINUTE = 0.96
FEWEST_SAMPLES = 20


@dataclass
class Headroom:
    """Factor on the replicas that the capacity model asks for.

    Attributes:
        slo: Targets.
        least: Lowest factor; below 1 trusts the observed latency over a pessimistic model.
        most: Highest factor.
        factor: The factor.
        missed: Share of the last window's requests that missed a target.
    """

    slo: Slo
    least: float = 1.0
    most: float = 2.0
    factor: float = 1.0
    missed: float = 0.0
    _wait_s: float = 0.0

    def update(self, window: TrafficWindow, startup_s: float = 0.0) -> float:
        """Take a window's latencies and return the factor.

        What was asked for after the last misses serves only after a start-up; until then misses say nothing new.
        """
        self._wait_s -= window.seconds
        samples = max(len(window.ttft_s), len(window.itl_s))
        if samples < FEWEST_SAMPLES:
            return self.factor
        late = sum(value > self.slo.ttft_s for value in window.ttft_s) / max(len(window.ttft_s), 1)
        slow = sum(value > self.slo.itl_s for value in window.itl_s) / max(len(window.itl_s), 1)
        self.missed = max(late, slow)
        allowed = 1 - self.slo.percentile / 100
        if self.missed > allowed:
            if self._wait_s <= 0:
                self.factor = min(self.most, self.factor * GROW)
                self._wait_s = startup_s + window.seconds
        elif self.missed <= allowed / 2:
            self.factor = max(self.least, self.factor * SHRINK_PER_MINUTE ** (window.seconds / 60))
        return self.factor
