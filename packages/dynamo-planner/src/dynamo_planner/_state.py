"""The pure decision maker: observations in, decisions out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dynamo_core.errors import InvalidRequestError
from dynamo_core.load import ForwardPassMetrics
from dynamo_core.planning import Observation, PoolState, ScalingDecision
from dynamo_planner._budget import Budget
from dynamo_planner._load import LoadPart
from dynamo_planner._observe import TrafficWindow
from dynamo_planner._reasons import HOLDS, Reason
from dynamo_planner._regress import StepRegression
from dynamo_planner._throughput import Proposal, ThroughputPart
from dynamo_planner._watch import Edit, EditWatch, RecentNeeds, StartWatch


@dataclass(frozen=True)
class Patience:
    """Times of the planner, in seconds.

    Attributes:
        scale_down_delay_s: How long fewer replicas must suffice before any is let go.
        start_timeout_s: Without progress for so long, starting replicas count as never ready.
        manual_hold_s: How long someone else's edit is kept.
        revert_manual_edits: Revert them instead, at most once in that time.
        max_gap_s: A longer pause between observations, or a step back, is a jump of the clock.
    """

    scale_down_delay_s: float = 60.0
    start_timeout_s: float = 300.0
    manual_hold_s: float = 600.0
    revert_manual_edits: bool = False
    max_gap_s: float = 600.0


@dataclass
class _Role:
    needs: RecentNeeds
    starts: StartWatch
    edits: EditWatch
    override: tuple[int, float] | None = None


@dataclass
class _Draft:
    """A decision in the making."""

    pools: dict[str, PoolState]
    wanted: dict[str, int] = field(default_factory=dict[str, int])
    kept: set[str] = field(default_factory=set[str])
    reasons: dict[str, Reason] = field(default_factory=dict[str, Reason])
    values: dict[str, float] = field(default_factory=dict[str, float])
    notes: list[str] = field(default_factory=list[str])

    def settle(self, role: str, replicas: int, reason: Reason, note: str) -> None:
        self.wanted[role] = replicas
        self.reasons[role] = reason
        self.notes.append(f"{role}: {note}" if len(self.pools) > 1 else note)


class SlaPlanner:
    """Plans the roles of one deployment.

    A throughput part says how many replicas the expected load needs; a load part says what the engines feel now. With
    both, the first is a lower bound of the second. Whatever they want then passes the same gates: someone else's edit,
    replicas that never become ready, the delay before anything shrinks, the budget.

    Missing input never shrinks a fleet: the planner holds, enforces the floor and says so.

    Args:
        budget: Bounds.
        patience: Times.
        throughput: Throughput part; None if it is off.
        load: Load part; None if it is off.
        steps: Learns from the observed passes, if a part uses it.
        first_decision_id: Identity of the first decision; a successor starts above its predecessor's last.
        advisory: Nobody carries the decisions out, so a pool that stays as it is was not edited.
    """

    def __init__(  # noqa: PLR0913 - keyword-only parts, put together in one place
        self,
        budget: Budget,
        patience: Patience,
        *,
        throughput: ThroughputPart | None = None,
        load: LoadPart | None = None,
        steps: StepRegression | None = None,
        first_decision_id: int = 1,
        advisory: bool = False,
    ) -> None:
        self.budget = budget
        self._patience = patience
        self._throughput = throughput
        self._load = load
        self._steps = steps
        self._next_id = first_decision_id
        self._advisory = advisory
        self._last_at_s: float | None = None
        self._roles = {
            limit.role: _Role(
                RecentNeeds(patience.scale_down_delay_s),
                StartWatch(patience.start_timeout_s),
                EditWatch(patience.manual_hold_s, revert=patience.revert_manual_edits),
            )
            for limit in budget.roles
        }

    def decide(self, observation: Observation) -> ScalingDecision:
        """Take the next observation, return the next decision."""
        draft = _Draft({role: observation.pools[role] for role in self._roles if role in observation.pools})
        jumped = self._clock_jumped(observation.at_s)
        self._learn(observation.passes)
        if jumped or len(draft.pools) < len(self._roles):
            self._hold_all(draft, Reason.CLOCK_JUMP if jumped else Reason.NO_POOL_DATA)
        else:
            self._propose(observation, draft)
        return self._decision(observation, draft)

    def warm_up(self, windows: Iterable[TrafficWindow]) -> None:
        """Feed recorded traffic to the forecasters."""
        if self._throughput is not None:
            self._throughput.warm_up(windows)

    def continue_after(self, decision_id: int) -> None:
        """Number the next decision above this one, which a predecessor made."""
        self._next_id = max(self._next_id, decision_id + 1)

    def override(self, role: str, replicas: int | None, until_s: float) -> None:
        """Fix a role's replicas until a time, or let go of it with None. The budget still holds.

        Raises:
            InvalidRequestError: if the role is unknown, or the count is outside its limits.
        """
        limits = next((limit for limit in self.budget.roles if limit.role == role), None)
        if limits is None:
            raise InvalidRequestError(f"role {role!r} is not planned; roles are {sorted(self._roles)}", param="role")
        if replicas is not None and limits.clamp(replicas) != replicas:
            raise InvalidRequestError(
                f"override of {replicas} replicas is outside {limits.min_replicas}..{limits.max_replicas} of {role!r}",
                param="replicas",
            )
        self._roles[role].override = None if replicas is None else (replicas, until_s)

    def overrides(self, at_s: float) -> dict[str, dict[str, float]]:
        """Return the overrides in force."""
        found = {role: state.override for role, state in self._roles.items()}
        return {
            role: {"replicas": item[0], "until_s": item[1]} for role, item in found.items() if item and item[1] > at_s
        }

    def _learn(self, passes: tuple[ForwardPassMetrics, ...]) -> None:
        if self._steps is not None:
            for item in passes:
                self._steps.observe(item)

    def _clock_jumped(self, at_s: float) -> bool:
        """Whether time cannot be trusted; everything remembered by time is then forgotten."""
        last, self._last_at_s = self._last_at_s, at_s
        if last is None or 0 <= at_s - last <= self._patience.max_gap_s:
            return False
        for role in self._roles.values():
            role.needs.reset()
            role.starts.reset()
        if self._throughput is not None:
            self._throughput.reset()
        return True

    def _hold_all(self, draft: _Draft, reason: Reason) -> None:
        for role, pool in draft.pools.items():
            self._hold(draft, role, pool, reason)
        if not draft.pools:
            draft.reasons["fleet"] = reason
            draft.notes.append("the target reported none of the planned roles; holding")

    def _hold(self, draft: _Draft, role: str, pool: PoolState, reason: Reason) -> None:
        draft.settle(role, pool.desired, reason, f"{_WHY[reason]}; holding {pool.desired} replicas")

    def _propose(self, observation: Observation, draft: _Draft) -> None:
        floor = Proposal(reason=Reason.DISABLED)
        at_s, starts = observation.at_s, {role: state.starts for role, state in self._roles.items()}
        stuck = frozenset(role for role, pool in draft.pools.items() if starts[role].stuck(at_s, pool))
        if self._throughput is not None:
            floor = self._throughput.propose(observation, draft.pools, stuck)
            draft.values |= floor.values
            for name, (reason, note) in floor.choices.items():
                draft.reasons[f"mix.{name}"] = reason
                draft.notes.append(f"{name}: {note}")
        bounds = floor.reason is Reason.SCALE and self._load is not None
        draft.reasons["throughput"] = Reason.SET_LOWER_BOUND if bounds else floor.reason
        for role, pool in draft.pools.items():
            load = Proposal(reason=Reason.DISABLED)
            if self._load is not None:
                load = self._load.propose(observation, role, pool)
                draft.values |= load.values
                draft.reasons[f"load.{role}"] = load.reason
            if load.reason is Reason.SCALE_DOWN and floor.replicas.get(role, 0) > load.replicas[role]:
                draft.reasons[f"load.{role}"] = Reason.SCALE_DOWN_CAPPED_BY_THROUGHPUT
            if not self._gated(at_s, draft, role):
                self._plan_role(at_s, draft, role, (floor, load, role in stuck))

    def _plan_role(self, at_s: float, draft: _Draft, role: str, parts: tuple[Proposal, Proposal, bool]) -> None:
        state, pool = self._roles[role], draft.pools[role]
        floor, load, stuck = parts
        need = self._need(role, pool, floor, load)
        if need is None:
            reason = load.reason if self._throughput is None else floor.reason
            self._hold(draft, role, pool, reason if reason in HOLDS else Reason.INSUFFICIENT_DATA)
            return
        limits = next(limit for limit in self.budget.roles if limit.role == role)
        wanted = limits.clamp(need)
        state.needs.add(at_s, wanted)
        note = f"{need} replicas are needed"
        if wanted != need:
            note += f", limited to {wanted} by {limits.min_replicas}..{limits.max_replicas}"
        if wanted > pool.desired:
            self._grow(at_s, draft, role, (wanted, note, floor.reason, stuck))
        elif wanted < pool.desired:
            self._shrink(at_s, draft, role, note)
        else:
            reason = load.reason if load.reason is Reason.SCALE_DOWN_REFUSED_CONSOLIDATION else Reason.NO_CHANGE
            draft.settle(role, wanted, Reason.LIMITED if need > wanted else reason, note)

    def _gated(self, at_s: float, draft: _Draft, role: str) -> bool:
        """Settle a role that an operator or another hand has fixed."""
        state, pool = self._roles[role], draft.pools[role]
        if state.override is not None and at_s < state.override[1]:
            draft.settle(role, state.override[0], Reason.OVERRIDE, f"overridden to {state.override[0]} by an operator")
            return True
        edit = Edit.OWN if self._advisory else state.edits.look(at_s, pool.desired)
        if edit is Edit.KEEP:
            draft.kept.add(role)
            draft.settle(role, pool.desired, Reason.MANUAL_EDIT_KEPT, f"someone set {pool.desired}; kept for a while")
        elif edit is Edit.REVERT:
            asked = state.edits.asked or 0
            draft.settle(role, asked, Reason.MANUAL_EDIT_REVERTED, f"someone set {pool.desired}; back to {asked}")
        return edit is not Edit.OWN

    def _need(self, role: str, pool: PoolState, floor: Proposal, load: Proposal) -> int | None:
        """Combine the parts; None if neither knows enough."""
        bound, felt = floor.replicas.get(role), load.replicas.get(role)
        if self._throughput is not None and bound is None:
            # Without a forecast nothing may shrink, but an overload that engines feel is real.
            return felt if felt is not None and felt > pool.desired else None
        if felt is None:
            # While the load part cannot say, its last wish stands above the floor.
            return bound if self._load is None else None if bound is None else max(bound, pool.desired)
        return felt if bound is None else max(bound, felt)

    def _grow(self, at_s: float, draft: _Draft, role: str, plan: tuple[int, str, Reason, bool]) -> None:
        wanted, note, why, stuck = plan
        pool = draft.pools[role]
        if stuck:
            note += f"; {pool.starting} do not get ready and {pool.failed} failed, so no more are asked for yet"
            draft.settle(role, pool.desired, Reason.NEVER_READY, note)
            return
        self._roles[role].starts.tried(at_s)
        draft.settle(role, wanted, Reason.WAKE if why is Reason.WAKE else Reason.SCALE_UP, note)

    def _shrink(self, at_s: float, draft: _Draft, role: str, note: str) -> None:
        state, pool = self._roles[role], draft.pools[role]
        # A replica let go is missed for a whole start-up if the load returns, so patience is at least that.
        recent = state.needs.highest(at_s, pool.startup_s or 0.0)
        if recent is None or recent >= pool.desired:
            text = f"{note}; fewer than {pool.desired} have not sufficed for long enough"
            draft.settle(role, pool.desired, Reason.SCALE_DOWN_DELAYED, text)
        elif pool.draining or (pool.starting and pool.ready < recent):
            text = f"{note}; {pool.starting} still start and {pool.draining} still drain"
            draft.settle(role, pool.desired, Reason.SCALING_IN_PROGRESS, text)
        else:
            idle = recent == 0 and self._throughput is not None and self._throughput.idle
            draft.settle(role, recent, Reason.IDLE if idle else Reason.SCALE_DOWN, note)

    def _decision(self, observation: Observation, draft: _Draft) -> ScalingDecision:
        planned = {role: count for role, count in draft.wanted.items() if role not in draft.kept}
        granted = self.budget.grant(self._clamped(draft, planned), draft.pools)
        for role, count in granted.items():
            if count < planned[role] and draft.reasons[role] in (Reason.SCALE_UP, Reason.WAKE, Reason.OVERRIDE):
                room = Reason.LIMITED if count == self.budget.clamp(draft.wanted)[role] else Reason.BUDGET_IN_USE
                draft.reasons[role] = room
                draft.notes.append(f"{role}: {count} of {planned[role]} fit the budget of {self.budget.max_gpus} GPUs")
        replicas = {role: granted.get(role, draft.wanted[role]) for role in draft.wanted}
        for role, count in replicas.items():
            if role not in draft.kept:
                self._roles[role].edits.note(draft.pools[role].desired, count)
        if replicas:
            draft.values["gpus"] = float(self.budget.gpus(replicas))
        decision_id, self._next_id = self._next_id, self._next_id + 1
        return ScalingDecision(
            decision_id=decision_id,
            at_s=observation.at_s,
            replicas=replicas,
            previous={role: pool.desired for role, pool in draft.pools.items()},
            reason=_headline(draft.reasons).value,
            explanation="; ".join(draft.notes),
            values=draft.values,
            reasons={name: reason.value for name, reason in draft.reasons.items()},
        )

    def _clamped(self, draft: _Draft, planned: dict[str, int]) -> dict[str, int]:
        """Clamp what is planned, with what is kept counted as taken."""
        fleet = self.budget.clamp(draft.wanted)
        return {role: fleet[role] for role in planned}


_WHY = {
    Reason.CLOCK_JUMP: "the clock jumped",
    Reason.NO_POOL_DATA: "the target did not report every planned role",
    Reason.NO_TRAFFIC_DATA: "no frontend reported usable traffic",
    Reason.NO_FPM_DATA: "no engine reported its load",
    Reason.INSUFFICIENT_DATA: "too little was seen yet",
    Reason.PREDICT_FAILED: "the forecaster failed",
    Reason.MODEL_NOT_READY: "the capacity model has not seen enough",
}
_HEADLINES = (
    Reason.SCALE_UP,
    Reason.WAKE,
    Reason.SCALE_DOWN,
    Reason.IDLE,
    Reason.MANUAL_EDIT_REVERTED,
    Reason.NEVER_READY,
    Reason.BUDGET_IN_USE,
    Reason.OVERRIDE,
    Reason.MANUAL_EDIT_KEPT,
    Reason.LIMITED,
)


def _headline(reasons: Mapping[str, Reason]) -> Reason:
    """Return the reason that matters most among those of the roles."""
    of_roles = [
        reason for name, reason in reasons.items() if name != "throughput" and not name.startswith(("load.", "mix."))
    ]
    return next((reason for reason in _HEADLINES if reason in of_roles), of_roles[0])
