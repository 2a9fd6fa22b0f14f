from __future__ import annotations

import json

import msgspec
import pytest
from prometheus_client import generate_latest

from dynamo_core.cards import ModelCard
from dynamo_core.errors import ConfigurationError
from dynamo_core.events import BlockStored, KvEventBatch
from dynamo_core.ids import WorkerId
from dynamo_core.routing import CandidateScore, RequestOutcome, RoutingDecision, RoutingRequest
from dynamo_core.tokens import BlockHasher, chain_hashes, pack_tokens, unpack_hashes
from dynamo_router import KvRouter, RouterSettings
from dynamo_router._lab_trace import read_trace
from dynamo_router._receipt_log import LoggedReceipt, ReceiptLog
from dynamo_router._receipts import ReceiptRing, regret_tokens

A, B = WorkerId(1), WorkerId(2)
PROMPT = pack_tokens(range(40))


def decision(number=1, *, cached=0, raws=()):
    scores = tuple(CandidateScore(WorkerId(place), cost, {"cached_tokens": tokens}) for place, (cost, tokens) in raws)
    return RoutingDecision(f"d-{number}", "r", A, "kv", cached_tokens=cached, candidates=scores)


def outcome(number=1, **fields):
    return RequestOutcome(f"d-{number}", **fields)


def make_router(tmp_path, policy="direct", **settings):
    router = KvRouter(
        block_size=4,
        policy=policy,
        model="org/model",
        settings=RouterSettings(receipts="on", receipts_dir=str(tmp_path), **settings),
    )
    for worker in (A, B):
        router.upsert_worker(worker, ModelCard("m", kv_block_size=4))
    return router


def lines(path):
    return [msgspec.json.decode(line, type=LoggedReceipt) for line in path.read_bytes().splitlines()]


def test_the_first_outcome_of_a_kept_decision_joins_it():
    ring = ReceiptRing(2)
    for number in (1, 2, 3):
        ring.add(decision(number))
    assert ring.join("d-1", outcome()) is None
    assert ring.join("d-3", outcome(3, output_tokens=5)) == decision(3)
    assert ring.join("d-3", outcome(3, output_tokens=9)) is None
    assert [kept[1] and kept[1].output_tokens for kept in ring.recent(9)] == [5, None]


def test_regret_is_what_the_best_eligible_cache_would_have_saved():
    scored = decision(cached=16, raws=[(1, (0.5, 16)), (2, (0.9, 48)), (3, (None, 64))])
    assert regret_tokens(scored, None) == 32
    assert regret_tokens(scored, outcome(cached_tokens=0)) == 48
    assert regret_tokens(scored, outcome(cached_tokens=64)) == 0
    assert regret_tokens(decision(cached=3), None) == 0


async def test_a_routers_receipts_go_to_disk_and_replay_as_a_trace(tmp_path):
    router = make_router(tmp_path)
    hashes = BlockHasher(4).hash_tokens(PROMPT)
    router.apply_events(KvEventBatch(B, (BlockStored(1, hashes.sequence, hashes.local),), 4))
    hints = {"hints": msgspec.convert({"instance_id": 1}, type=type(RoutingRequest("x").hints))}
    for number in range(2):
        chosen = await router.select(RoutingRequest(f"r{number}", token_ids=PROMPT, **hints))
        result = RequestOutcome(chosen.decision_id, output_tokens=7, cached_tokens=0, ttft_s=0.25)
        router.complete(chosen.reservation, result)
        router.complete(chosen.reservation, result)
    await router.stop()
    await router.stop()
    path = tmp_path / "org_model.jsonl"
    first, second = lines(path)
    assert (first.decision.request_id, first.outcome.ttft_s, first.prompt_tokens) == ("r0", 0.25, 40)
    assert list(unpack_hashes(first.hashes)) == list(unpack_hashes(hashes.sequence))
    assert second.decision.request_id == "r1"
    assert "token_ids" not in path.read_text()
    trace = read_trace(path, block_size=4)
    assert [request.output_tokens for request in trace] == [7, 7]
    assert trace[0].at_s == 0.0
    assert list(unpack_hashes(trace[0].sequence)) == chain_hashes(unpack_hashes(hashes.sequence))
    with pytest.raises(ConfigurationError, match="--block-size 4"):
        read_trace(path)


async def test_regret_is_counted(tmp_path):
    router = make_router(tmp_path, policy="round-robin")
    hashes = BlockHasher(4).hash_tokens(PROMPT)
    router.apply_events(KvEventBatch(B, (BlockStored(1, hashes.sequence, hashes.local),), 4))
    regrets = {}
    for number in range(2):
        chosen = await router.select(RoutingRequest(f"r{number}", token_ids=PROMPT))
        cached = 40 if chosen.worker == B else 0
        router.complete(chosen.reservation, RequestOutcome(chosen.decision_id, cached_tokens=cached))
        regrets[chosen.worker] = 40 - cached
    await router.stop()
    assert regrets == {A: 40, B: 0}
    assert {entry.decision.worker: entry.regret_tokens for entry in lines(tmp_path / "org_model.jsonl")} == regrets
    text = generate_latest(router.metrics.registry).decode()
    assert 'dynamo_router_regret_tokens_total{model="org/model"} 40.0' in text


def test_files_rotate_and_the_oldest_goes(tmp_path):
    log = ReceiptLog(tmp_path, "m", max_bytes=4096, max_files=3)
    for number in range(200):
        log.add(LoggedReceipt(decision(number), 4, 40, b"\0" * 320))
    log.close()
    assert log.dropped == 0
    names = sorted(path.name for path in tmp_path.glob("*.jsonl"))
    assert names == ["m.1.jsonl", "m.2.jsonl", "m.jsonl"]
    assert all(path.stat().st_size < 4096 + 1024 for path in tmp_path.glob("*.jsonl"))
    newest = [json.loads(line)["decision"]["decision_id"] for line in (tmp_path / "m.1.jsonl").read_text().splitlines()]
    assert newest[-1] in ("d-199", *(f"d-{number}" for number in range(180, 200)))


def test_a_single_file_begins_anew(tmp_path):
    log = ReceiptLog(tmp_path, "m", max_bytes=4096, max_files=1)
    for number in range(50):
        log.add(LoggedReceipt(decision(number), 4, 40, b"\0" * 320))
    log.close()
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["m.jsonl"]
    assert (tmp_path / "m.jsonl").stat().st_size < 4096


def test_two_routers_do_not_share_a_file(tmp_path):
    log = ReceiptLog(tmp_path, "m", max_bytes=4096, max_files=1)
    with pytest.raises(ConfigurationError, match="own receipts_dir"):
        ReceiptLog(tmp_path, "m", max_bytes=4096, max_files=1)
    log.close()
    ReceiptLog(tmp_path, "m", max_bytes=4096, max_files=1).close()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        ReceiptLog(tmp_path / "file", "m", max_bytes=4096, max_files=1)
