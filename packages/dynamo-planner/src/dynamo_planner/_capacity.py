"""Replicas that a request rate needs."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class RateCapacity:
    """Capacity of one replica as a request rate.

    Attributes:
        requests_per_replica_s: What one replica serves within its latency target.
        utilization: Share of it to plan with.
    """

    requests_per_replica_s: float
    utilization: float

    def replicas_for(self, requests_per_s: float) -> int:
        """Return the fewest replicas whose planned capacity covers the rate."""
        # The subtraction keeps a rate that is exactly n replicas' worth from costing one more by rounding.
        return math.ceil(requests_per_s / (self.requests_per_replica_s * self.utilization) - 1e-9)
