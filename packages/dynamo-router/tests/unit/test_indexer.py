from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_core.errors import InvalidRequestError
from dynamo_core.events import BlockRemoved, BlocksCleared, BlockStored, KvEventBatch, KvEventQuery
from dynamo_core.ids import WorkerId
from dynamo_core.tokens import chain_hashes, pack_hashes
from dynamo_router._flat_index import FlatIndex
from dynamo_router._index import BlockIndex
from dynamo_router._indexer import MAX_HELD_EVENTS, Indexer, StreamState

A = WorkerId(1)
LOCALS = list(range(50, 60))
CHAIN = chain_hashes(LOCALS)


def block(event_id, position):
    parent = CHAIN[position - 1] if position else None
    return BlockStored(event_id, pack_hashes([CHAIN[position]]), pack_hashes([LOCALS[position]]), parent)


def batch(*events, **fields):
    return KvEventBatch(A, tuple(events), 4, **fields)


def depth(indexer):
    return indexer.index.match(CHAIN).by_slot().get(indexer.index.slot(A), [0])[0]


def new(recoverable=True):
    return Indexer(BlockIndex(), block_size=4, recoverable=recoverable)


def test_drops_duplicates_by_id():
    indexer = new()
    assert indexer.apply(batch(block(1, 0), block(2, 1))) is None
    assert indexer.apply(batch(block(2, 1), block(3, 2))) is None
    assert indexer.stream(A).last_id == 3
    assert indexer.counts["duplicates"] == 1
    assert depth(indexer) == 3


def test_a_gap_asks_for_the_missing_range_and_holds_what_follows():
    indexer = new()
    indexer.apply(batch(block(1, 0)))
    assert indexer.apply(batch(block(4, 3))) == KvEventQuery(A, 2, 3)
    assert indexer.apply(batch(block(5, 4))) is None
    assert indexer.stream(A).state is StreamState.RECOVERING
    assert depth(indexer) == 1
    assert indexer.recovered(batch(block(2, 1), block(3, 2), block(4, 3))) is None
    assert depth(indexer) == 5
    assert indexer.stream(A).state is StreamState.LIVE
    assert indexer.stream(A).last_id == 5


def test_a_new_worker_is_asked_for_a_dump_and_goes_on_from_it():
    indexer = new()
    assert indexer.add_worker(A) == KvEventQuery(A)
    assert indexer.add_worker(A) is None
    assert indexer.apply(batch(block(7, 2))) is None
    assert indexer.recovered(batch(block(6, 0), block(6, 1), full_dump=True)) is None
    assert depth(indexer) == 3
    assert indexer.stream(A).last_id == 7


def test_an_answer_that_falls_short_leads_to_a_dump():
    indexer = new()
    indexer.apply(batch(block(1, 0)))
    indexer.apply(batch(block(5, 4)))
    assert indexer.recovered(batch(block(4, 3))) == KvEventQuery(A)
    assert indexer.recovered(batch()) == KvEventQuery(A)
    assert indexer.recovered(batch(*(block(5, i) for i in range(5)), full_dump=True)) is None
    assert depth(indexer) == 5


def test_without_recovery_a_gap_makes_the_stream_lossy():
    indexer = new(recoverable=False)
    indexer.apply(batch(block(1, 0)))
    assert indexer.apply(batch(block(3, 2))) is None
    assert indexer.stream(A).state is StreamState.LOSSY
    assert "events 2..2" in indexer.stream(A).detail
    assert depth(indexer) == 1
    indexer.apply(batch(block(4, 1)))
    assert depth(indexer) == 3


def test_an_abandoned_recovery_applies_what_was_held():
    indexer = new()
    indexer.apply(batch(block(1, 0)))
    indexer.apply(batch(block(3, 1)))
    indexer.abandon(A, "no answer")
    assert depth(indexer) == 2
    assert indexer.stream(A).state is StreamState.LOSSY
    assert indexer.stream(A).detail == "no answer"


