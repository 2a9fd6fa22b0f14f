"""What a watch holds back when its store has begun anew."""

from __future__ import annotations

import pytest

from dynamo_core.discovery import Record, RecordDeleted, RecordPut, WatchSynced
from dynamo_runtime._discovery.feed import Feed

KNOWN = {key: Record(key, b"x", revision) for revision, key in enumerate(("a/0", "a/1", "a/2"), start=2)}


async def begin() -> None:
    return


def feed() -> Feed:
    made = Feed("a/", begin, lambda left: None)
    made.replace(KNOWN, 7)
    return made


@pytest.mark.parametrize(
    ("records", "revision", "reset"),
    [
        # The first record is there again, at the very revision that it had.
        ({"a/0": KNOWN["a/0"]}, 2, True),
        ({}, 1, True),
        ({}, 9, True),
        ({"a/0": Record("a/0", b"x", 8)}, 8, True),
        ({"a/1": KNOWN["a/1"]}, 9, False),
        (KNOWN, 7, False),
    ],
)
def test_store_that_began_anew_is_told_from_one_that_went_on(
    records: dict[str, Record], revision: int, *, reset: bool
) -> None:
    assert feed().looks_reset(records, revision) is reset


async def test_held_removals_come_only_when_they_are_let_out() -> None:
    watch = feed()
    watch.replace({"a/0": KNOWN["a/0"]}, 2, hold_removals=True)
    watch.apply([RecordPut("a/1", b"x", 3)], 3)
    watch.release()
    watch.apply([RecordPut("a/9", b"end", 4)], 4)
    events = [await anext(watch)]
    while events[-1] != RecordPut("a/9", b"end", 4):
        events.append(await anext(watch))
    assert [event.key for event in events if isinstance(event, RecordDeleted)] == ["a/2"]
    assert events.count(WatchSynced(2, resync=True)) == 1
