from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from dynamo_core import plugins
from dynamo_core.errors import ConfigurationError, InvalidRequestError
from dynamo_core.ids import WorkerId
from dynamo_core.requests import RoutingHints
from dynamo_core.routing import RoutingPhase
from dynamo_router._cost import KvOptions, KvPolicy, softmax_pick
from dynamo_router._lab_replay import VirtualClock
from dynamo_router._pipeline import REST_S, Pipeline, load_policy, policy_hash
from dynamo_router._policies import LeastLoadedPolicy, NoOptions, RandomPolicy, SimplePolicy
from dynamo_router._policy import RENAMED, Candidate, Policy, Query, least
from dynamo_router._settings import RouterSettings
from dynamo_router._ttft import TtftOptions


def query(tokens=160, size=16, **hints):
    return Query(
        prompt_tokens=tokens,
        blocks=tokens // size,
        block_size=size,
        hints=RoutingHints(**hints),
        phase=RoutingPhase.AGGREGATED,
        hashes=range(1, tokens // size + 1),
        now_s=0.0,
    )


def worker(number, *, device=0, host=0, disk=0, external=0, **facts):
    candidate = Candidate(WorkerId(number), number)
    candidate.tier_blocks = (device, host, disk, external)
    candidate.cached_tokens = 16 * (device + host + disk + external)
    for name, value in facts.items():
        setattr(candidate, name, value)
    return candidate


def pick(name, candidates, *, seed=0, request=None, **options):
    policy = load_policy(name, options)
    return Pipeline(policy, random.Random(seed)).choose(request or query(), candidates).candidate


BUILT_IN = [
    "chwbl",
    "direct",
    "kv",
    "least-loaded",
    "lmetric",
    "power-of-two",
    "prefix-balanced",
    "prefix-threshold",
    "random",
    "round-robin",
    "session-affinity",
    "slo",
    "ttft",
    "weighted",
]


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_policy_keeps_the_contract(name):
    policy = load_policy(name, {})
    workers = [worker(n, prefill_tokens=n * 10, decode_blocks=n, active_requests=n, device=n) for n in range(5)]
    request = query(instance_id=1)
    assert isinstance(policy, Policy)
    assert policy.name == name
    costs = policy.score(request, workers)
    assert len(costs) == len(workers)
    for cost, terms in zip(costs, policy.terms(request, workers), strict=True):
        assert sum(terms.values()) == pytest.approx(cost)
    assert 0 <= policy.pick(costs, workers, random.Random(0)) < len(workers)
    policy.chosen(request, workers[0])
    with pytest.raises(ConfigurationError, match="nonsense"):
        load_policy(name, {"nonsense": 1})


def test_installed_policies_are_found_by_name():
    assert set(BUILT_IN) == set(plugins.available("policies"))
    with pytest.raises(ConfigurationError, match="installed: "):
        load_policy("kw", {})


def test_the_documented_example_costs_18_10_and_11():
    workers = [
        worker(1, device=2, decode_blocks=0, prefill_tokens=0),
        worker(2, device=5, decode_blocks=0, prefill_tokens=0),
        worker(3, device=8, decode_blocks=4, prefill_tokens=0),
    ]
    for candidate, active in zip(workers, [0, 5, 5], strict=True):
        candidate.active_blocks = active
    policy = KvPolicy({})
    assert list(policy.score(query(), workers)) == [18.0, 10.0, 11.0]
    assert pick("kv", workers).worker == WorkerId(2)


def test_one_requests_excess_halves_the_device_credit():
    busy, idle = worker(1, device=10, prefill_tokens=160), worker(2)
    costs = KvPolicy({"credit_decay": 1.0}).score(query(), [busy, idle])
    assert costs[0] == (160 + 160) / 16 - 10 / 2 + 10


def test_active_requests_weigh_in_blocks():
    costs = KvPolicy({"active_request_weight": 32}).score(query(), [worker(1, active_requests=4)])
    assert costs[0] == 10 + 10 + 128


def test_lower_tiers_earn_less_credit():
    tiers = [worker(1, host=4), worker(2, disk=4), worker(3, external=4), worker(4)]
    assert list(KvPolicy({"external_weight": 0.5}).score(query(), tiers)) == [17.0, 19.0, 18.0, 20.0]


def test_prefill_can_be_left_out_and_is_never_negative():
    assert list(KvPolicy({"track_prefill": False}).score(query(), [worker(1, device=3, decode_blocks=2)])) == [12.0]
    terms = KvPolicy({"track_prefill": False}).terms(query(), [worker(1, device=3)])[0]
    assert sum(terms.values()) == 10.0


def test_preferred_taints_lower_the_cost():
    near, far = worker(1, taints=frozenset({"zone-a"})), worker(2)
    request = query(preferred_taints={"zone-a": 1.0})
    policy = KvPolicy({})
    costs = policy.score(request, [near, far])
    assert costs[0] < costs[1]
    assert sum(policy.terms(request, [near, far])[0].values()) == pytest.approx(costs[0])


def test_round_robin_takes_turns_and_passes_over_the_missing():
    policy = load_policy("round-robin", {})
    pipeline = Pipeline(policy, random.Random(0))
    workers = [worker(n) for n in (3, 1, 2)]
    seen = []
    for available in (workers, workers, workers, workers, workers[:1], workers):
        choice = pipeline.choose(query(), available)
        policy.chosen(query(), choice.candidate)
        seen.append(choice.candidate.worker.instance_id)
    assert seen == [1, 2, 3, 1, 3, 1]
    assert pipeline.choose(query(), workers).candidate is pipeline.choose(query(), workers).candidate


def test_random_is_uniform_and_seeded():
    workers = [worker(n) for n in range(4)]
    pipeline = Pipeline(RandomPolicy({}), random.Random(1))
    counts = Counter(pipeline.choose(query(), workers).candidate.slot for _ in range(4000))
    assert all(900 < count < 1100 for count in counts.values())
    assert [pick("random", workers, seed=5).slot for _ in range(5)] == [pick("random", workers, seed=5).slot] * 5


def test_power_of_two_never_takes_the_busiest():
    workers = [worker(n, active_requests=n) for n in range(5)]
    assert 4 not in {pick("power-of-two", workers, seed=seed).slot for seed in range(50)}
    assert pick("power-of-two", workers[:1]).slot == 0


def test_direct_needs_a_pin():
    with pytest.raises(InvalidRequestError, match="instance_id"):
        pick("direct", [worker(1)])
    assert pick("direct", [worker(1)], request=query(instance_id=1)).slot == 1


def test_temperature_spreads_choices_by_cost():
    rng = random.Random(0)
    counts = Counter(softmax_pick([0.0, 1.0, 2.0], 0.5, rng) for _ in range(3000))
    assert counts[0] > counts[1] > counts[2] > 0
    assert softmax_pick([5.0, 5.0], 0.0, rng) in (0, 1)
    assert least([3.0, 1.0, 2.0], rng) == 1


class Broken(SimplePolicy):
    name = "broken"

    def score(self, query, candidates):
        return {"raise": lambda: 1 / 0, "nan": lambda: [float("nan")] * len(candidates), "short": lambda: []}[
            self.mode
        ]()


class BadPick(SimplePolicy):
    name = "bad-pick"

    def pick(self, costs, candidates, rng):
        return len(candidates)


@pytest.mark.parametrize("mode", ["raise", "nan", "short", "pick"])
def test_a_failing_policy_costs_its_advice_only(mode):
    policy = BadPick({}) if mode == "pick" else Broken({})
    policy.mode = mode
    pipeline = Pipeline(policy, random.Random(0))
    choice = pipeline.choose(query(), [worker(1, active_requests=2), worker(2, active_requests=1)])
    assert choice.candidate.worker == WorkerId(2)
    assert choice.policy.name == "least-loaded"
    assert choice.reason.startswith(f"fallback: policy {policy.name} failed")
    assert pipeline.failures == 1


def test_a_margin_is_the_distance_to_the_runner_up():
    pipeline = Pipeline(load_policy("least-loaded", {}), random.Random(0))
    assert pipeline.choose(query(), [worker(1, active_requests=5), worker(2, active_requests=2)]).margin == 3.0
    assert pipeline.choose(query(), [worker(1)]).margin is None


def test_the_policy_hash_tells_options_apart():
    assert policy_hash(KvPolicy({})) == policy_hash(KvPolicy({"temperature": 0}))
    assert policy_hash(KvPolicy({})) != policy_hash(KvPolicy({"temperature": 1}))
    assert NoOptions() == NoOptions()


def test_a_slow_policy_rests_after_three_overruns_and_comes_back():
    clock = VirtualClock()

    class Slow(LeastLoadedPolicy):
        name = "slow"
        step_s = 0.5

        def score(self, query, candidates):
            clock.now_s += self.step_s
            return super().score(query, candidates)

    policy = Slow({})
    pipeline = Pipeline(policy, random.Random(0), clock=clock, budget_s=0.1)
    candidates = [worker(1), worker(2)]
    assert [pipeline.choose(query(), candidates).reason for _ in range(4)] == ["", "", "", "fallback: time budget"]
    assert pipeline.overruns == 3
    assert Pipeline(LeastLoadedPolicy({}), random.Random(0), budget_s=0.1).budget_s == math.inf
    clock.now_s += REST_S
    policy.step_s = 0.05
    assert [pipeline.choose(query(), candidates).policy.name for _ in range(4)] == ["slow"] * 4


@pytest.mark.parametrize(
    ("policy", "options", "ours"),
    [
        ("kv", {"overlap_score_credit": 1.0}, "overlap_score_credit is called overlap_credit here"),
        ("ttft", {"queue_threshold": 16}, "queue_threshold is called busy_prefill_batches here"),
    ],
)
def test_an_option_of_another_router_is_refused_with_its_name_here(policy, options, ours):
    with pytest.raises(ConfigurationError, match=ours):
        load_policy(policy, options)


def test_every_renamed_option_exists():
    known = {*KvOptions.__struct_fields__, *TtftOptions.__struct_fields__, *RouterSettings.model_fields}
    assert set(RENAMED.values()) <= known
    assert not RENAMED.keys() & known