def test_held_events_are_bounded():
    indexer = new()
    indexer.add_worker(A)
    indexer.apply(batch(*(BlockRemoved(i, pack_hashes([i])) for i in range(1, MAX_HELD_EVENTS + 11))))
    assert len(indexer.stream(A).held) == MAX_HELD_EVENTS
    assert indexer.counts["held_overflow"] == 10


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"block_size": 8}, "request.block_size_mismatch"),
        ({"block_size": 4, "algorithm": "md5"}, "request.hash_algorithm_mismatch"),
    ],
)
def test_refuses_another_block_size_or_algorithm(fields, reason):
    indexer = new(recoverable=False)
    indexer.apply(batch(block(1, 0)))
    with pytest.raises(InvalidRequestError) as caught:
        indexer.apply(KvEventBatch(A, (block(2, 1),), **fields))
    assert caught.value.reason == reason
    assert indexer.stream(A).state is StreamState.REFUSED
    assert depth(indexer) == 0
    indexer.apply(batch(block(3, 0)))
    assert indexer.stream(A).state is StreamState.LIVE
    assert depth(indexer) == 1


def test_an_unknown_parent_asks_for_a_dump():
    indexer = new()
    orphan = BlockStored(1, pack_hashes([1]), pack_hashes([LOCALS[1]]), 77)
    assert indexer.apply(batch(orphan)) == KvEventQuery(A)


def test_forgets_a_worker():
    indexer = new()
    indexer.apply(batch(block(1, 0)))
    indexer.remove_worker(A)
    assert indexer.streams() == {}
    assert len(indexer.index) == 0
    assert indexer.recovered(batch(full_dump=True)) is None


class Worker:
    """A worker's side: a cache, a numbered ring, and answers to queries."""

    def __init__(self, ring):
        self.events, self.cache, self.ring = [], {}, ring

    def store(self, path):
        keys = chain_hashes(path)
        for i, key in enumerate(keys):
            if key not in self.cache:
                self.cache[key] = (path[i], keys[i - 1] if i else None)
                self.events.append(
                    BlockStored(len(self.events) + 1, pack_hashes([key]), pack_hashes([path[i]]), self.cache[key][1])
                )

    def evict(self, nth):
        if self.cache:
            key = list(self.cache)[nth % len(self.cache)]
            del self.cache[key]
            self.events.append(BlockRemoved(len(self.events) + 1, pack_hashes([key])))

    def answer(self, query):
        last = len(self.events)
        if query.first is not None and query.first > last - self.ring:
            return batch(*self.events[query.first - 1 : query.last])
        dump = [
            BlockStored(last, pack_hashes([key]), pack_hashes([local]), parent)
            for key, (local, parent) in self.cache.items()
        ]
        return batch(BlocksCleared(last), *dump, full_dump=True)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("store"), st.lists(st.integers(0, 2), min_size=1, max_size=5)),
        st.tuples(st.just("evict"), st.integers(0, 20)),
        st.tuples(st.just("deliver"), st.tuples(st.integers(0, 40), st.integers(0, 40))),
        st.tuples(st.just("answer"), st.booleans()),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(steps, st.integers(0, 6))
def test_converges_on_the_workers_cache_whatever_is_lost_repeated_or_late(steps, ring):
    worker, indexer, open_query = Worker(ring), new(), None
    open_query = indexer.add_worker(A)
    for kind, value in steps:
        if kind == "store":
            worker.store(value)
        elif kind == "evict":
            worker.evict(value)
        elif kind == "deliver":
            low, high = sorted(value)
            open_query = indexer.apply(batch(*worker.events[low:high])) or open_query
        elif open_query is not None and value:
            open_query = indexer.recovered(worker.answer(open_query))
    worker.store([9])
    worker.evict(0)
    open_query = indexer.apply(batch(*worker.events[-1:])) or open_query
    for _ in range(5):
        if open_query is None:
            break
        open_query = indexer.recovered(worker.answer(open_query))
    assert open_query is None
    oracle = FlatIndex()
    for event in worker.answer(KvEventQuery(A)).events:
        oracle.apply(A, event)
    assert indexer.index.blocks_of(A) == len(worker.cache)
    for path in ([0, 0, 0], [0, 1, 2], [1, 1, 1], [2, 0], [9]):
        hashes = chain_hashes(path)
        found = {indexer.index.worker_at(s): b for s, b in indexer.index.match(hashes).by_slot().items() if any(b)}
        assert found == oracle.match(hashes)
    assert indexer.index.check_integrity() == []
