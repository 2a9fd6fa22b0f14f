"""The pure decision maker: observations in, decisions out."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from dynamo_core.planning import LoadPredictor, Observation, PoolState, ScalingDecision, total_traffic
from dynamo_planner._capacity import RateCapacity


class Reason(enum.Enum):
    """Why a decision is what it is."""

    NO_CHANGE = "no_change"
    SCALE_UP = "scale_up"
    SCALE_DOWN = "scale_down"
    SCALE_DOWN_DELAYED = "scale_down_delayed"
    SCALING_IN_PROGRESS = "scaling_in_progress"
    NO_TRAFFIC_DATA = "no_traffic_data"
    NO_POOL_DATA = "no_pool_data"
    LIMITED = "limited"


@dataclass(frozen=True)
class Limits:
    """Bounds of every decision.

    Attributes:
        min_replicas: Floor, enforced even without data.
        max_replicas: Ceiling.
        scale_down_delay_s: How long fewer replicas must suffice.
    """

    min_replicas: int
    max_replicas: int
    scale_down_delay_s: float

    def clamp(self, replicas: int) -> int:
        """Return the nearest allowed count."""
        return max(self.min_replicas, min(self.max_replicas, replicas))


class RatePlanner:
    """Plans one role from its predicted request rate.

    Missing input never scales down: it holds what is desired, within the limits, and says so. A scale-down waits until
    fewer replicas have sufficed for the whole delay, so that a short lull costs nothing; then it goes to the highest
    count that was needed within the delay.

    Args:
        role: Role to plan.
        predictor: Forecaster of the request rate.
        capacity: What a replica can do.
        limits: Bounds.
    """

    def __init__(self, role: str, predictor: LoadPredictor, capacity: RateCapacity, limits: Limits) -> None:
        self._role = role
        self._predictor = predictor
        self._capacity = capacity
        self._limits = limits
        self._decisions = 0
        self._needs: list[tuple[float, int]] = []
        self._watched_since_s: float | None = None

    def decide(self, observation: Observation) -> ScalingDecision:
        """Take the next observation, return the next decision."""
        pool = observation.pools.get(self._role)
        if pool is None:
            text = f"the target reported no pool {self._role!r}; holding"
            return self._decision(observation, {}, {}, Reason.NO_POOL_DATA, text)
        traffic = total_traffic(observation.traffic)
        if traffic is None or "traffic" in observation.stale:
            return self._hold(observation, pool, Reason.NO_TRAFFIC_DATA, "no frontend reported traffic")
        rate = traffic.requests / traffic.interval_s
        self._predictor.observe(rate)
        predicted = self._predictor.predict()
        need = self._capacity.replicas_for(predicted)
        values = {"rate_requests_s": rate, "predicted_requests_s": predicted, "needed_replicas": float(need)}
        return self._from_need(observation, pool, need, values)

    def _from_need(
        self, observation: Observation, pool: PoolState, need: int, values: dict[str, float]
    ) -> ScalingDecision:
        wanted = self._limits.clamp(need)
        recent = self._highest_recent_need(observation.at_s, wanted)
        held = self._limits.clamp(pool.desired)
        text = f"predicted {values['predicted_requests_s']:.2f} requests/s need {need} replicas"
        if wanted != need:
            text += f", limited to {wanted} by {self._limits.min_replicas}..{self._limits.max_replicas}"
        if wanted > pool.desired:
            reason = Reason.SCALE_UP
        elif wanted == pool.desired:
            reason = Reason.LIMITED if need > wanted else Reason.NO_CHANGE
        elif recent is None or recent >= pool.desired:
            wanted, reason = held, Reason.SCALE_DOWN_DELAYED
            text += f"; fewer than {pool.desired} have not sufficed for {self._limits.scale_down_delay_s:g} s"
        elif pool.starting or pool.draining:
            wanted, reason = held, Reason.SCALING_IN_PROGRESS
            text += f"; {pool.starting} still start and {pool.draining} still drain"
        else:
            wanted, reason = recent, Reason.SCALE_DOWN
        return self._decision(observation, {self._role: wanted}, values, reason, text)

    def _hold(self, observation: Observation, pool: PoolState, reason: Reason, why: str) -> ScalingDecision:
        wanted = self._limits.clamp(pool.desired)
        text = f"{why}; holding {wanted} replicas"
        if wanted != pool.desired:
            text += f" (the limits move it from {pool.desired})"
        return self._decision(observation, {self._role: wanted}, {}, reason, text)

    def _highest_recent_need(self, at_s: float, wanted: int) -> int | None:
        """Most replicas needed within the delay; None until a whole delay has been watched."""
        # A clock that jumped back makes older entries look new; they are dropped rather than trusted.
        oldest = at_s - self._limits.scale_down_delay_s
        self._needs = [(when, need) for when, need in self._needs if oldest < when <= at_s]
        # Only needs that exceed all later ones can ever be the maximum, so the list stays short.
        while self._needs and self._needs[-1][1] <= wanted:
            self._needs.pop()
        self._needs.append((at_s, wanted))
        if self._watched_since_s is None or self._watched_since_s > at_s:
            self._watched_since_s = at_s
        watched_s = at_s - self._watched_since_s
        return self._needs[0][1] if watched_s >= self._limits.scale_down_delay_s else None

    def _decision(
        self,
        observation: Observation,
        replicas: dict[str, int],
        values: dict[str, float],
        reason: Reason,
        explanation: str,
    ) -> ScalingDecision:
        self._decisions += 1
        return ScalingDecision(
            decision_id=self._decisions,
            at_s=observation.at_s,
            replicas=replicas,
            previous={role: pool.desired for role, pool in observation.pools.items() if role in replicas},
            reason=reason.value,
            explanation=explanation,
            values=values,
        )
