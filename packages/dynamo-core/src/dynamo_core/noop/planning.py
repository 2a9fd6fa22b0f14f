"""A planner that changes nothing, a forecast of no change, and a target whose replicas exist at once."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dynamo_core.errors import InvalidRequestError, NotFoundError
from dynamo_core.planning import Observation, PoolState, ScalingDecision


class HoldPlanner:
    """Wants what is wanted already."""

    def __init__(self) -> None:
        self._decision_id = 0

    def decide(self, observation: Observation) -> ScalingDecision:
        """Return the present wish of every pool as the decision."""
        self._decision_id += 1
        held = {role: pool.desired for role, pool in observation.pools.items()}
        return ScalingDecision(
            decision_id=self._decision_id,
            at_s=observation.at_s,
            replicas=held,
            previous=dict(held),
            reason="hold",
            explanation="this planner never changes a replica count",
        )


class LastValuePredictor:
    """Forecasts that the next value is the last one."""

    def __init__(self) -> None:
        self._last = 0.0

    def observe(self, value: float) -> None:
        """Remember a finite value."""
        if math.isfinite(value):
            self._last = value

    def predict(self, horizon: int = 1) -> float:
        """Return the last finite value, at least 0; 0 without one."""
        return max(0.0, self._last)


class StaticScalingTarget:
    """Named pools whose replicas are ready the moment they are asked for.

    Args:
        replicas: Roles and their first counts.
        max_replicas: Most replicas of one role.
    """

    def __init__(self, replicas: Mapping[str, int], *, max_replicas: int = 1024) -> None:
        self._max = max_replicas
        self._replicas: dict[str, int] = dict(replicas)
        self._last_decision = 0
        self._require_valid(replicas)

    async def start(self) -> None:
        """Do nothing."""

    async def state(self) -> Mapping[str, PoolState]:
        """Return every pool, all of it ready."""
        return {role: PoolState(ready=count, desired=count) for role, count in self._replicas.items()}

    async def scale(self, replicas: Mapping[str, int], *, decision_id: int = 0) -> None:
        """Set counts; a repeated or older decision is ignored, 0 always applies.

        Raises:
            NotFoundError: for an unknown role; then nothing changes.
            InvalidRequestError: for a count out of range; then nothing changes.
        """
        self._require_valid(replicas)
        if decision_id and decision_id <= self._last_decision:
            return
        self._last_decision = max(decision_id, self._last_decision)
        self._replicas.update(replicas)

    async def close(self) -> None:
        """Do nothing; replicas stay."""

    def _require_valid(self, replicas: Mapping[str, int]) -> None:
        for role, count in replicas.items():
            if role not in self._replicas:
                raise NotFoundError(f"no pool is named {role!r}; there are {', '.join(sorted(self._replicas))}")
            if not 0 <= count <= self._max:
                raise InvalidRequestError(f"{count} replicas of {role} are not in 0..{self._max}", param=role)
