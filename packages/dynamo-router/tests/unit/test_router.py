from __future__ import annotations

import pytest

from dynamo_core.cards import ModelCard, ModelRuntimeConfig
from dynamo_core.enums import FinishReason, Tier
from dynamo_core.errors import CapacityExhaustedError, ConfigurationError, InvalidRequestError, UnavailableError
from dynamo_core.events import BlockStored, KvEventBatch
from dynamo_core.ids import ReservationId, WorkerId
from dynamo_core.load import ReportedLoad
from dynamo_core.requests import RoutingHints
from dynamo_core.routing import (
    RequestOutcome,
    Router,
    RoutingPhase,
    RoutingRequest,
    SupportsReceipts,
    SupportsStaticWorkers,
)
from dynamo_core.testing import FakeClock
from dynamo_core.tokens import BlockHasher, pack_hashes, pack_tokens
from dynamo_router import KvRouter, RouterSettings

CARD = ModelCard("m", kv_block_size=4)
A, B = WorkerId(1), WorkerId(2)
PROMPT = pack_tokens(range(40))


def new(*workers, **options):
    options.setdefault("settings", RouterSettings(receipts="on"))
    options.setdefault("policy", "kv")
    router = KvRouter(block_size=4, clock=FakeClock(), **options)
    for worker in workers:
        router.upsert_worker(worker, CARD)
    return router


def cache(router, worker, tokens=PROMPT, tier=Tier.DEVICE, event_id=1):
    hashes = BlockHasher(4).hash_tokens(tokens)
    router.apply_events(KvEventBatch(worker, (BlockStored(event_id, hashes.sequence, hashes.local, tier=tier),), 4))


def ask(**fields):
    return RoutingRequest(**{"request_id": "r", "token_ids": PROMPT, **fields})


def test_is_what_core_asks_for():
    router = new()
    assert isinstance(router, Router)
    assert isinstance(router, SupportsReceipts)
    assert isinstance(router, SupportsStaticWorkers)


async def test_goes_where_the_prefix_is():
    router = new(A, B)
    cache(router, B)
    decision = await router.select(ask())
    assert decision.worker == B
    assert decision.overlap_blocks == 10
    assert decision.cached_tokens == 40
    assert decision.tier_blocks == {"device": 10}
    assert decision.index_mode == "exact"
    assert decision.margin == 10.0
    assert decision.policy == "kv"
    chosen = next(score for score in decision.candidates if score.worker == B)
    assert chosen.cost == pytest.approx(sum(chosen.weighted.values()))
    assert chosen.raw["device_blocks"] == 10


async def test_hashes_and_tokens_lead_to_the_same_place():
    hashes = BlockHasher(4).hash_tokens(PROMPT)
    for fields in ({"sequence_hashes": hashes.sequence}, {"local_hashes": hashes.local}):
        router = new(A, B)
        cache(router, B)
        decision = await router.select(ask(token_ids=pack_tokens([]), block_size=4, prompt_tokens=42, **fields))
        assert (decision.worker, decision.overlap_blocks, decision.cached_tokens) == (B, 10, 40)


async def test_load_is_booked_reported_and_freed():
    router = new(A)
    router.report_load(A, ReportedLoad(kv_used_blocks=3, kv_total_blocks=10, reported_at_s=1.0))
    cache(router, A, pack_tokens(range(8)))
    decision = await router.select(ask())
    (load,) = router.loads()
    assert (load.projected.prefill_tokens, load.projected.decode_blocks, load.projected.active_requests) == (32, 10, 1)
    assert load.reported is not None
    assert load.reported.kv_used_blocks == 3
    assert decision.view_age_s is not None
    router.first_token(decision.reservation)
    router.progress(decision.reservation, 9)
    (load,) = router.loads()
    assert (load.projected.prefill_tokens, load.projected.decode_blocks) == (0, 12)
    outcome = RequestOutcome(decision.decision_id, FinishReason.EOS, cached_tokens=8)
    router.complete(decision.reservation, outcome)
    router.complete(decision.reservation, RequestOutcome(decision.decision_id, FinishReason.ERROR))
    assert router.loads()[0].projected.decode_blocks == 0
    assert router.decision(decision.decision_id) == (decision, outcome)
    assert router.decisions() == [(decision, outcome)]
    assert router.decision("other") is None


