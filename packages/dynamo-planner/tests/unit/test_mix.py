"""Choosing among GPU types: the cheapest mix, the budgets, and what runs already."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_core.errors import ConfigurationError
from dynamo_core.planning import Observation, PoolState, ScalingDecision, TrafficStats
from dynamo_planner import ConstantPredictor, PlannerSettings, RateCapacity, SlaPlanner, create_planner
from dynamo_planner._capacity import AggregatedCapacity, Slo, Workload
from dynamo_planner._mix import GpuMix, GpuType
from dynamo_planner._reasons import Reason
from dynamo_planner._timing import AnalyticTiming

SLO = Slo(1.0, 0.1, 99)
BIG, SMALL = RateCapacity(10, 1.0), RateCapacity(3, 1.0)


def types(**changes: Any) -> list[GpuType]:
    return [GpuType("big", 4.0, BIG, **changes), GpuType("small", 1.5, SMALL, **changes)]


def pools(**desired: int) -> dict[str, PoolState]:
    return {role: PoolState(ready=count, desired=count) for role, count in desired.items()}


def chosen(rate: float, now: dict[str, PoolState] | None = None, **limits: Any) -> Any:
    mix = GpuMix("worker", types(), **{"max_gpus": 99, **limits})
    return mix.choose(Workload(rate), SLO, now or pools(big=0, small=0))


def test_the_rest_goes_to_the_small_type_and_a_full_load_to_the_big_one() -> None:
    assert chosen(12).replicas == {"big": 1, "small": 1}
    assert chosen(10).replicas == {"big": 1, "small": 0}
    assert chosen(3).replicas == {"big": 0, "small": 1}
    choice = chosen(12)
    assert choice.reason is Reason.MIX_CHEAPEST
    assert choice.values["mix.worker.price_per_hour"] == 5.5
    assert choice.values["big.alone_price_per_hour"] == 8.0
    assert choice.note == "1 big + 1 small at 5.50 an hour; big alone 8.00, small alone 6.00"


@given(
    st.lists(st.tuples(st.floats(0.5, 9), st.floats(0.5, 20), st.integers(1, 3)), min_size=1, max_size=3),
    st.floats(0, 60),
    st.integers(1, 14),
)
def test_the_search_finds_what_trying_every_mix_finds(
    kinds: list[tuple[float, float, int]], rate: float, budget: int
) -> None:
    made = [
        GpuType(str(place), price, RateCapacity(speed, 0.8), gpus, most=5)
        for place, (price, speed, gpus) in enumerate(kinds)
    ]
    choice = GpuMix("m", made, max_gpus=budget).choose(Workload(rate), SLO, {kind.role: PoolState() for kind in made})
    best = math.inf
    for counts in itertools.product(range(6), repeat=len(made)):
        serves = sum(n * speed * 0.8 for n, (_, speed, _) in zip(counts, kinds, strict=True)) >= rate - 1e-9
        fits = sum(n * gpus for n, (_, _, gpus) in zip(counts, kinds, strict=True)) <= budget
        if serves and fits:
            best = min(best, sum(n * price for n, (price, _, _) in zip(counts, kinds, strict=True)))
    if math.isfinite(best):
        assert choice.values["mix.m.price_per_hour"] == pytest.approx(best)
    else:
        assert choice.reason is Reason.MIX_LIMITED
    assert sum(choice.replicas[kind.role] * kind.gpus for kind in made) <= budget


def test_one_type_alone_needs_what_its_model_says() -> None:
    model = AggregatedCapacity(AnalyticTiming(0.5))
    for rate in (0.5, 5.0, 30.0, 90.0):
        for expected in (None, rate * 0.8):
            load = Workload(rate, 1000, 200, expected_s=expected)
            alone = GpuMix("m", [GpuType("a", 1.0, model, most=99)], max_gpus=99)
            assert alone.choose(load, SLO, pools(a=0)).replicas == {"a": model.need(load, SLO).replicas}


def test_a_type_that_misses_the_targets_is_left_out_unless_all_do() -> None:
    fast, slow = AnalyticTiming(1.0), AnalyticTiming(0.05)
    kinds = [
        GpuType("fast", 9.0, AggregatedCapacity(fast), most=50),
        GpuType("slow", 0.01, AggregatedCapacity(slow), most=50),
    ]
    load = Workload(10.0, 4000, 200)
    now = pools(fast=0, slow=0)
    choice = GpuMix("m", kinds, max_gpus=99).choose(load, SLO, now)
    assert choice.replicas["fast"] > 0
    assert choice.replicas["slow"] == 0
    assert choice.values["slow.meets_slo"] == 0.0
    hopeless = GpuMix("m", kinds, max_gpus=99).choose(load, replace(SLO, ttft_s=0.01), now)
    assert hopeless.values["fast.meets_slo"] == 0.0
    assert sum(hopeless.replicas.values()) > 0


def test_budgets_hold_and_what_nothing_serves_gets_the_largest_mix() -> None:
    assert chosen(20, max_price_per_hour=9.0).replicas == {"big": 2, "small": 0}
    limited = chosen(200, max_gpus=3)
    assert (limited.reason, limited.replicas) == (Reason.MIX_LIMITED, {"big": 3, "small": 0})
    assert chosen(200, max_price_per_hour=9.6).replicas == {"big": 2, "small": 1}


def test_what_runs_is_kept_for_small_change_and_replaced_for_much() -> None:
    # Four small ones serve 12 for 6.00; the cheapest, 5.50, saves less than a tenth.
    kept = chosen(12, pools(big=0, small=4))
    assert (kept.reason, kept.replicas) == (Reason.MIX_KEPT, {"big": 0, "small": 4})
    # Seven small ones serve 20 for 10.50; two big ones cost 8.00.
    switched = chosen(20, {"big": PoolState(ready=0, desired=0), "small": PoolState(ready=7, desired=7)})
    assert switched.reason is Reason.MIX_CHEAPEST
    # Until the big ones serve, the small ones stay.
    assert switched.replicas == {"big": 2, "small": 7}
    starting = {"big": PoolState(ready=1, starting=1, desired=2), "small": PoolState(ready=7, desired=7)}
    assert chosen(20, starting).replicas == {"big": 2, "small": 7}
    assert chosen(20, pools(big=2, small=7)).replicas == {"big": 2, "small": 0}
    # Where both do not fit side by side, what runs stays.
    assert chosen(20, pools(big=0, small=7), max_gpus=8).replicas == {"big": 0, "small": 7}


SETTINGS = {
    "interval_s": 10,
    "throughput_interval_s": 10,
    "scale_down_delay_s": 30,
    "start_timeout_s": 60,
    "utilization": 1.0,
    "max_gpu_budget": 12,
    "gpu_types": {
        "h100": {"price_per_hour": 4, "requests_per_replica_s": 10, "min_replicas": 0},
        "l40s": {"price_per_hour": 1.5, "requests_per_replica_s": 3},
    },
}


def planner(**changes: Any) -> SlaPlanner:
    return create_planner(PlannerSettings.model_validate({**SETTINGS, **changes}), ConstantPredictor)


def decide(subject: SlaPlanner, at_s: float, rate: float, now: dict[str, PoolState]) -> ScalingDecision:
    return subject.decide(Observation(at_s, (TrafficStats("m", 10.0, requests=round(rate * 10)),), now))


def test_a_decision_tells_which_mix_and_why() -> None:
    decision = decide(planner(), 0, 13, pools(h100=1, l40s=0))
    assert decision.replicas == {"h100": 1, "l40s": 1}
    assert decision.reasons["mix.worker"] == "mix_cheapest"
    assert decision.reason == "scale_up"
    assert decision.values["mix.worker.price_per_hour"] == 5.5
    assert decision.values["h100.alone_price_per_hour"] == 8.0
    assert "worker: 1 h100 + 1 l40s at 5.50 an hour; h100 alone 8.00, l40s alone 7.50" in decision.explanation


def test_a_type_that_cannot_be_had_is_made_up_for_by_another_and_not_asked_for_in_a_loop() -> None:
    subject, desired, asked = planner(), {"h100": 1, "l40s": 0}, []
    for tick in range(120):
        # Not one more h100 gets ready.
        now = {
            "h100": PoolState(ready=1, starting=desired["h100"] - 1, desired=desired["h100"]),
            "l40s": PoolState(ready=desired["l40s"], desired=desired["l40s"]),
        }
        wanted = dict(decide(subject, tick * 10.0, 19, now).replicas)
        asked.append(wanted["h100"])
        desired = wanted
    assert asked[0] == 2
    assert sum(one != two for one, two in itertools.pairwise(asked)) <= 3
    assert desired["l40s"] == 3


def test_the_first_request_wakes_the_cheapest_type() -> None:
    subject = planner(min_replicas=0)
    decision = decide(subject, 0, 0.5, pools(h100=0, l40s=0))
    assert (decision.replicas, decision.reason) == ({"h100": 0, "l40s": 1}, "wake")


def test_prefill_and_decode_choose_apart() -> None:
    kinds = {
        "p-big": {"serves": "prefill", "price_per_hour": 4, "speedup": 1.0},
        "p-small": {"serves": "prefill", "price_per_hour": 5, "speedup": 0.4},
        "d": {"serves": "decode", "price_per_hour": 1, "gpus": 2, "speedup": 0.5},
    }
    subject = planner(mode="disagg", capacity="analytic", gpu_types=kinds, max_gpu_budget=40)
    traffic = TrafficStats("m", 10.0, requests=300, prompt_tokens=300_000, output_tokens=30_000)
    now = pools(**{"p-big": 1, "p-small": 0, "d": 1})
    decision = subject.decide(Observation(0.0, (traffic,), now))
    assert set(decision.reasons) >= {"mix.prefill", "mix.decode"}
    assert decision.replicas["p-big"] >= 1
    assert decision.replicas["p-small"] == 0
    assert decision.replicas["d"] >= 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"gpu_types": {"a": {}}}, "GPU type 'a' is wrong: .*price_per_hour"),
        ({"gpu_types": {"a": {"price_per_hour": 0}}}, "give one above 0"),
        ({"gpu_types": {"a": {"price_per_hour": 1, "cost": 2}}}, "cost"),
        ({"gpu_types": {"a": {"price_per_hour": 1, "speedup": -1}}}, "engine_speedup -1"),
        ({"gpu_types": {"a": {"price_per_hour": 1, "serves": "decode"}}}, "serves 'decode'"),
        ({"gpu_types": {str(n): {"price_per_hour": 1} for n in range(7)}}, "at most 6"),
        ({"enable_load_scaling": True}, "without load scaling"),
        ({"optimization_target": "latency"}, "without load scaling"),
        ({"capacity": "learned"}, "use rate, analytic or profile"),
        ({"mode": "disagg", "max_price_per_hour": 3}, "limit mode 'disagg' by GPUs"),
        (
            {"mode": "disagg", "gpu_types": {"a": {"price_per_hour": 1, "serves": "decode"}}},
            r"no GPU type serves \['prefill'\]",
        ),
        ({"gpu_types": {"a": {"price_per_hour": 1, "min_replicas": 9}}}, "9..8 replicas"),
    ],
)
def test_types_that_make_no_sense_are_named(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        planner(**changes)
