from __future__ import annotations

import pytest

from dynamo_core.errors import ConfigurationError, InvalidRequestError
from dynamo_core.load import ReportedLoad
from dynamo_core.planning import Observation, Planner, PoolState, ScalingDecision, TrafficStats
from dynamo_core.testing import PlannerConformance
from dynamo_planner import ConstantPredictor, PlannerSettings, SlaPlanner, create_planner

SETTINGS = PlannerSettings(
    requests_per_replica_s=10,
    utilization=0.5,
    max_replicas=4,
    interval_s=10,
    throughput_interval_s=10,
    scale_down_delay_s=60,
)


def planner(**changes: object) -> SlaPlanner:
    return create_planner(PlannerSettings(**{**SETTINGS.model_dump(), **changes}), ConstantPredictor)


def seen(at_s: float, rate: float | None, desired: int, **pool: float) -> Observation:
    traffic = () if rate is None else (TrafficStats("m", 10.0, requests=round(rate * 10)),)
    state = PoolState(**{"ready": desired, "desired": desired, **pool})  # type: ignore[arg-type] # values by name
    return Observation(at_s=at_s, traffic=traffic, pools={"worker": state})


def wants(decision: ScalingDecision) -> tuple[int, str]:
    return decision.replicas["worker"], decision.reason


class TestRate(PlannerConformance):
    def make_planner(self) -> Planner:
        return create_planner(SETTINGS)


class TestAnalyticWithBothParts(PlannerConformance):
    def make_planner(self) -> Planner:
        return planner(capacity="analytic", enable_load_scaling=True)


class TestDisaggregated(PlannerConformance):
    def make_planner(self) -> Planner:
        return planner(mode="disagg", capacity="analytic", max_gpu_budget=6)

    def roles(self) -> tuple[str, ...]:
        return ("prefill", "decode")


class TestLearned(PlannerConformance):
    def make_planner(self) -> Planner:
        return planner(capacity="learned", enable_load_scaling=True)


class TestThresholds(PlannerConformance):
    def make_planner(self) -> Planner:
        return planner(optimization_target="latency")


def test_more_traffic_scales_up_at_once_and_explains_itself() -> None:
    decision = planner().decide(seen(0, 12.0, 1))
    assert wants(decision) == (3, "scale_up")
    assert decision.values["observed_requests_per_second"] == 12.0
    assert decision.values["worker.needed_replicas"] == 3.0
    assert decision.previous == {"worker": 1}
    assert decision.explanation == "3 replicas are needed"
    assert decision.reasons == {"throughput": "scale", "worker": "scale_up"}


def test_the_ceiling_limits_and_says_so() -> None:
    assert wants(planner().decide(seen(0, 100.0, 4))) == (4, "limited")
    assert "limited to 4 by 1..4" in planner().decide(seen(0, 100.0, 1)).explanation


def test_less_traffic_scales_down_only_after_the_whole_delay() -> None:
    subject = planner()
    assert wants(subject.decide(seen(0, 20.0, 4))) == (4, "no_change")
    for at_s in range(10, 60, 10):
        assert wants(subject.decide(seen(at_s, 1.0, 4))) == (4, "scale_down_delayed")
    assert wants(subject.decide(seen(61, 1.0, 4))) == (1, "scale_down")


def test_a_slow_start_up_makes_for_a_longer_delay() -> None:
    subject = planner()
    for at_s in range(0, 200, 10):
        assert wants(subject.decide(seen(at_s, 1.0, 4, startup_s=200.0)))[0] == 4
    assert wants(subject.decide(seen(200, 1.0, 4, startup_s=200.0))) == (1, "scale_down")


def test_scale_down_stops_at_the_highest_need_within_the_delay() -> None:
    subject = planner()
    subject.decide(seen(0, 20.0, 4))
    subject.decide(seen(50, 10.0, 4))
    assert wants(subject.decide(seen(70, 1.0, 4))) == (2, "scale_down")


def test_nothing_is_let_go_while_replicas_drain() -> None:
    subject = planner(scale_down_delay_s=0.0)
    assert wants(subject.decide(seen(0, 1.0, 3, draining=1))) == (3, "scaling_in_progress")


@pytest.mark.parametrize(
    "traffic",
    [
        (),
        (TrafficStats("m", float("nan"), requests=5),),
        (TrafficStats("m", -10.0, requests=5),),
        (TrafficStats("m", 10.0, requests=-5),),
    ],
)
def test_missing_or_impossible_traffic_holds_and_enforces_the_floor(traffic: tuple[TrafficStats, ...]) -> None:
    for desired, held in ((3, 3), (0, 1)):
        item = Observation(at_s=0, traffic=traffic, pools={"worker": PoolState(ready=desired, desired=desired)})
        assert wants(planner().decide(item)) == (held, "no_traffic_data")


def test_traffic_that_is_stale_does_not_count() -> None:
    stale = Observation(
        at_s=0, traffic=(TrafficStats("m", 10.0),), pools={"worker": PoolState(desired=3)}, stale=("traffic",)
    )
    assert wants(planner().decide(stale)) == (3, "no_traffic_data")


def test_an_unknown_pool_changes_nothing() -> None:
    decision = planner().decide(Observation(at_s=0, pools={"other": PoolState(desired=2)}))
    assert (decision.replicas, decision.reason) == ({}, "no_pool_data")


