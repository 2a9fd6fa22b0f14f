"""The rules that a planner is compared with, each as the decision maker that it is elsewhere."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from dynamo_core.planning import Observation, ScalingDecision
from dynamo_planner._lab.fleet import ROLE

HPA_TOLERANCE = 0.1
HPA_STABILIZATION_S = 300.0
HPA_FEWEST_STEP = 4
KPA_STABLE_S = 60.0
KPA_PANIC_S = 6.0
KPA_PANIC_AT = 2.0


class _Rule:
    """A rule of one role that numbers its decisions."""

    def __init__(self, least: int, most: int) -> None:
        self._least, self._most = least, most
        self._decisions = 0

    def decide(self, observation: Observation) -> ScalingDecision:
        """Take the next observation, return the next decision."""
        pool = observation.pools[ROLE]
        wanted = max(self._least, min(self._most, self.wanted(observation, pool.desired, pool.ready)))
        self._decisions += 1
        return ScalingDecision(self._decisions, observation.at_s, {ROLE: wanted}, {ROLE: pool.desired}, "rule")

    def wanted(self, observation: Observation, desired: int, ready: int) -> int:
        """Return the replicas wanted."""
        return desired


class FixedFleet(_Rule):
    """Always as many.

    Args:
        replicas: How many.
    """

    def __init__(self, replicas: int) -> None:
        super().__init__(replicas, replicas)


class HpaRule(_Rule):
    """Kubernetes' horizontal autoscaler on requests in flight.

    Desired is ready times metric over target, with a tolerance of a tenth, at most double or four more at once, and
    the highest wish of five minutes before it shrinks.

    Args:
        target: Requests in flight that a replica should have.
        least: Fewest replicas.
        most: Most replicas.
    """

    def __init__(self, target: float, least: int, most: int) -> None:
        super().__init__(least, most)
        self._target = target
        self._wishes: deque[tuple[float, int]] = deque()

    def wanted(self, observation: Observation, desired: int, ready: int) -> int:
        """Return the replicas wanted."""
        ratio = _in_flight(observation) / max(ready, 1) / self._target
        wish = desired if abs(ratio - 1) <= HPA_TOLERANCE else math.ceil(ready * ratio)
        wish = min(wish, max(2 * desired, desired + HPA_FEWEST_STEP))
        self._wishes.append((observation.at_s, wish))
        while self._wishes[0][0] < observation.at_s - HPA_STABILIZATION_S:
            self._wishes.popleft()
        return max(wish for _, wish in self._wishes) if wish < desired else wish


class KpaRule(_Rule):
    """Knative's autoscaler on requests in flight: a minute's mean, and a panic window that only grows.

    Args:
        target: Requests in flight that a replica should have.
        least: Fewest replicas.
        most: Most replicas.
    """

    def __init__(self, target: float, least: int, most: int) -> None:
        super().__init__(least, most)
        self._target = target
        self._seen: deque[tuple[float, float]] = deque()
        self._panic_until_s = -math.inf
        self._panic_most = 0

    def wanted(self, observation: Observation, desired: int, ready: int) -> int:
        """Return the replicas wanted."""
        now_s = observation.at_s
        self._seen.append((now_s, _in_flight(observation)))
        while self._seen[0][0] <= now_s - KPA_STABLE_S:
            self._seen.popleft()
        stable = math.ceil(_mean([value for _, value in self._seen]) / self._target)
        panic = math.ceil(_mean([value for when, value in self._seen if when > now_s - KPA_PANIC_S]) / self._target)
        if panic >= KPA_PANIC_AT * max(ready, 1):
            self._panic_until_s = now_s + KPA_STABLE_S
        if now_s >= self._panic_until_s:
            self._panic_most = 0
            return stable
        self._panic_most = max(self._panic_most, panic, stable, desired)
        return self._panic_most


class Schedule(_Rule):
    """Replicas by a timetable; what a clairvoyant would ask for.

    Args:
        interval_s: Length of an entry.
        counts: Replicas wanted in each.
        lead_s: How much earlier each is asked for.
    """

    def __init__(self, interval_s: float, counts: Sequence[int], lead_s: float) -> None:
        super().__init__(min(counts), max(counts))
        self._interval_s = interval_s
        self._counts = list(counts)
        self._lead_s = lead_s

    def wanted(self, observation: Observation, desired: int, ready: int) -> int:
        """Return the most that any entry from now to the lead asks for."""
        last = len(self._counts) - 1
        first = min(last, int(observation.at_s / self._interval_s))
        until = min(last, int((observation.at_s + self._lead_s) / self._interval_s))
        return max(self._counts[first : until + 1])


def _in_flight(observation: Observation) -> float:
    return float(sum(load.active_requests + load.waiting_requests for load in observation.loads.values()))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