async def test_asking_books_nothing():
    router = new(A, B, policy="round-robin")
    first = await router.select(ask(reserve=False))
    second = await router.select(ask(reserve=False))
    assert first.worker == second.worker
    assert first.reservation is None
    assert all(load.projected.active_requests == 0 for load in router.loads())


async def test_unknown_reservations_are_ignored():
    router = new(A)
    router.first_token(ReservationId("x"))
    router.progress(ReservationId("x"), 3)
    router.complete(ReservationId("x"), RequestOutcome("x"))
    assert router.loads()[0].projected.active_requests == 0


async def test_bookings_without_progress_are_dropped():
    clock = FakeClock()
    router = KvRouter(block_size=4, clock=clock, settings=RouterSettings(reservation_idle_s=60))
    router.upsert_worker(A, CARD)
    await router.select(ask())
    await clock.advance(61)
    await router.select(ask(reserve=False))
    assert router.loads()[0].projected.active_requests == 0


@pytest.mark.parametrize(
    ("fields", "kind", "reason"),
    [
        ({"hints": RoutingHints(instance_id=9)}, InvalidRequestError, "request.unknown_worker"),
        ({"hints": RoutingHints(instance_id=1, dp_rank=3)}, InvalidRequestError, "request.unknown_worker"),
        ({"hints": RoutingHints(dp_rank=3)}, InvalidRequestError, "request.unknown_worker"),
        ({"hints": RoutingHints(allowed_instance_ids=(7,))}, UnavailableError, "backend.unavailable"),
        ({"hints": RoutingHints(excluded_instance_ids=(1, 2))}, UnavailableError, "backend.unavailable"),
        ({"hints": RoutingHints(required_taints=("gpu",))}, UnavailableError, "backend.unavailable"),
        ({"excluded": (A, B)}, UnavailableError, "backend.unavailable"),
        ({"sequence_hashes": pack_hashes([1]), "block_size": 16}, InvalidRequestError, "request.block_size_mismatch"),
        (
            {"sequence_hashes": pack_hashes([1]), "block_size": 4, "algorithm": "sha"},
            InvalidRequestError,
            "request.hash_algorithm_mismatch",
        ),
    ],
)
async def test_refuses_with_a_reason(fields, kind, reason):
    router = new(A, B)
    with pytest.raises(kind) as caught:
        await router.select(ask(**fields))
    assert caught.value.reason == reason


async def test_without_workers_nothing_is_available():
    with pytest.raises(UnavailableError):
        await new().select(ask())


async def test_filters_say_why():
    router = new(A, B)
    router.upsert_worker(A, ModelCard("m", kv_block_size=4, runtime_config=ModelRuntimeConfig(taints=("gpu",))))
    for fields, other in [
        ({"excluded": (B,)}, "excluded by the request"),
        ({"hints": RoutingHints(allowed_instance_ids=(1,))}, "not in the allow-list"),
        ({"hints": RoutingHints(instance_id=1)}, "another instance is pinned"),
        ({"hints": RoutingHints(required_taints=("gpu",))}, "lacks taints gpu"),
    ]:
        decision = await router.select(ask(**fields))
        assert decision.worker == A
        assert {score.worker: score.rejected_by for score in decision.candidates} == {A: "", B: other}


async def test_the_prefill_hop_has_its_own_pin():
    router = new(A, B)
    hints = RoutingHints(instance_id=1, prefill_instance_id=2)
    assert (await router.select(ask(hints=hints, phase=RoutingPhase.PREFILL))).worker == B
    assert (await router.select(ask(hints=hints, phase=RoutingPhase.DECODE))).worker == A


