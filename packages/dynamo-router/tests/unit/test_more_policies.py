from __future__ import annotations

import random
from collections import Counter

import pytest

from dynamo_core.errors import ConfigurationError
from dynamo_core.ids import WorkerId
from dynamo_core.load import ReportedLoad
from dynamo_core.requests import RoutingHints
from dynamo_core.routing import RoutingPhase
from dynamo_router._pipeline import Pipeline, load_policy
from dynamo_router._policy import Candidate, Query


def query(tokens=160, key=1, now=0.0, **hints):
    hashes = range(key, key + tokens // 16)
    return Query(tokens, tokens // 16, 16, RoutingHints(**hints), RoutingPhase.AGGREGATED, hashes, now)


def worker(number, *, device=0, **facts):
    candidate = Candidate(WorkerId(number), number)
    candidate.tier_blocks = (device, 0, 0, 0)
    candidate.cached_tokens = 16 * device
    for name, value in facts.items():
        setattr(candidate, name, value)
    return candidate


def choose(policy, candidates, request=None):
    choice = Pipeline(policy, random.Random(0)).choose(request or query(), candidates)
    assert choice.reason == ""
    policy.chosen(request or query(), choice.candidate)
    return choice.candidate.worker.instance_id


def test_lmetric_multiplies_prefill_and_blocks():
    policy = load_policy("lmetric", {})
    workers = [worker(1, device=5, decode_blocks=9), worker(2, prefill_tokens=32, decode_blocks=1)]
    assert list(policy.score(query(), workers)) == [5 * 20, 12 * 12]


def test_prefix_threshold_takes_a_good_match_unless_the_fleet_is_lopsided():
    policy = load_policy("prefix-threshold", {})
    assert choose(policy, [worker(1, device=6, active_requests=5), worker(2, active_requests=0)]) == 1
    assert choose(policy, [worker(1, device=5, active_requests=5), worker(2, active_requests=0)]) == 2
    assert choose(policy, [worker(1, device=9, active_requests=40), worker(2, active_requests=1)]) == 2
    assert choose(policy, [worker(1, device=9, active_requests=440), worker(2, active_requests=405)]) == 1
    assert list(policy.terms(query(), [worker(1, device=9)])[0]) == ["uncached_tokens"]


def test_prefix_balanced_wants_a_match_near_the_mean():
    policy = load_policy("prefix-balanced", {})
    idle = [worker(n, active_requests=1) for n in range(3, 8)]
    assert choose(policy, [worker(1, device=4, active_requests=2), worker(2, active_requests=1), *idle]) != 1
    assert choose(policy, [worker(1, device=4, active_requests=1), worker(2, active_requests=0), *idle]) == 1
    assert choose(policy, [worker(1, device=4, active_requests=3), worker(2, device=2, active_requests=1), *idle]) == 2
    assert choose(policy, [worker(1, device=4, active_requests=9), worker(2, active_requests=0)]) == 2


def test_weighted_adds_what_each_score_lacks():
    policy = load_policy("weighted", {})
    full = worker(1, device=5, reported=ReportedLoad(kv_used_blocks=10, kv_total_blocks=10))
    terms = policy.terms(query(), [full, worker(2, prefill_tokens=100, decode_blocks=5, total_kv_blocks=10)])
    assert terms[0] == {"prefix": 1.5, "queue": 0.0, "kv": 2.0, "cold_turn": 0.0}
    assert terms[1] == {"prefix": 3.0, "queue": 2.0, "kv": 1.0, "cold_turn": 0.0}


def test_weighted_spreads_cold_prompts_in_turn():
    policy = load_policy("weighted", {})
    workers = [worker(n) for n in (1, 2, 3)]
    turns = [choose(policy, workers, query(key=key * 100)) for key in range(6)]
    assert sorted(turns[:3]) == [1, 2, 3]
    assert turns[3:] == turns[:3]


def test_chwbl_keeps_keys_in_place_and_bounds_load():
    policy = load_policy("chwbl", {})
    workers = [worker(n) for n in range(1, 9)]
    home = {key: choose(policy, workers, query(key=key * 1000)) for key in range(200)}
    assert set(Counter(home.values())) == set(range(1, 9))
    fewer = workers[:-1]
    moved = [key for key in home if choose(policy, fewer, query(key=key * 1000)) != home[key]]
    assert {home[key] for key in moved} == {8}
    by_name = {str(key): choose(policy, workers, query(key=key, session_id="same")) for key in range(9)}
    assert len(set(by_name.values())) == 1
    workers[home[0] - 1].active_requests = 5
    assert choose(policy, workers, query(key=0)) != home[0]
    assert choose(policy, workers, query(tokens=3)) in range(1, 9)


def test_sessions_stay_where_they_were_while_they_can():
    policy = load_policy("session-affinity", {"ttl_s": 10, "max_sessions": 2})
    one, two = worker(1), worker(2)
    first = choose(policy, [one, two], query(session_id="s"))
    for candidate in (one, two):
        candidate.prefill_tokens = 10_000 if candidate.worker.instance_id == first else 0
    assert choose(policy, [one, two], query(now=9.0, session_id="s")) == first
    assert list(policy.terms(query(now=9.0, session_id="s"), [one, two])[0]) == ["not_bound"]
    other = 3 - first
    assert choose(policy, [one, two], query(now=30.0, session_id="s")) == other
    assert choose(policy, [one, two], query(now=31.0)) == other
    for name in ("a", "b"):
        choose(policy, [one, two], query(now=31.0, session_id=name))
    assert len(policy._bound) == 2
    assert "s" not in policy._bound


def test_slo_packs_or_spreads_within_the_promise():
    workers = [worker(1), worker(2, prefill_tokens=8_000), worker(3, prefill_tokens=80_000)]
    for index, candidate in enumerate(workers):
        candidate.prefill.add("x", candidate.prefill_tokens, 0.0)
        assert index + 1 == candidate.worker.instance_id
    assert choose(load_policy("slo", {"ttft_s": 2.0}), workers) == 1
    assert choose(load_policy("slo", {"ttft_s": 2.0, "among_good": "pack"}), workers) == 2
    assert choose(load_policy("slo", {"ttft_s": 0.001}), workers) == 1
    with pytest.raises(ConfigurationError, match="among_good"):
        load_policy("slo", {"among_good": "x"})
