"""The loop around the pure planner: observe, decide, scale, remember."""

from __future__ import annotations

from collections import deque

import msgspec
import structlog

from dynamo_core.clock import Clock
from dynamo_core.component import Health
from dynamo_core.enums import HealthState
from dynamo_core.errors import DynamoError
from dynamo_core.planning import Planner, ScalingDecision, ScalingTarget
from dynamo_planner._metrics import PlannerMetrics
from dynamo_planner._settings import PlannerSettings
from dynamo_planner._sources.bus import BusSource

_log = structlog.get_logger(__name__)


class PlannerLoop:
    """Ticks until cancelled. A tick that fails leaves the replicas as they are and shows in health and metrics."""

    def __init__(
        self,
        settings: PlannerSettings,
        planner: Planner,
        source: BusSource,
        target: ScalingTarget,
        *,
        clock: Clock,
        metrics: PlannerMetrics,
    ) -> None:
        self._settings = settings
        self._planner = planner
        self._source = source
        self._target = target
        self._clock = clock
        self._metrics = metrics
        self._failure = ""
        self.decisions: deque[ScalingDecision] = deque(maxlen=settings.decisions_kept)

    async def run(self) -> None:
        """Tick every interval. Cancellation ends it between or within ticks; a half-done tick scales nothing twice."""
        while True:
            await self._clock.sleep(self._settings.interval_s)
            await self.tick()

    async def tick(self) -> ScalingDecision | None:
        """Make and carry out one decision; None if the target could not be read."""
        try:
            decision = await self._decide()
        except DynamoError as error:
            self._failure = f"{error.reason}: {error.message}"
            self._metrics.failed_ticks.inc()
            _log.warning("tick failed; replicas stay as they are", error=self._failure)
            return None
        self._failure = ""
        return decision

    def health(self) -> Health:
        """Ready, or degraded while the target cannot be reached."""
        if self._failure:
            return Health(HealthState.DEGRADED, self._failure)
        return Health(HealthState.READY)

    async def _decide(self) -> ScalingDecision:
        pools = await self._target.state()
        for role, pool in pools.items():
            self._metrics.ready.labels(role).set(pool.ready)
        decision = self._planner.decide(self._source.observe(pools))
        decision = msgspec.structs.replace(decision, advisory=self._settings.advisory)
        self.decisions.append(decision)
        self._metrics.note(decision)
        self._metrics.lost_reports.set(self._source.lost_reports)
        if decision.replicas != decision.previous:
            await self._carry_out(decision)
        return decision

    async def _carry_out(self, decision: ScalingDecision) -> None:
        _log.info(
            "scaling decision",
            decision=decision.decision_id,
            replicas=decision.replicas,
            previous=decision.previous,
            reason=decision.reason,
            explanation=decision.explanation,
            advisory=decision.advisory,
        )
        if not decision.advisory:
            await self._target.scale(decision.replicas)
