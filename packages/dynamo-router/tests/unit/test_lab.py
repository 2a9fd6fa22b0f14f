from __future__ import annotations

import asyncio
import gzip
import json

import pytest

from dynamo_core.errors import ConfigurationError, InternalError
from dynamo_core.events import BlockRemoved, BlockStored
from dynamo_core.ids import WorkerId
from dynamo_core.tokens import chain_hashes, pack_hashes, unpack_hashes
from dynamo_router._lab_replay import OpenLoop, Replay, VirtualClock, finish_now
from dynamo_router._lab_sessions import Sessions, SessionShape
from dynamo_router._lab_trace import TraceRequest, read_trace, scale_rate
from dynamo_router._lab_worker import BlockCache, Job, ModelWorker, WorkerModel


def mooncake(tmp_path, *lines, name="t.jsonl"):
    path = tmp_path / name
    text = "\n".join(json.dumps(line) if isinstance(line, dict) else line for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def entry(at_ms, ids, output=10):
    return {
        "timestamp": at_ms,
        "input_length": 512 * len(ids) + 100,
        "output_length": output,
        "hash_ids": [*ids, -1 % 999],
    }


def test_reads_mooncake_and_leaves_the_partial_block_out(tmp_path):
    for name in ("t.jsonl", "t.jsonl.gz"):
        trace = read_trace(mooncake(tmp_path, entry(2000, [1, 2]), entry(500, [1]), name=name))
        assert [request.at_s for request in trace] == [0.5, 2.0]
        assert list(unpack_hashes(trace[1].local)) == [1, 2]
        assert list(unpack_hashes(trace[1].sequence)) == chain_hashes([1, 2])
        assert trace[1].prompt_tokens == 1124
    assert [request.at_s for request in scale_rate(trace, 2.0)] == [0.25, 1.0]
    assert len(read_trace(mooncake(tmp_path, entry(0, [1]), entry(1, [1])), limit=1)) == 1


def test_reads_azure_as_private_prompts(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    )
    first, second = read_trace(path, block_size=64)
    assert (first.at_s, first.prompt_tokens, first.output_tokens) == (0.0, 374, 44)
    assert second.at_s == pytest.approx(4.314579)
    assert len(unpack_hashes(first.local)) == 5
    assert not set(unpack_hashes(first.local)) & set(unpack_hashes(second.local))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.txt", "", "give a .jsonl"),
        ("t.jsonl", "", "no request"),
        ("t.jsonl", "{}", "line 1"),
        ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nx,1,2\n", "line 2"),
        ("missing.jsonl", None, "cannot be read"),
    ],
)
def test_refuses_what_is_no_trace(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        read_trace(tmp_path / name)


def test_a_cache_evicts_the_least_recent_leaf_and_never_what_is_pinned():
    cache = BlockCache(4)
    assert cache.pin([1, 2, 3]) == []
    cache.unpin([1, 2, 3])
    assert cache.pin([1, 4, 5]) == [3]
    assert cache.depth([1, 2, 3]) == 2
    assert cache.pin([6, 7]) == [2]
    assert (len(cache), cache.pinned) == (5, 5)
    cache.pin([1])
    cache.unpin([1])
    assert cache.pinned == 5


def request(ids, at_s=0.0):
    return TraceRequest(at_s, 16 * len(ids) + 4, 5, pack_hashes(ids), pack_hashes(chain_hashes(ids)))


def test_a_worker_takes_as_long_as_its_model_says():
    model = WorkerModel(prefill_tokens_per_s=100, decode_s=0.1, decode_slowdown=0.5, kv_blocks=4, overhead_s=1.0)
    worker = ModelWorker(WorkerId(1), model, 16)
    one, two, three = (Job(request(ids)) for ids in ([1, 2], [1, 2, 3], [8, 9]))
    worker.waiting.extend((one, two, three))
    assert worker.next_job() is one
    assert worker.begin(one) == (pytest.approx(1.36), [])
    assert worker.next_job() is None
    duration, (stored,) = worker.finish_prefill(one)
    assert duration == pytest.approx(0.4)
    assert isinstance(stored, BlockStored)
    assert worker.next_job() is two
    assert worker.begin(two)[0] == pytest.approx(1.20)
    duration, (stored,) = worker.finish_prefill(two)
    assert duration == pytest.approx(0.6)
    assert (stored.start_block, len(stored)) == (2, 1)
    assert worker.next_job() is None, "three blocks are in use, two do not fit"
    worker.finish(one)
    worker.finish(two)
    assert worker.next_job() is three
    (removed,) = worker.begin(three)[1]
    assert isinstance(removed, BlockRemoved)
    assert list(unpack_hashes(removed.engine_hashes)) == [two.hashes[2]]


def test_a_model_may_have_curves():
    model = WorkerModel(
        prefill_tokens_per_s=1000.0,
        overhead_s=0.5,
        prefill_square_s=1e-6,
        decode_occupancy_s=(0.01, 0.05, -0.02),
    )
    assert model.prefill_time_s(1000, 3) == pytest.approx(2.5)
    assert model.token_time_s(9, 0.5) == pytest.approx(0.03)
    assert WorkerModel(decode_occupancy_s=(0.0, 0.0, 0.0)).token_time_s(1, 1.0) == 0.001


def test_replay_gives_every_request_its_time_and_repeats_exactly(tmp_path):
    lines = [entry(at * 100, [1, 2, at % 3 + 3]) for at in range(30)]
    trace = read_trace(mooncake(tmp_path, *lines))

    def run(policy, **options):
        replay = Replay(policy, {}, workers=2, model=WorkerModel(kv_blocks=20), block_size=512, **options)
        return replay.run(OpenLoop(trace))

    results = run("ttft")
    assert len(results) == 30
    assert all(0 < one.ttft_s <= one.duration_s for one in results)
    assert results == run("ttft")
    assert results[0].cached_tokens == 0
    hits = sum(one.cached_tokens for one in results)
    assert hits > sum(one.cached_tokens for one in run("round-robin")) / 2
    assert all(one.predicted_tokens >= one.cached_tokens - 512 for one in results)
    progress = []
    replay = Replay("kv", {}, workers=2, model=WorkerModel(), block_size=512, view_delay_s=1.0)
    assert len(replay.run(OpenLoop(trace * 10), progress.append)) == 300
    assert progress == [256]


def test_sessions_are_a_closed_loop():
    shape = SessionShape(sessions=6, turns=3, system_prompts=2, concurrency=4)
    replay = Replay("ttft", {}, workers=2, model=WorkerModel(), block_size=16)
    results = replay.run(Sessions(shape, block_size=16, seed=1))
    assert len(results) == 18
    hit = sum(one.cached_tokens for one in results) / sum(one.prompt_tokens for one in results)
    assert hit > 0.6


async def test_nothing_replayed_may_wait():
    clock = VirtualClock()
    with pytest.raises(InternalError, match="sleep"):
        await clock.sleep(1.0)

    async def waits():
        await asyncio.Event().wait()

    with pytest.raises(InternalError, match="waited"):
        finish_now(waits())
