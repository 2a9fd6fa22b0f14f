"""Every event is delivered once, or reported as missing once, whatever the wire does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dynamo_core.events import EventEnvelope, SequenceGap
from dynamo_runtime._bus.ring import EventRing
from dynamo_runtime._bus.sequence import SequenceTracker
from dynamo_runtime._bus.wire import PACKET_BYTES, Packet, portions


def event(sequence: int, payload: bytes = b"x") -> EventEnvelope:
    return EventEnvelope("t", 1, sequence, payload)


def packet(*sequences: int, last: int | None = None) -> Packet:
    return Packet(1, last if last is not None else sequences[-1], [event(sequence) for sequence in sequences])


def places(items: list[EventEnvelope | SequenceGap]) -> list[object]:
    return [(i.first, i.last) if isinstance(i, SequenceGap) else i.sequence for i in items]


def test_first_packet_of_an_old_publisher_sets_the_base() -> None:
    tracker = SequenceTracker("t")
    assert places(tracker.accept(packet(7, 8))) == [7, 8]
    assert places(tracker.accept(packet(10))) == [(9, 9), 10]


def test_first_heartbeat_of_an_old_publisher_sets_the_base() -> None:
    tracker = SequenceTracker("t")
    assert places(tracker.accept(packet(last=5))) == []
    assert places(tracker.accept(packet(8))) == [(6, 7), 8]


def test_new_publisher_owes_everything() -> None:
    tracker = SequenceTracker("t")
    tracker.begin(1, 0)
    assert tracker.missing_before(packet(4)) == 3
    assert places(tracker.accept(packet(4))) == [(1, 3), 4]


def test_heartbeat_shows_what_was_lost_at_the_end() -> None:
    tracker = SequenceTracker("t")
    tracker.accept(packet(1, 2))
    assert places(tracker.accept(packet(last=2))) == []
    assert places(tracker.accept(packet(last=4))) == [(3, 4)]
    assert places(tracker.accept(packet(3, 4, 5))) == [5]


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 5)), max_size=40))
def test_each_sequence_is_covered_exactly_once(pieces: list[tuple[int, int]]) -> None:
    tracker = SequenceTracker("t")
    tracker.begin(1, 0)
    covered: list[int] = []
    newest = 0
    for first, count in pieces:
        newest = max(newest, first + count - 1 if count else first)
        sent = packet(*range(first, first + count), last=first + count - 1 if count else first)
        for item in tracker.accept(sent):
            covered += range(item.first, item.last + 1) if isinstance(item, SequenceGap) else [item.sequence]
    assert covered == list(range(1, newest + 1))


@given(st.integers(1, 30), st.integers(0, 60), st.integers(-3, 70), st.none() | st.integers(-3, 70))
def test_ring_selects_what_it_still_holds(size: int, published: int, first: int, last: int | None) -> None:
    ring = EventRing(size, 1 << 20)
    for sequence in range(1, published + 1):
        ring.append(event(sequence))
    held = range(max(1, published - size + 1), published + 1)
    wanted = [n for n in held if n >= first and (last is None or n <= last)]
    assert [found.sequence for found in ring.select(first, last)] == wanted


def test_ring_is_bounded_in_bytes() -> None:
    ring = EventRing(100, 10)
    for sequence in range(1, 6):
        ring.append(event(sequence, b"1234"))
    assert [found.sequence for found in ring.select(1, None)] == [4, 5]
    ring.append(event(6, bytes(50)))
    assert [found.sequence for found in ring.select(1, None)] == [6]


@given(st.lists(st.integers(0, PACKET_BYTES * 2), max_size=20))
def test_packets_are_bounded_and_keep_everything(sizes: list[int]) -> None:
    events = [event(number, bytes(size)) for number, size in enumerate(sizes)]
    parts = list(portions(events))
    assert [found for part in parts for found in part] == events
    assert all(len(part) == 1 or sum(len(found.payload) for found in part) <= PACKET_BYTES for part in parts)
