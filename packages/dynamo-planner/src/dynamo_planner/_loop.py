"""The loop around the pure planner: observe, decide, scale, remember."""

from __future__ import annotations

from collections import deque

import msgspec
import structlog

from dynamo_core.clock import Clock
from dynamo_core.component import Health
from dynamo_core.enums import HealthState
from dynamo_core.errors import DynamoError
from dynamo_core.planning import Observation, ScalingDecision, ScalingTarget
from dynamo_planner._election import Election
from dynamo_planner._metrics import PlannerMetrics
from dynamo_planner._record import DecisionLog, Record
from dynamo_planner._settings import PlannerSettings
from dynamo_planner._sources import Source
from dynamo_planner._state import SlaPlanner

WAKE_POLL_S = 1.0

_log = structlog.get_logger(__name__)


class PlannerLoop:
    """Ticks until cancelled. A tick that fails leaves the replicas as they are and shows in health and metrics.

    Args:
        settings: Options.
        planner: Decides.
        source: Gives observations.
        target: Is scaled.
        clock: Time.
        metrics: Instruments.
        election: Says whether this planner of several decides; None if it is alone.
        log: Keeps decisions in a file; None for none.
    """

    def __init__(  # noqa: PLR0913 - keyword-only parts, put together in one place
        self,
        settings: PlannerSettings,
        planner: SlaPlanner,
        source: Source,
        target: ScalingTarget,
        *,
        clock: Clock,
        metrics: PlannerMetrics,
        election: Election | None = None,
        log: DecisionLog | None = None,
    ) -> None:
        self._settings = settings
        self.planner = planner
        self._source = source
        self._target = target
        self._clock = clock
        self._metrics = metrics
        self._election = election
        self._decision_log = log
        self._failure = ""
        self._asleep = False
        self.paused = False
        self.decisions: deque[ScalingDecision] = deque(maxlen=settings.decisions_kept)

    async def run(self) -> None:
        """Tick every interval. Cancellation ends it between or within ticks; a half-done tick scales nothing twice."""
        while True:
            # With nothing running, the first request should not wait for a whole interval.
            await self._clock.sleep(min(WAKE_POLL_S, self._settings.interval_s) if self._asleep else self._interval_s)
            await self.tick()

    async def tick(self) -> ScalingDecision | None:
        """Make and carry out one decision; None if another planner leads, or target or discovery could not be read."""
        try:
            decision = await self._decide() if await self._leads() else None
        except DynamoError as error:
            self._failure = f"{error.reason}: {error.message}"
            self._metrics.failed_ticks.inc()
            _log.warning("tick failed; replicas stay as they are", error=self._failure)
            return None
        self._failure = ""
        return decision

    @property
    def leading(self) -> bool:
        """Whether this planner decides."""
        return self._election is None or self._election.leading

    def health(self) -> Health:
        """Ready, or degraded while the target cannot be reached."""
        if self._failure:
            return Health(HealthState.DEGRADED, self._failure)
        return Health(HealthState.READY, "" if self.leading else "another planner leads")

    @property
    def _interval_s(self) -> float:
        return self._settings.interval_s

    async def _leads(self) -> bool:
        if self._election is None:
            return True
        led, leads = self._election.leading, await self._election.claim()
        self._metrics.leading.set(leads)
        if leads and not led:
            self.planner.continue_after(self._election.last_decision_id)
        return leads

    async def _decide(self) -> ScalingDecision:
        pools = await self._target.state()
        observation = await self._source.observe(pools)
        decision = self.planner.decide(observation)
        decision = msgspec.structs.replace(decision, advisory=self._settings.advisory or self.paused)
        self._asleep = bool(decision.replicas) and not any(decision.replicas.values())
        self._remember(decision, observation)
        changes = {role: count for role, count in decision.replicas.items() if count != pools[role].desired}
        if changes:
            await self._carry_out(decision, changes)
        return decision

    def _remember(self, decision: ScalingDecision, observation: Observation) -> None:
        self.decisions.append(decision)
        self._metrics.note(decision, observation)
        self._metrics.lost_reports.set(self._source.lost_reports)
        if self._decision_log is None:
            return
        try:
            self._decision_log.append(Record(decision, observation))
        except OSError as error:
            # A full disk must not stop the scaling; the loss of a record shows in its own metric.
            self._metrics.lost_records.inc()
            _log.warning("decision log cannot be written", error=str(error))

    async def _carry_out(self, decision: ScalingDecision, changes: dict[str, int]) -> None:
        _log.info(
            "scaling decision",
            decision=decision.decision_id,
            replicas=decision.replicas,
            previous=decision.previous,
            reason=decision.reason,
            explanation=decision.explanation,
            advisory=decision.advisory,
        )
        if decision.advisory:
            return
        if self._election is None:
            # Identities begin anew with the process here, so a target must not compare them with older ones.
            await self._target.scale(changes)
        elif await self._election.fence(decision.decision_id):
            await self._target.scale(changes, decision_id=decision.decision_id)
