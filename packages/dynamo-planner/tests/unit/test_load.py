from __future__ import annotations

import pytest

from dynamo_core.load import ReportedLoad
from dynamo_core.planning import Observation, PoolState
from dynamo_planner._capacity import Slo
from dynamo_planner._load import TARGET_THRESHOLDS, LatencyRule, LoadPart, Thresholds
from dynamo_planner._reasons import Reason
from dynamo_planner._timing import AnalyticTiming

BOTH = {"worker": (True, True)}
SPLIT = {"prefill": (True, False), "decode": (False, True)}


def load(queued: int = 0, kv: int = 0, active: int = 0) -> ReportedLoad:
    return ReportedLoad(kv, 100, active_requests=active, waiting_prefill_tokens=queued)


def seen(*loads: ReportedLoad, roles: dict[str, str] | None = None, stale: tuple[str, ...] = ()) -> Observation:
    named = {str(place): item for place, item in enumerate(loads)}
    return Observation(at_s=0, loads=named, roles=roles or {}, stale=stale)


def answer(part: LoadPart, observation: Observation, role: str = "worker", **pool: int) -> tuple[int | None, Reason]:
    count = len(observation.loads)
    proposal = part.propose(observation, role, PoolState(**{"ready": count, "desired": count, **pool}))
    return proposal.replicas.get(role), proposal.reason


@pytest.mark.parametrize(
    ("loads", "wanted", "reason"),
    [
        ([load(queued=8192)] * 2, 3, Reason.SCALE_UP),
        ([load(queued=8192 * 5)] * 4, 8, Reason.SCALE_UP),
        ([load(kv=100)] * 2, 3, Reason.SCALE_UP),
        ([load(queued=4000, kv=50)] * 2, 2, Reason.NO_CHANGE),
        ([load(kv=40)] * 4, 3, Reason.SCALE_DOWN),
        ([load(kv=55)] * 2, 2, Reason.SCALE_DOWN_REFUSED_CONSOLIDATION),
    ],
)
def test_static_thresholds(loads: list[ReportedLoad], wanted: int, reason: Reason) -> None:
    assert answer(LoadPart(TARGET_THRESHOLDS["throughput"], BOTH), seen(*loads)) == (wanted, reason)


def test_each_target_has_its_thresholds_and_load_its_own() -> None:
    busy = seen(*[load(kv=45)] * 2)
    assert answer(LoadPart(TARGET_THRESHOLDS["latency"], BOTH), busy)[1] is Reason.SCALE_UP
    assert answer(LoadPart(Thresholds(kv_up=0.9, kv_down=0.5), BOTH), seen(*[load(kv=44)] * 4))[0] == 3


def rule(ttft_s: float = 0.5, itl_s: float = 0.05) -> LatencyRule:
    return LatencyRule(AnalyticTiming(), Slo(ttft_s, itl_s))


def test_growth_needs_every_engine_to_miss_its_target() -> None:
    part = LoadPart(rule(), BOTH, context_tokens=1000)
    late, early = load(queued=50_000), load(queued=100)
    assert answer(part, seen(late, late))[1] is Reason.SCALE_UP
    assert answer(part, seen(late, early))[1] is not Reason.SCALE_UP


def test_a_consolidation_must_leave_the_survivors_within_their_targets() -> None:
    part = LoadPart(rule(), BOTH, context_tokens=1000)
    assert answer(part, seen(*[load(kv=5, active=4)] * 3)) == (2, Reason.SCALE_DOWN)
    full = seen(*[load(kv=90, active=60)] * 3)
    assert answer(part, full) == (3, Reason.SCALE_DOWN_REFUSED_CONSOLIDATION)
    assert answer(part, seen(load())) == (1, Reason.NO_CHANGE)


def test_it_waits_while_replicas_start_drain_or_do_not_report() -> None:
    part = LoadPart(Thresholds(), BOTH)
    busy = seen(*[load(queued=90_000)] * 2)
    assert answer(part, busy, starting=1) == (None, Reason.SCALING_IN_PROGRESS)
    assert answer(part, busy, draining=1) == (None, Reason.SCALING_IN_PROGRESS)
    assert answer(part, busy, ready=3) == (None, Reason.WORKER_COUNT_MISMATCH)
    assert answer(part, seen()) == (None, Reason.NO_FPM_DATA)
    assert answer(part, seen(load(), stale=("loads",))) == (None, Reason.NO_FPM_DATA)
    unready = LatencyRule(AnalyticTiming(), Slo(), ready=lambda: False)
    assert answer(LoadPart(unready, BOTH), busy) == (None, Reason.INSUFFICIENT_DATA)


def test_each_role_sees_its_own_engines() -> None:
    part = LoadPart(Thresholds(), SPLIT)
    observation = seen(load(queued=90_000), load(kv=10), roles={"0": "prefill", "1": "decode"})
    assert answer(part, observation, "prefill", ready=1)[1] is Reason.SCALE_UP
    assert answer(part, observation, "decode", ready=1)[1] is not Reason.SCALE_UP
    assert answer(part, seen(load()), "decode")[1] is Reason.NO_FPM_DATA
