from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_core.errors import CapacityExhaustedError
from dynamo_core.ids import ReservationId, WorkerId
from dynamo_core.tokens import chain_hashes
from dynamo_router._active import ActiveBlocks
from dynamo_router._load import LoadBook
from dynamo_router._policy import Candidate

PATH = list(range(8))


def new(**options):
    return LoadBook(**{"block_size": 4, "max_reservations": 100, "idle_s": 10.0, **options})


def worker(slot=0):
    return Candidate(WorkerId(slot + 1), slot)


def book(ledger, name, candidate, path, *, uncached=None, now=0.0):
    tokens = len(path) * 4
    ledger.book(
        ReservationId(name),
        candidate,
        chain_hashes(path),
        prompt_tokens=tokens,
        uncached_tokens=tokens if uncached is None else uncached,
        now_s=now,
    )


def test_shared_prefixes_count_once():
    ledger, one = new(), worker()
    book(ledger, "a", one, PATH)
    book(ledger, "b", one, [*PATH[:6], 70])
    assert (one.decode_blocks, one.prefill_tokens, one.active_requests) == (9, 60, 2)
    ledger.release(ReservationId("a"), 1.0)
    assert (one.decode_blocks, one.prefill_tokens, one.active_requests) == (7, 28, 1)
    ledger.release(ReservationId("b"), 1.0)
    assert (one.decode_blocks, one.prefill_tokens, one.active_requests) == (0, 0, 0)
    assert len(ledger.blocks) == 0


def test_prefill_ends_at_the_first_token_and_output_grows_by_blocks():
    ledger, one = new(), worker()
    book(ledger, "a", one, PATH[:2], uncached=5)
    assert one.prefill_tokens == 5
    ledger.first_token(ReservationId("a"), 1.0)
    ledger.first_token(ReservationId("a"), 1.0)
    assert one.prefill_tokens == 0
    ledger.progress(ReservationId("a"), 3, 1.0)
    assert one.decode_blocks == 2
    ledger.progress(ReservationId("a"), 9, 1.0)
    assert one.decode_blocks == 4
    ledger.progress(ReservationId("a"), 5, 1.0)
    assert one.decode_blocks == 4
    ledger.release(ReservationId("a"), 1.0)
    assert one.decode_blocks == 0
    ledger.progress(ReservationId("a"), 50, 1.0)
    assert one.decode_blocks == 0


def test_output_can_be_left_out():
    ledger, one = new(track_output=False), worker()
    book(ledger, "a", one, PATH[:2])
    ledger.progress(ReservationId("a"), 100, 1.0)
    assert one.decode_blocks == 2


def test_bookings_live_by_progress():
    ledger, one = new(), worker()
    book(ledger, "a", one, PATH, now=0.0)
    book(ledger, "b", one, PATH, now=1.0)
    ledger.progress(ReservationId("a"), 1, 8.0)
    assert ledger.expire(10.9) == []
    assert ledger.expire(11.0) == ["b"]
    assert ledger.expire(17.9) == []
    assert ledger.expire(18.0) == ["a"]
    assert one.active_requests == one.decode_blocks == 0


def test_bookings_are_bounded():
    ledger = new(max_reservations=1)
    ledger.require_room()
    book(ledger, "a", worker(), PATH)
    with pytest.raises(CapacityExhaustedError, match="max_reservations"):
        ledger.require_room()


def test_dropping_a_worker_drops_its_bookings():
    ledger, one, two = new(), worker(0), worker(1)
    book(ledger, "a", one, PATH)
    book(ledger, "b", two, PATH)
    ledger.drop_worker(one.worker, 1.0)
    assert len(ledger) == 1
    assert ledger.release(ReservationId("a"), 1.0) is None
    assert ledger.release(ReservationId("b"), 1.0).candidate is two


def test_depths_on_every_worker():
    active = ActiveBlocks()
    hashes = chain_hashes(PATH)
    active.add(0, hashes)
    active.add(3, hashes[:5])
    active.add(70, hashes[:5])
    assert sorted(active.depths(hashes)) == [(5, 1 << 3 | 1 << 70), (8, 1)]
    assert active.depths(hashes, among=1 << 3) == [(5, 1 << 3)]
    assert active.depths(hashes[:2]) == [(2, 1 | 1 << 3 | 1 << 70)]
    assert active.depths([]) == []
    assert active.depths(chain_hashes([99])) == []


actions = st.lists(
    st.tuples(
        st.sampled_from(["book", "release", "first", "progress", "expire"]),
        st.integers(0, 7),
        st.integers(0, 1),
        st.lists(st.integers(0, 1), max_size=5),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(actions)
def test_load_equals_a_recount_and_returns_to_zero(actions):
    ledger, workers = new(), [worker(0), worker(1)]
    live: dict[str, dict] = {}
    for now, (kind, number, slot, path) in enumerate(actions):
        name = ReservationId(str(number))
        if kind == "book" and name not in live:
            book(ledger, name, workers[slot], path, now=float(now))
            live[name] = {"slot": slot, "path": path, "prefill": len(path) * 4, "output": 0, "at": now}
        elif kind == "release":
            ledger.release(name, 1.0)
            live.pop(name, None)
        elif kind == "first":
            ledger.first_token(name, float(now))
            live.get(name, {}).update(prefill=0, at=now)
        elif kind == "progress":
            ledger.progress(name, number * 3, float(now))
            if name in live:
                live[name].update(output=max(live[name]["output"], number * 3 // 4), at=now)
        elif kind == "expire":
            expected = {name for name, entry in live.items() if entry["at"] + 10 <= now}
            assert set(ledger.expire(float(now))) == expected
            live = {name: entry for name, entry in live.items() if name not in expected}
        for candidate in workers:
            mine = [entry for entry in live.values() if entry["slot"] == candidate.slot]
            distinct = {key for entry in mine for key in chain_hashes(entry["path"])}
            assert candidate.active_requests == len(mine)
            assert candidate.prefill_tokens == sum(entry["prefill"] for entry in mine)
            assert candidate.decode_blocks == len(distinct) + sum(entry["output"] for entry in mine)
    for name in list(live):
        ledger.release(ReservationId(name), 1.0)
    assert all(one.prefill_tokens == one.decode_blocks == one.active_requests == 0 for one in workers)
    assert len(ledger.blocks) == 0
