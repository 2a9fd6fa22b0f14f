from __future__ import annotations

import random

import pytest

from dynamo_core.cards import ModelCard, ModelRuntimeConfig
from dynamo_core.events import BlockRemoved, BlockStored, KvEventBatch
from dynamo_core.ids import WorkerId
from dynamo_core.routing import RequestOutcome, RoutingRequest
from dynamo_core.testing import FakeClock
from dynamo_core.tokens import chain_hashes, pack_hashes
from dynamo_router import KvRouter, RouterSettings
from dynamo_router._lab_worker import BlockCache
from dynamo_router._truth import MIN_SAMPLES, IndexMode, TruthScore

A = WorkerId(1)


def test_belief_is_lost_and_won_with_a_margin():
    score = TruthScore()
    for _ in range(MIN_SAMPLES - 1):
        score.add(100, 0)
    assert (score.score, score.trusted) == (None, True)
    score.add(100, 0)
    assert (score.score, score.trusted) == (0.0, False)
    while score.score < 0.55:
        score.add(1000, 1000)
    assert not score.trusted
    score.add(10_000, 10_000)
    assert score.trusted
    score.add(0, 0)
    score.reset()
    assert score.score is None


class Engine:
    """A worker with a real cache whose event stream can be spoilt."""

    def __init__(self, fault):
        self.cache, self.fault, self.held, self.event_id = BlockCache(60), fault, set(), 0
        self.rng = random.Random(3)

    def serve(self, local):
        names = chain_hashes(local)
        cached = self.cache.depth(names)
        evicted = self.cache.pin(names)
        self.cache.unpin(names)
        if self.fault == "engine without prefix cache":
            cached, evicted = 0, []
        events = []
        if evicted and self.fault != "lost removals":
            events.append(BlockRemoved(self.next_id(), pack_hashes(evicted)))
        if cached < len(names) and not (self.fault == "lost stores" and self.rng.random() < 0.9):
            parent = names[cached - 1] if cached else None
            sent, contents = pack_hashes(names[cached:]), pack_hashes(local[cached:])
            events.append(BlockStored(self.next_id(), sent, contents, parent))
        if self.fault == "engine without prefix cache":
            self.cache = BlockCache(60)
        return cached * 16, events

    def next_id(self):
        self.event_id += 1
        return self.event_id


async def run(fault, requests=200):
    router = KvRouter(block_size=16, clock=FakeClock(), settings=RouterSettings(receipts="off"))
    card = ModelCard("m", kv_block_size=16, runtime_config=ModelRuntimeConfig(total_kv_blocks=60))
    router.upsert_worker(A, card)
    engine, rng, modes = Engine(fault), random.Random(1), []
    for number in range(requests):
        topic = rng.randrange(20)
        local = [topic * 100 + block for block in range(rng.randrange(4, 16))]
        asked = RoutingRequest(
            str(number), prompt_tokens=16 * len(local) + 5, block_size=16, local_hashes=pack_hashes(local)
        )
        decision = await router.select(asked)
        cached, events = engine.serve(local)
        if events:
            router.apply_events(KvEventBatch(A, tuple(events), 16))
        router.complete(decision.reservation, RequestOutcome(decision.decision_id, cached_tokens=cached))
        modes.append(decision.index_mode)
    return router, modes


@pytest.mark.parametrize(
    ("fault", "mode"),
    [
        ("none", "exact"),
        ("lost stores", "approximate"),
        ("lost removals", "approximate"),
        ("engine without prefix cache", "load-only"),
    ],
)
async def test_each_fault_is_seen_and_answered(fault, mode):
    router, modes = await run(fault)
    assert modes[-1] == mode
    assert modes[100] == mode, "the fault must be seen within 100 requests"
    if fault == "none":
        assert set(modes[1:]) == {"exact"}
        assert router.truth_of(A) == 1.0
    else:
        assert router.truth_of(A) < 0.5


async def test_a_dump_restores_belief():
    router, _ = await run("lost removals")
    assert router.index_modes() == {A: IndexMode.APPROXIMATE}
    router.apply_events(KvEventBatch(A, (BlockStored(9999, pack_hashes([5]), pack_hashes([5])),), 16, full_dump=True))
    assert router.index_modes() == {A: IndexMode.EXACT}
    assert router.truth_of(A) is None
    router.refresh_metrics()
    sample = router.metrics.registry.get_sample_value
    assert sample("dynamo_router_index_mode_workers", {"model": "", "mode": "exact"}) == 1


async def test_without_events_own_decisions_predict():
    router = KvRouter(block_size=16, clock=FakeClock(), settings=RouterSettings(use_kv_events=False))
    for number in (1, 2, 3):
        router.upsert_worker(WorkerId(number), ModelCard("m", kv_block_size=16))
    asked = RoutingRequest("r", block_size=16, sequence_hashes=pack_hashes(chain_hashes(range(9))), prompt_tokens=150)
    first = await router.select(asked)
    router.complete(first.reservation, RequestOutcome(first.decision_id))
    second = await router.select(asked)
    assert second.worker == first.worker
    assert (second.cached_tokens, second.index_mode) == (144, "approximate")