def test_a_clock_that_jumps_holds_once_and_resumes() -> None:
    subject = planner()
    for at_s in range(0, 60, 10):
        subject.decide(seen(at_s, 1.0, 3))
    assert wants(subject.decide(seen(100_000, 1.0, 3))) == (3, "clock_jump")
    assert wants(subject.decide(seen(0, 1.0, 3))) == (3, "clock_jump")
    assert wants(subject.decide(seen(10, 1.0, 3))) == (3, "scale_down_delayed")
    for at_s in range(20, 71, 10):
        last = subject.decide(seen(at_s, 1.0, 3))
    assert wants(last) == (1, "scale_down")


def test_replicas_that_never_get_ready_are_not_asked_for_again_and_again() -> None:
    subject, desired, asks = planner(start_timeout_s=100), 1, []
    for at_s in range(0, 1200, 10):
        decision = subject.decide(seen(at_s, 6.0 if at_s < 300 else 18.0, desired, ready=1, starting=desired - 1))
        if decision.replicas["worker"] != desired:
            asks.append((at_s, decision.replicas["worker"]))
        desired = decision.replicas["worker"]
    assert asks[0] == (0, 2)
    assert len(asks) == 2
    stuck = subject.decide(seen(1200, 18.0, 2, ready=1, starting=1))
    assert desired == 4 or stuck.reason == "never_ready"


def test_a_manual_edit_is_kept_and_a_decision_follows_later() -> None:
    subject = planner(manual_hold_s=100)
    subject.decide(seen(0, 4.0, 1))
    assert wants(subject.decide(seen(10, 4.0, 3))) == (3, "manual_edit_kept")
    assert wants(subject.decide(seen(100, 20.0, 3))) == (3, "manual_edit_kept")
    assert wants(subject.decide(seen(110, 20.0, 3))) == (4, "scale_up")


def test_a_manual_edit_is_reverted_by_policy() -> None:
    subject = planner(manual_edits="revert", manual_hold_s=100)
    subject.decide(seen(0, 4.0, 1))
    assert wants(subject.decide(seen(10, 4.0, 3))) == (1, "manual_edit_reverted")
    assert wants(subject.decide(seen(20, 4.0, 3))) == (3, "manual_edit_kept")


def test_scale_to_zero_after_silence_and_wake_on_the_first_request() -> None:
    subject = planner(min_replicas=0, idle_s=100)
    desired = 1
    for at_s in range(0, 300, 10):
        decision = subject.decide(seen(at_s, 4.0 if at_s < 50 else 0.0, desired))
        desired = decision.replicas["worker"]
    assert desired == 0
    assert wants(subject.decide(seen(300, 0.0, 0)))[0] == 0
    assert wants(subject.decide(seen(310, 0.1, 0))) == (1, "wake")


def test_an_override_holds_until_it_expires_and_stays_in_the_limits() -> None:
    subject = planner()
    subject.override("worker", 4, until_s=50)
    assert wants(subject.decide(seen(0, 1.0, 1))) == (4, "override")
    assert subject.overrides(10) == {"worker": {"replicas": 4, "until_s": 50}}
    assert subject.overrides(50) == {}
    with pytest.raises(InvalidRequestError, match=r"outside 1\.\.4"):
        subject.override("worker", 9, until_s=50)
    with pytest.raises(InvalidRequestError, match="not planned"):
        subject.override("nobody", 1, until_s=50)
    subject.override("worker", None, until_s=0)
    assert wants(subject.decide(seen(10, 1.0, 4)))[1] == "scale_down_delayed"


def test_prefill_and_decode_are_sized_by_their_own_work() -> None:
    subject = planner(mode="disagg", capacity="analytic", max_replicas=20, engine_speedup=0.5)
    pools = {role: PoolState(ready=1, desired=1) for role in ("prefill", "decode")}

    def sized(prompt: int, output: int) -> dict[str, int]:
        traffic = TrafficStats("m", 10.0, requests=100, prompt_tokens=100 * prompt, output_tokens=100 * output)
        item = Observation(at_s=0, traffic=(traffic,), pools=pools)
        return dict(planner_again().decide(item).replicas)

    def planner_again() -> SlaPlanner:
        return planner(mode="disagg", capacity="analytic", max_replicas=20, engine_speedup=0.5)

    assert subject.budget.max_gpus == 40
    long_prompts, long_outputs = sized(4000, 50), sized(200, 1000)
    assert long_prompts["prefill"] > long_outputs["prefill"]
    assert long_outputs["decode"] > long_prompts["decode"]


def test_throughput_is_the_floor_of_load() -> None:
    subject = planner(enable_load_scaling=True, capacity="analytic", engine_speedup=0.3, max_replicas=9)
    idle = {str(worker): ReportedLoad(kv_total_blocks=100) for worker in range(6)}
    traffic = TrafficStats("m", 10.0, requests=80, prompt_tokens=80_000, output_tokens=8_000)
    item = Observation(at_s=0, traffic=(traffic,), pools={"worker": PoolState(ready=6, desired=6)}, loads=idle)
    decision = subject.decide(item)
    assert decision.reasons["throughput"] == "set_lower_bound"
    assert decision.reasons["load.worker"] in ("scale_down", "scale_down_capped_by_throughput")
    assert decision.replicas["worker"] >= decision.values["worker.needed_replicas"] >= 2


def test_limits_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="max_gpu_budget"):
        planner(mode="disagg", min_replicas=3, prefill_gpus=4, max_gpu_budget=8)
