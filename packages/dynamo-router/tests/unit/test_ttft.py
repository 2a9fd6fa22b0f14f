from __future__ import annotations

import pytest

from dynamo_core.errors import ConfigurationError
from dynamo_core.ids import WorkerId
from dynamo_core.requests import RoutingHints
from dynamo_core.routing import RoutingPhase
from dynamo_router._policy import PACE_WINDOW_S, Candidate, PrefillQueue, Query
from dynamo_router._ttft import TtftPolicy

PLAIN = {"decode_weight": 0, "overlap_weight": 0, "learn_pace": False, "prefill_tokens_per_s": 1000}


def query(tokens=1600, now=0.0, **hints):
    return Query(
        tokens, tokens // 16, 16, RoutingHints(**hints), RoutingPhase.AGGREGATED, range(1, tokens // 16 + 1), now
    )


def worker(number, *, tiers=(0, 0, 0, 0), queued=(), **facts):
    candidate = Candidate(WorkerId(number), number)
    candidate.tier_blocks = tiers
    candidate.cached_tokens = 16 * sum(tiers)
    for index, tokens in enumerate(queued):
        candidate.prefill.add(str(index), tokens, 0.0)
        candidate.prefill_tokens += tokens
    for name, value in facts.items():
        setattr(candidate, name, value)
    return candidate


def test_predicts_queue_and_own_prefill():
    workers = [worker(1), worker(2, tiers=(50, 0, 0, 0)), worker(3, queued=[500, 500])]
    assert list(TtftPolicy(PLAIN).score(query(), workers)) == [1.6, 0.8, 2.6]


def test_the_oldest_prefill_shrinks_with_time_but_not_below_nothing():
    workers = [worker(3, queued=[500, 400])]
    policy = TtftPolicy(PLAIN)
    assert policy.score(query(now=0.2), workers)[0] == pytest.approx(1.6 + 0.7)
    assert policy.score(query(now=9.0), workers)[0] == pytest.approx(1.6 + 0.4)


def test_lower_tiers_cost_their_transfer():
    costs = TtftPolicy(PLAIN).score(query(), [worker(1, tiers=(10, 20, 0, 0)), worker(2, tiers=(10, 0, 20, 0))])
    assert costs[0] == pytest.approx((1600 - 480 + 20 * 16 * 0.25) / 1000)
    assert costs[1] == pytest.approx((1600 - 480 + 20 * 16 * 0.75) / 1000)


def test_extras_are_weighted_and_terms_sum_to_the_cost():
    policy = TtftPolicy({**PLAIN, "decode_weight": 0.5, "overlap_weight": 0.25})
    workers = [worker(1, tiers=(50, 0, 0, 0)), worker(2, decode_blocks=10)]
    request = query(preferred_taints={"x": 1.0})
    for workers[0].taints in (frozenset(), frozenset({"x"})):
        costs = policy.score(request, workers)
        for cost, terms in zip(costs, policy.terms(request, workers), strict=True):
            assert sum(terms.values()) == pytest.approx(cost)
    assert costs[1] == pytest.approx((1600 + 0.5 * 160 + 0.25 * 800) / 1000)


def test_a_measured_pace_tells_workers_apart():
    fast, slow = worker(1), worker(2)
    for candidate, seconds in ((fast, 1.0), (slow, 10.0)):
        for step in range(20):
            candidate.prefill.add(str(step), 10_000, step * seconds)
            candidate.prefill.finish(str(step), (step + 1) * seconds)
    costs = TtftPolicy({"decode_weight": 0}).score(query(now=200.0), [fast, slow])
    assert costs[1] > 3 * costs[0]
    assert slow.prefill.done_s <= PACE_WINDOW_S + 10.0


def test_a_prefill_queue_learns_only_from_first_tokens():
    queue = PrefillQueue()
    queue.add("a", 100, 5.0)
    queue.add("b", 200, 6.0)
    queue.add("c", 300, 6.5)
    queue.drop("c", 6.7)
    assert queue.since_s == 5.0
    queue.drop("a", 7.0)
    assert (queue.done_tokens, queue.since_s) == (0.0, 7.0)
    queue.finish("b", 9.0)
    assert (queue.done_tokens, queue.done_s) == (200.0, 2.0)
    queue.finish("b", 10.0)
    queue.drop("b", 11.0)
    assert queue.since_s == 9.0


@pytest.mark.parametrize("options", [{"prefill_tokens_per_s": 0}, {"host_weight": 2}, {"decode_weight": -1}])
def test_refuses_options_out_of_range(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        TtftPolicy(options)