async def test_inhibited_workers_rest_unless_nobody_else_is_left():
    clock = FakeClock()
    settings = RouterSettings(inhibit_s=5, receipts="on")
    router = KvRouter(block_size=4, policy="round-robin", clock=clock, settings=settings)
    router.upsert_worker(A, CARD)
    router.upsert_worker(B, CARD)
    router.inhibit(A, "connection refused")
    router.inhibit(WorkerId(77), "unknown")
    decision = await router.select(ask())
    assert decision.worker == B
    assert decision.candidates[1].rejected_by == "inhibited: connection refused"
    with pytest.raises(UnavailableError, match="pinned"):
        await router.select(ask(hints=RoutingHints(instance_id=1)))
    assert (await router.select(ask(excluded=(B,)))).worker == A
    await clock.advance(5)
    assert {(await router.select(ask())).worker for _ in range(2)} == {A, B}


@pytest.mark.parametrize(
    "settings",
    [
        RouterSettings(busy_kv_usage=0.5),
        RouterSettings(busy_prefill_tokens=10),
        RouterSettings(busy_prefill_batches=1.0),
    ],
)
async def test_busy_workers_take_nothing_new(settings):
    router = new(settings=settings)
    config = ModelRuntimeConfig(max_num_batched_tokens=20)
    router.upsert_worker(A, ModelCard("m", kv_block_size=4, runtime_config=config))
    assert (await router.select(ask())).worker == A
    router.report_load(A, ReportedLoad(kv_used_blocks=6, kv_total_blocks=10))
    with pytest.raises(CapacityExhaustedError) as caught:
        await router.select(ask())
    assert caught.value.reason == "capacity.pool_exhausted"


async def test_a_removed_worker_is_forgotten():
    router = new(A, B)
    cache(router, A)
    decision = await router.select(ask())
    assert decision.worker == A
    router.remove_worker(A)
    assert router.workers() == [B]
    assert (await router.select(ask())).overlap_blocks == 0
    router.complete(decision.reservation, RequestOutcome(decision.decision_id))
    assert [load.projected.active_requests for load in router.loads()] == [1]


def test_events_and_cards_must_fit():
    router = new(A)
    with pytest.raises(InvalidRequestError, match="unknown worker"):
        cache(router, B)
    with pytest.raises(InvalidRequestError, match="16"):
        router.upsert_worker(B, ModelCard("m", kv_block_size=16))
    with pytest.raises(InvalidRequestError, match="md5"):
        router.upsert_worker(B, ModelCard("m", hash_algorithm="md5"))
    with pytest.raises(ConfigurationError, match="block_size"):
        KvRouter(block_size=0)
    with pytest.raises(ConfigurationError, match="temprature"):
        KvRouter(block_size=4, policy_options={"temprature": 1})


async def test_receipts_can_be_off_or_sampled_and_are_bounded():
    router = new(A, settings=RouterSettings(receipts="off", receipts_max_decisions=2))
    decisions = [await router.select(ask()) for _ in range(3)]
    assert all(decision.candidates == () for decision in decisions)
    assert router.decision(decisions[0].decision_id) is None
    assert router.decision(decisions[2].decision_id) == (decisions[2], None)
    router = new(A, settings=RouterSettings(receipts="sampled", receipts_sample_share=0.5))
    sampled = [bool((await router.select(ask())).candidates) for _ in range(200)]
    assert 60 < sum(sampled) < 140


async def test_the_same_seed_decides_alike():
    async def run(seed):
        router = new(A, B, WorkerId(3), policy="random", seed=seed)
        return [(await router.select(ask())).worker for _ in range(20)]

    assert await run(7) == await run(7)
    assert await run(7) != await run(8)


