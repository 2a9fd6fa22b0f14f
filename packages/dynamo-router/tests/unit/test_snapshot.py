from __future__ import annotations

import msgspec
import pytest

from dynamo_core.cards import ModelCard
from dynamo_core.errors import InvalidRequestError
from dynamo_core.events import BlockStored, KvEventBatch
from dynamo_core.ids import WorkerId
from dynamo_core.tokens import chain_hashes, pack_hashes
from dynamo_router import KvRouter
from dynamo_router._indexer import StreamState
from dynamo_router._lab_replay import Replay
from dynamo_router._lab_sessions import Sessions, SessionShape
from dynamo_router._lab_worker import WorkerModel


def stored(local, number):
    return BlockStored(number, pack_hashes(chain_hashes(local)), pack_hashes(local))


def test_a_router_takes_over_another_ones_index():
    routers = [KvRouter(block_size=4, policy="kv") for _ in range(2)]
    known, other = WorkerId(1), WorkerId(2)
    for router in routers:
        router.upsert_worker(known, ModelCard("m", kv_block_size=4))
    routers[0].upsert_worker(other, ModelCard("m", kv_block_size=4))
    for worker in (known, other):
        routers[0].apply_events(KvEventBatch(worker, (stored([1, 2], 1),), 4))
    routers[1].restore(routers[0].snapshot())
    assert routers[1].indexer.stream(known).state is StreamState.LIVE
    assert routers[1].indexer.stream(known).last_id == 1
    assert routers[1].indexer.index.blocks_of(known) == 2
    assert len(routers[1].indexer.index) == 2
    with pytest.raises(InvalidRequestError, match="blocks of 8"):
        routers[1].restore(msgspec.structs.replace(routers[0].snapshot(), block_size=8))


def hit_rate(**options):
    shape = SessionShape(sessions=24, turns=8, system_prompts=4, concurrency=8)
    model = WorkerModel(kv_blocks=4000)
    replay = Replay("ttft", {}, workers=4, model=model, block_size=16, seed=1, **options)
    found = replay.run(Sessions(shape, block_size=16, seed=1))
    assert len(found) == shape.sessions * shape.turns
    later = found[96:]
    return sum(request.cached_tokens for request in later) / sum(request.prompt_tokens for request in later)


def test_a_replaced_router_keeps_the_hit_rate():
    kept, warm = hit_rate(), hit_rate(replace_after=96)
    assert kept > 0.6
    assert warm > kept - 0.02
    assert hit_rate(replace_after=96, warm=False) < warm
