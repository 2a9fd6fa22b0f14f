from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_core.enums import Tier
from dynamo_core.events import BlockRemoved, BlocksCleared, BlockStored, KvEventBatch, UnknownKvEvent
from dynamo_core.ids import WorkerId
from dynamo_core.tokens import chain_hashes, pack_hashes, unpack_hashes
from dynamo_router._flat_index import FlatIndex
from dynamo_router._index import Applied, BlockIndex
from dynamo_router._indexer import Indexer
from dynamo_router._snapshot import IndexSnapshot, restore_worker, take_snapshot

A, B = WorkerId(1), WorkerId(2, 1)
LOCALS = list(range(100, 116))


def stored(local, *, parent=None, engine=None, tier=Tier.DEVICE):
    names = chain_hashes(local, parent) if engine is None else engine
    return BlockStored(1, pack_hashes(names), pack_hashes(local), parent, tier=tier)


def removed(names, tier=Tier.DEVICE):
    return BlockRemoved(1, pack_hashes(names), tier)


def depths(index, hashes):
    return {index.worker_at(slot): blocks for slot, blocks in index.match(hashes).by_slot().items() if any(blocks)}


def test_finds_each_workers_depth():
    index = BlockIndex()
    index.apply(A, stored(LOCALS))
    index.apply(B, stored(LOCALS[:5]))
    prompt = chain_hashes(LOCALS)
    assert depths(index, prompt) == {A: [16, 0, 0, 0], B: [5, 0, 0, 0]}
    assert depths(index, prompt[:3]) == {A: [3, 0, 0, 0], B: [3, 0, 0, 0]}
    assert depths(index, prompt[1:]) == {A: [15, 0, 0, 0], B: [4, 0, 0, 0]}
    assert index.match([]).device == []
    assert index.match(prompt, among=1 << index.slot(B)).device == [(5, 1 << index.slot(B))]


def test_a_hole_ends_the_prefix_until_it_is_filled():
    index = BlockIndex()
    prompt = chain_hashes(LOCALS)
    index.apply(A, stored(LOCALS))
    assert index.apply(A, removed([prompt[7]])) is Applied.OK
    assert depths(index, prompt)[A][0] == 7
    assert index.check_integrity() == []
    index.apply(A, stored(LOCALS[7:8], parent=prompt[6]))
    assert depths(index, prompt)[A][0] == 16
    assert index.check_integrity() == []


def test_foreign_engine_hashes_are_translated():
    index = BlockIndex()
    index.apply(A, stored(LOCALS[:4], engine=[1, 2, 3, 4]))
    index.apply(A, stored(LOCALS[4:6], parent=4, engine=[5, 6]))
    prompt = chain_hashes(LOCALS)
    assert depths(index, prompt)[A][0] == 6
    index.apply(A, removed([6, 5]))
    assert depths(index, prompt)[A][0] == 4
    assert index.apply(A, removed([77])) is Applied.UNKNOWN_BLOCK
    assert index.apply(A, stored(LOCALS[4:5], parent=99, engine=[7])) is Applied.UNKNOWN_PARENT


def test_lower_tiers_continue_the_device_prefix_together():
    index = BlockIndex()
    prompt = chain_hashes(LOCALS)
    index.apply(A, stored(LOCALS[:4]))
    index.apply(A, stored(LOCALS[2:8], parent=prompt[1], tier=Tier.HOST))
    index.apply(A, stored(LOCALS[8:10], parent=prompt[7], tier=Tier.DISK))
    index.apply(A, stored(LOCALS[10:11], parent=prompt[9], tier=Tier.HOST))
    index.apply(B, stored(LOCALS[:3], tier=Tier.EXTERNAL))
    assert depths(index, prompt) == {A: [4, 5, 2, 0], B: [0, 0, 0, 3]}


def test_forgets_a_worker_and_reuses_its_slot():
    index = BlockIndex()
    index.apply(A, stored(LOCALS, engine=list(range(16))))
    slot = index.slot(A)
    index.remove_worker(A)
    assert len(index) == index.distinct_blocks == 0
    assert index.slot(B) == slot
    assert index.workers() == [B]
    index.apply(B, stored(LOCALS))
    assert depths(index, chain_hashes(LOCALS)) == {B: [16, 0, 0, 0]}
    assert index.check_integrity() == []


def test_a_full_index_drops_tails_and_says_so():
    index = BlockIndex(max_blocks=10)
    assert index.apply(A, stored(LOCALS)) is Applied.OVER_CAPACITY
    assert index.apply(B, stored(LOCALS)) is Applied.OVER_CAPACITY
    assert depths(index, chain_hashes(LOCALS)) == {A: [10, 0, 0, 0]}
    assert index.dropped_blocks == 6 + 16
    assert index.is_lossy(A)
    index.clear(A)
    assert not index.is_lossy(A)
    assert len(index) == 0


@pytest.mark.parametrize(
    ("event", "result"),
    [
        (BlockStored(1, pack_hashes([1]), pack_hashes([])), Applied.INVALID),
        (BlockStored(1, pack_hashes([]), pack_hashes([])), Applied.INVALID),
        (stored(LOCALS, tier=Tier.UNKNOWN), Applied.IGNORED),
        (removed([1], Tier.UNKNOWN), Applied.IGNORED),
        (BlocksCleared(1, Tier.UNKNOWN), Applied.IGNORED),
        (UnknownKvEvent(1, "moved"), Applied.IGNORED),
        (BlocksCleared(1), Applied.OK),
    ],
)
def test_odd_events_change_nothing(event, result):
    index = BlockIndex()
    assert index.apply(A, event) is result
    assert len(index) == 0
    assert index.check_integrity() == []


