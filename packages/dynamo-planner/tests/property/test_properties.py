"""What must hold of a planner in front of any load: settling, resting, holding, and not asking twice."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from dynamo_core.planning import Observation, PoolState, TrafficStats
from dynamo_planner import ConstantPredictor, PlannerSettings, SlaPlanner, create_planner

TICK_S = 10.0
DAY_S = 24 * 3600.0


@dataclass
class World:
    """A pool whose replicas take a while to start, in front of a planner.

    Attributes:
        planner: Who decides.
        startup_s: Seconds from ask to ready; infinite for replicas that never get ready.
        desired: Replicas asked for.
        ready: Of them, those that serve.
    """

    planner: SlaPlanner
    startup_s: float = 60.0
    desired: int = 1
    ready: int = 1
    now_s: float = 0.0
    history: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    _due: list[float] = field(default_factory=list)

    def step(
        self,
        rate: float | None,
        *,
        stale: tuple[str, ...] = (),
        interval_s: float = TICK_S,
        latencies_s: tuple[float, ...] = (),
    ) -> None:
        self.now_s += TICK_S
        self.ready += sum(due <= self.now_s for due in self._due)
        self._due = [due for due in self._due if due > self.now_s]
        report = TrafficStats("m", interval_s, requests=round((rate or 0.0) * TICK_S), ttft_s=latencies_s)
        traffic = () if rate is None else (report,)
        measured = self.startup_s if math.isfinite(self.startup_s) else None
        pool = PoolState(self.ready, self.desired - self.ready, desired=self.desired, startup_s=measured)
        decision = self.planner.decide(Observation(self.now_s, traffic, {"worker": pool}, stale=stale))
        self._scale(decision.replicas["worker"])
        self.history.append(self.desired)
        self.reasons.append(decision.reason)

    def run(self, load: Callable[[float], float], seconds: float) -> None:
        end_s = self.now_s + seconds
        start_s = self.now_s
        while self.now_s < end_s:
            self.step(load(self.now_s - start_s))

    def edit(self, desired: int) -> None:
        self._scale(desired)

    @property
    def changes(self) -> int:
        return sum(one != two for one, two in zip([1, *self.history], self.history, strict=False))

    def _scale(self, desired: int) -> None:
        self._due += [self.now_s + self.startup_s] * (desired - self.desired)
        if desired < self.desired:
            del self._due[max(0, desired - self.ready) :]
            self.ready = min(self.ready, desired)
        self.desired = desired


def world(predictor: str = "auto", **changes: object) -> World:
    options = {
        "requests_per_replica_s": 10,
        "utilization": 0.8,
        "max_replicas": 20,
        "interval_s": TICK_S,
        "throughput_interval_s": 30,
        "load_predictor": predictor,
        "scale_down_delay_s": 120,
        **changes,
    }
    return World(create_planner(PlannerSettings(**options)))


def needed(rate: float) -> int:
    return math.ceil(rate / 8)


@pytest.mark.parametrize("predictor", ["constant", "auto"])
def test_constant_load_never_flaps_over_a_day(predictor: str) -> None:
    subject = world(predictor)
    subject.run(lambda at_s: 36.0, DAY_S)
    assert subject.desired == 5
    assert subject.changes == 1


def test_constant_load_with_poisson_noise_rests_most_of_the_day() -> None:
    random = np.random.default_rng(2)
    subject = world("moving-average")
    subject.run(lambda at_s: float(random.poisson(360)) / TICK_S, DAY_S)
    assert subject.desired in (5, 6)
    assert subject.changes <= 24


def test_no_traffic_returns_to_the_minimum() -> None:
    for minimum in (0, 2):
        subject = world(min_replicas=minimum)
        subject.run(lambda at_s: 80.0, 1800)
        assert subject.desired >= 10
        subject.run(lambda at_s: 0.0, 1800)
        assert subject.desired == minimum


def test_a_step_settles_within_two_windows_and_the_delay() -> None:
    subject = world()
    subject.run(lambda at_s: 8.0, 3600)
    subject.run(lambda at_s: 80.0, 70)
    assert subject.desired >= needed(80)
    subject.run(lambda at_s: 80.0, 1800)
    assert needed(80) <= subject.desired <= needed(80) * 1.3
    before = subject.changes
    subject.run(lambda at_s: 80.0, 3600)
    assert subject.changes - before <= 4


def test_a_ramp_is_never_behind_by_more_than_a_start_up() -> None:
    subject = world("kalman")
    subject.run(lambda at_s: 8.0, 600)

    def ramp(at_s: float) -> float:
        return 8.0 + at_s * 0.04

    behind = []
    for _ in range(300):
        at_s = subject.now_s - 600
        subject.step(ramp(at_s))
        behind.append(needed(ramp(at_s)) - subject.ready)
    assert max(behind[30:]) <= 1
    # Nor ahead: a fleet that is simply large would never be behind.
    assert max(subject.history) <= needed(ramp(3000)) * 1.3 + 1


def test_a_diurnal_load_is_followed_up_and_down() -> None:
    subject = world()
    lacking = []

    def day(at_s: float) -> float:
        return 60.0 - 50.0 * math.cos(2 * math.pi * at_s / DAY_S)

    for _ in range(int(DAY_S / TICK_S)):
        rate = day(subject.now_s)
        subject.step(rate)
        lacking.append(subject.ready < needed(rate))
    assert np.mean(lacking[360:]) < 0.02
    used = sum(subject.history) * TICK_S / 3600
    ideal = sum(day(step * TICK_S) / 8 for step in range(len(subject.history))) * TICK_S / 3600
    assert used < 1.25 * ideal


def test_a_burst_is_answered_and_forgotten() -> None:
    subject = world()
    subject.run(lambda at_s: 16.0, 3600)
    subject.run(lambda at_s: 120.0, 120)
    assert subject.desired >= 14
    subject.run(lambda at_s: 16.0, 1200)
    assert subject.desired <= 4


def test_a_flash_crowd_meets_the_ceiling_and_not_more() -> None:
    subject = world()
    subject.run(lambda at_s: 1.0, 600)
    subject.run(lambda at_s: 10_000.0, 600)
    assert max(subject.history) == 20
    assert subject.reasons[-1] == "limited"
    subject.run(lambda at_s: 1.0, 1800)
    assert subject.desired <= 2


def test_an_outage_of_the_metrics_holds_and_then_resumes() -> None:
    for silence in (
        {"rate": None},
        {"rate": 0.0, "stale": ("traffic",)},
        {"rate": -3.0},
        {"rate": 1.0, "interval_s": math.nan},
        {"rate": 1.0, "interval_s": math.inf},
        {"rate": 1.0, "interval_s": -10.0},
        {"rate": 1.0, "interval_s": 0.0},
    ):
        subject = world()
        subject.run(lambda at_s: 40.0, 1800)
        before = subject.desired
        for _ in range(360):
            subject.step(**silence)  # type: ignore[arg-type] # one of the ways in which metrics go missing
        assert subject.desired == before
        assert set(subject.reasons[-360:]) == {"no_traffic_data"}
        subject.run(lambda at_s: 8.0, 1200)
        assert subject.desired < before


def test_latencies_that_cannot_be_true_are_left_out() -> None:
    subject, plain, late = (world() for _ in range(3))
    for _ in range(360):
        subject.step(40.0, latencies_s=(math.nan, -1.0, math.inf) * 40)
        plain.step(40.0)
        late.step(40.0, latencies_s=(9.0,) * 120)
    assert subject.history == plain.history
    # Those that can be true do matter.
    assert late.desired > plain.desired


def test_the_floor_is_enforced_without_metrics() -> None:
    subject = world(min_replicas=3)
    subject.step(None)
    assert subject.desired == 3


def test_a_clock_jump_holds_and_then_resumes() -> None:
    for jump_s in (-5000.0, 50_000.0):
        subject = world()
        subject.now_s = 10_000
        subject.run(lambda at_s: 40.0, 1800)
        before = subject.desired
        subject.now_s += jump_s
        subject.step(1.0)
        assert (subject.desired, subject.reasons[-1]) == (before, "clock_jump")
        subject.run(lambda at_s: 80.0, 600)
        assert subject.desired >= needed(80)


def test_replicas_that_never_get_ready_are_noticed_and_seldom_asked_for() -> None:
    subject = world(start_timeout_s=120)
    subject.startup_s = math.inf
    subject.run(lambda at_s: min(8.0 + at_s / 60, 150.0), DAY_S / 4)
    asks = sum(two > one for one, two in zip([1, *subject.history], subject.history, strict=False))
    assert "never_ready" in subject.reasons
    assert asks <= 20
    subject.startup_s = 60.0
    subject.ready = subject.desired
    subject._due.clear()
    subject.run(lambda at_s: 150.0, 1200)
    assert subject.ready >= needed(150)


@pytest.mark.parametrize("policy", ["keep", "revert"])
def test_manual_edits_are_never_fought_over(policy: str) -> None:
    subject = world("constant", manual_edits=policy, manual_hold_s=600)
    subject.run(lambda at_s: 36.0, 600)
    assert subject.desired == 5
    fights = 0
    for _ in range(360):
        if subject.desired != 9:
            subject.edit(9)
        subject.step(36.0)
        fights += subject.desired != 9
    assert fights <= 10
    # Kept, an edit stands; reverted, it is undone at least once.
    assert policy == "keep" or fights >= 1
    subject.run(lambda at_s: 36.0, 6 * 3600)
    assert subject.desired == 5


def load_at(step: int) -> float:
    return 8.0 if step < 10 or step >= 60 else 64.0


@pytest.mark.parametrize("window_s", [10, 30])
def test_a_successor_continues_without_a_double_step(window_s: int) -> None:
    def fresh() -> World:
        return world("constant", planning_quantile=0.5, throughput_interval_s=window_s)

    alone = fresh()
    for step in range(120):
        alone.step(load_at(step))
    assert (max(alone.history), alone.history[-1]) == (needed(64), needed(8))
    for killed_after in range(1, 100):
        subject = fresh()
        for step in range(120):
            if step == killed_after:
                subject.planner = fresh().planner
            subject.step(load_at(step))
        # A double step would ask for sixteen; neither planner ever asks for more than is needed.
        assert max(subject.history) == needed(64)
        # Up in no more steps than one planner takes, and with no way back in between; then down the same way.
        assert steps_of(subject.history[:60]) <= steps_of(alone.history[:60])
        assert subject.history[:60] == sorted(subject.history[:60])
        assert subject.history[60:] == sorted(subject.history[60:], reverse=True)
        assert subject.history[-1] == needed(8)
        # Late by what was forgotten: a window that was being built, and on the way down the delay.
        behind = [one != two for one, two in zip(subject.history, alone.history, strict=True)]
        assert sum(behind[:60]) <= window_s / TICK_S + 1
        assert sum(behind[60:]) <= (120 + window_s) / TICK_S + 1


def steps_of(history: list[int]) -> int:
    return sum(one != two for one, two in itertools.pairwise(history))


def test_one_decision_with_a_constant_forecaster_is_the_same_as_by_hand() -> None:
    planner = create_planner(PlannerSettings(requests_per_replica_s=10, interval_s=30), ConstantPredictor)
    pools = {"worker": PoolState(ready=1, desired=1)}
    decision = planner.decide(Observation(0.0, (TrafficStats("m", 30.0, requests=720),), pools))
    assert decision.replicas == {"worker": 3}