async def test_metrics_tell_what_happened():
    router = new(A, B)
    cache(router, A)
    await router.select(ask())
    with pytest.raises(UnavailableError):
        await router.select(ask(excluded=(A, B)))
    router.refresh_metrics()
    registry = router.metrics.registry
    assert registry.get_sample_value("dynamo_router_decisions_total", {"model": "", "policy": "kv"}) == 1
    assert registry.get_sample_value("dynamo_router_predicted_cached_tokens_total", {"model": ""}) == 40
    assert registry.get_sample_value("dynamo_router_index_blocks", {"model": ""}) == 10
    assert registry.get_sample_value("dynamo_router_kv_streams", {"model": "", "state": "live"}) == 1
    assert registry.get_sample_value("dynamo_router_projected_decode_blocks", {"model": ""}) == 10
    assert (
        registry.get_sample_value(
            "dynamo_router_refused_requests_total", {"model": "", "reason": "backend.unavailable"}
        )
        == 1
    )


async def test_a_prefix_that_is_being_computed_counts_as_cached():
    router = new(A, B, policy="ttft")
    first = await router.select(ask())
    second = await router.select(ask(token_ids=pack_tokens(range(60))))
    assert second.worker == first.worker
    assert (second.overlap_blocks, second.cached_tokens, second.index_mode) == (10, 40, "approximate")
    router = new(A, policy="ttft", settings=RouterSettings(assume_kv_reuse=False))
    await router.select(ask())
    assert (await router.select(ask())).cached_tokens == 0


@pytest.mark.parametrize("policy", ["kv", "ttft"])
async def test_each_hop_of_a_split_request_books_its_own_part(policy):
    router = new(A, B, policy=policy)
    cache(router, B)
    first = await router.select(ask(phase=RoutingPhase.PREFILL, request_id="p"))
    assert first.worker == B
    projected = {load.worker: load.projected for load in router.loads()}[B]
    assert (projected.prefill_tokens, projected.decode_blocks, projected.active_requests) == (0, 0, 1)
    other = await router.select(ask(token_ids=pack_tokens(range(100, 140)), phase=RoutingPhase.PREFILL))
    assert sum(load.projected.prefill_tokens for load in router.loads()) == 40
    router.complete(other.reservation, RequestOutcome(other.decision_id))
    router.complete(first.reservation, RequestOutcome(first.decision_id))
    decoding = await router.select(ask(phase=RoutingPhase.DECODE))
    projected = {load.worker: load.projected for load in router.loads()}[decoding.worker]
    assert (projected.prefill_tokens, projected.decode_blocks, projected.active_requests) == (0, 10, 1)
    for score in decoding.candidates:
        assert sum(score.weighted.values()) == pytest.approx(score.cost)


async def test_decode_goes_by_held_blocks_and_not_by_the_prefix():
    router = new(A, B)
    cache(router, B)
    held = await router.select(ask(token_ids=pack_tokens(range(100, 120)), hints=RoutingHints(instance_id=2)))
    router.first_token(held.reservation)
    assert (await router.select(ask(phase=RoutingPhase.DECODE))).worker == A
    assert (await router.select(ask(reserve=False))).worker == B


async def test_a_burst_that_shares_a_cold_prefix_follows_one_leader():
    router = new(*(WorkerId(number) for number in range(1, 9)), policy="ttft")
    workers = {(await router.select(ask(request_id=str(number)))).worker for number in range(6)}
    assert len(workers) == 1


def test_overlap_scores_name_what_each_worker_holds():
    router = new(A, B)
    cache(router, B)
    cache(router, A, pack_tokens(range(8)), Tier.HOST)
    scores = router.overlap_scores(ask())
    assert [score.worker for score in scores] == [A, B]
    assert [score.tier_blocks["device"] for score in scores] == [0, 10]
    assert scores[0].tier_blocks["host_pinned"] == 2
    assert scores[1].cached_tokens == 40


def test_overlaps_gives_the_same_as_tuples_and_says_what_to_use():
    router = new(B)
    cache(router, B)
    with pytest.warns(DeprecationWarning, match=r"goes in 0\.4\.0; use KvRouter\.overlap_scores"):
        assert router.overlaps(ask()) == [tuple(score) for score in router.overlap_scores(ask())]