# A small universe: a tree of blocks in which every node's local hash is its label, so prefixes are shared and broken
# often. Events may come in any order, twice, or not at all.
WORKERS = [WorkerId(1), WorkerId(2), WorkerId(2, 1)]
TIER_CHOICES = [Tier.DEVICE, Tier.DEVICE, Tier.DEVICE, Tier.HOST, Tier.DISK]
paths = st.lists(st.integers(0, 2), min_size=1, max_size=7)


@st.composite
def histories(draw):
    foreign = {worker: draw(st.booleans()) for worker in WORKERS}
    events = []
    for _ in range(draw(st.integers(0, 25))):
        worker = draw(st.sampled_from(WORKERS))
        salt = draw(st.sampled_from([0, 0, 0, 7])) if foreign[worker] else 0
        path = draw(paths)
        keys = chain_hashes(path)
        names = [(key ^ salt ^ 0x5555) for key in keys] if foreign[worker] else keys
        tier = draw(st.sampled_from(TIER_CHOICES))
        kind = draw(st.sampled_from(["store", "store", "store", "remove", "evict", "clear", "gone"]))
        start = draw(st.integers(0, len(path) - 1))
        if kind == "store":
            parent = names[start - 1] if start else None
            event = BlockStored(1, pack_hashes(names[start:]), pack_hashes(path[start:]), parent, tier=tier)
        elif kind == "remove":
            event = removed(names[start:][::-1], tier)
        elif kind == "evict":
            event = removed([names[start]], tier)
        else:
            event = BlocksCleared(1, draw(st.sampled_from([None, tier]))) if kind == "clear" else None
        events.append((worker, event))
        if draw(st.integers(0, 9)) == 0:
            events.append((worker, event))
    return events


@settings(max_examples=400, deadline=None)
@given(histories(), st.lists(paths, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_equals_the_naive_index(events, prompts, shuffler: random.Random):
    shuffler.shuffle(prompts)
    index, oracle = BlockIndex(), FlatIndex()
    for worker, event in events:
        if event is None:
            index.remove_worker(worker)
            oracle.remove_worker(worker)
        else:
            index.apply(worker, event)
            oracle.apply(worker, event)
        for prompt in prompts:
            hashes = unpack_hashes(pack_hashes(chain_hashes(prompt)))
            assert depths(index, hashes) == oracle.match(hashes)
    assert index.check_integrity() == []


def test_hashes_repeated_within_an_event_leave_the_index_whole():
    index, oracle = BlockIndex(), FlatIndex()
    for event in (
        stored([1, 2, 3], engine=[7, 7, 8]),
        BlockStored(1, pack_hashes([1, 5, 5, 9]), pack_hashes([1, 2, 2, 3])),
        stored([1, 2], engine=[8, 8]),
    ):
        index.apply(A, event)
        oracle.apply(A, event)
        for prompt in ([1, 2, 3], [1, 2, 2, 3], [1, 2]):
            hashes = chain_hashes(prompt)
            assert depths(index, hashes) == oracle.match(hashes)
        assert index.check_integrity() == []


def numbered(event, number):
    return msgspec.structs.replace(event, event_id=number)


@settings(max_examples=150, deadline=None)
@given(histories(), paths)
def test_a_restored_index_answers_and_goes_on_as_the_first(events, prompt):
    first, second = (Indexer(BlockIndex(), block_size=4) for _ in range(2))
    ids = dict.fromkeys(WORKERS, 0)

    def apply(indexer, worker, event):
        indexer.apply(KvEventBatch(worker, (numbered(event, ids[worker]),), 4))

    for worker, event in events:
        if event is not None:
            ids[worker] += 1
            apply(first, worker, event)
    encoded = msgspec.json.encode(take_snapshot(first))
    snapshot = msgspec.json.decode(encoded, type=IndexSnapshot)
    for worker in snapshot.workers:
        restore_worker(second, snapshot, worker)
    kept = {worker.worker for worker in snapshot.workers}
    for _ in range(2):
        expected = {
            worker: found for worker, found in depths(first.index, chain_hashes(prompt)).items() if worker in kept
        }
        assert depths(second.index, chain_hashes(prompt)) == expected
        assert second.index.check_integrity() == []
        for worker, event in reversed(events):
            if event is not None and worker in kept:
                ids[worker] += 1
                apply(first, worker, event)
                apply(second, worker, event)
        kept = {worker for worker in kept if second.stream(worker).last_id == first.stream(worker).last_id}


def test_a_full_index_keeps_what_fits():
    first, second = Indexer(BlockIndex(), block_size=4), Indexer(BlockIndex(max_blocks=3), block_size=4)
    first.apply(KvEventBatch(WORKERS[0], (stored([1, 2, 3, 4, 5]),), 4))
    snapshot = take_snapshot(first)
    restore_worker(second, snapshot, snapshot.workers[0])
    assert len(second.index) == 3
    assert second.index.is_lossy(WORKERS[0])
    assert depths(second.index, chain_hashes([1, 2, 3, 4, 5])) == {WORKERS[0]: [3, 0, 0, 0]}
