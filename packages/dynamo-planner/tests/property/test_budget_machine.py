"""The budget holds at every instant, whatever the fleet and its operators do between decisions."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dynamo_core.planning import Observation, PoolState, TrafficStats
from dynamo_planner import ConstantPredictor, PlannerSettings, SlaPlanner, create_planner

GPUS = {"prefill": 2, "decode": 4}
CEILING = 24
COUNTS = st.integers(0, 5)


class Fleet(RuleBasedStateMachine):
    """Two pools whose replicas start, fail and drain at any pace; the planner's requests are carried out at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.planner = self.new_planner()
        self.desired = {"prefill": 1, "decode": 1}
        self.ready = {"prefill": 1, "decode": 1}
        self.draining = {"prefill": 0, "decode": 0}
        self.edited = False

    def new_planner(self) -> SlaPlanner:
        options = PlannerSettings(
            mode="disagg",
            capacity="analytic",
            engine_speedup=0.2,
            prefill_gpus=2,
            decode_gpus=4,
            max_gpu_budget=CEILING,
            max_replicas=10,
            interval_s=10,
            throughput_interval_s=10,
            scale_down_delay_s=20,
            start_timeout_s=60,
        )
        return create_planner(options, ConstantPredictor)

    @initialize(seconds=st.floats(0, 1e9))
    def start(self, seconds: float) -> None:
        self.now_s = seconds

    @rule(requests=st.integers(0, 3000), prompt=st.integers(1, 9000), output=st.integers(1, 900))
    def decide(self, requests: int, prompt: int, output: int) -> None:
        stats = TrafficStats("m", 10.0, requests, requests * prompt, requests * output)
        self.tick((stats,))

    @rule()
    def decide_blind(self) -> None:
        self.tick(())

    @rule(role=st.sampled_from(["prefill", "decode"]), count=COUNTS)
    def get_ready(self, role: str, count: int) -> None:
        self.ready[role] = min(self.desired[role], self.ready[role] + count)

    @rule(role=st.sampled_from(["prefill", "decode"]), count=COUNTS)
    def crash(self, role: str, count: int) -> None:
        self.ready[role] = max(0, self.ready[role] - count)

    @rule(role=st.sampled_from(["prefill", "decode"]), count=COUNTS)
    def finish_draining(self, role: str, count: int) -> None:
        self.draining[role] = max(0, self.draining[role] - count)

    @rule(seconds=st.floats(0, 5000))
    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds

    @rule()
    def kill_the_planner(self) -> None:
        self.planner = self.new_planner()

    @rule(role=st.sampled_from(["prefill", "decode"]), count=st.integers(0, 3))
    def edit_by_hand(self, role: str, count: int) -> None:
        """Someone sets a count that itself fits what is free."""
        others = self.held() - GPUS[role] * max(self.desired[role], self.ready[role])
        if others + GPUS[role] * count <= CEILING:
            self.scale(role, count)

    def tick(self, traffic: tuple[TrafficStats, ...]) -> None:
        self.now_s += 10
        pools = {
            role: PoolState(
                ready=self.ready[role],
                starting=max(0, self.desired[role] - self.ready[role]),
                draining=self.draining[role],
                desired=self.desired[role],
            )
            for role in GPUS
        }
        decision = self.planner.decide(Observation(self.now_s, traffic, pools))
        # In any order: no order of carrying out the two roles may exceed the budget in between.
        for role in sorted(decision.replicas, key=lambda role: self.desired[role] - decision.replicas[role]):
            self.scale(role, decision.replicas[role])
            assert self.held() <= CEILING

    def scale(self, role: str, count: int) -> None:
        leaving = max(0, self.ready[role] - count)
        self.draining[role] += leaving
        self.ready[role] -= leaving
        self.desired[role] = count

    def held(self) -> int:
        counts = {role: max(self.desired[role], self.ready[role]) + self.draining[role] for role in GPUS}
        return sum(gpus * counts[role] for role, gpus in GPUS.items())

    @invariant()
    def within_budget(self) -> None:
        assert self.held() <= CEILING


def test_the_machine_reaches_the_ceiling_and_growth_waits_for_what_drains() -> None:
    fleet = Fleet()
    for _ in range(6):
        fleet.decide(3000, 9000, 900)
        fleet.get_ready("prefill", 5)
        fleet.get_ready("decode", 5)
    assert fleet.held() > CEILING - min(GPUS.values())
    assert fleet.desired == {"prefill": 4, "decode": 4}
    for _ in range(6):
        # Few requests whose outputs are long still: prefill shrinks, and decode would like what it frees.
        fleet.decide(10, 9000, 1)
    assert (fleet.desired["prefill"], fleet.draining["prefill"]) == (2, 2)
    assert fleet.desired["decode"] == 4
    fleet.finish_draining("prefill", 2)
    fleet.decide(10, 9000, 1)
    assert fleet.desired["decode"] == 5


TestFleet = Fleet.TestCase
TestFleet.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestFleet = pytest.mark.timeout(300)(TestFleet)
