"""What one watch has told its reader and what it still owes: a view of the records under a prefix, and a queue."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping

from dynamo_core.discovery import Record, RecordDeleted, RecordPut, WatchEvent, WatchSynced

MAX_QUEUED_EVENTS = 4096


class Feed:
    """Changes under a prefix, for one reader.

    The source tells changes one by one (``apply``) or replaces its whole view (``replace``), of which the reader gets
    the difference. A reader that falls behind by more than ``max_events`` gets the difference to the newest view in
    place of each change. Removals that a replaced view implies can be held back, for a store that came back empty and
    whose records are on their way: ``release`` lets out those that did not return.

    Args:
        prefix: Start of the keys.
        begin: Awaited once before anything is yielded; starts the source.
        left: Called once when the reader leaves.
        max_events: Changes that may wait.
    """

    def __init__(
        self,
        prefix: str,
        begin: Callable[[], Awaitable[None]],
        left: Callable[[Feed], None],
        *,
        max_events: int = MAX_QUEUED_EVENTS,
    ) -> None:
        self.prefix = prefix
        self.records: dict[str, Record] = {}
        self.revision = 0
        self._begin = begin
        self._left = left
        self._max_events = max_events
        self._begun = False
        self._shown: dict[str, Record] = {}
        self._held: set[str] = set()
        self._queue: deque[WatchEvent] = deque()
        self._behind = False
        self._synced = False
        self._wake = asyncio.Event()
        self._failure: BaseException | None = None
        self._closed = False

    @property
    def held(self) -> bool:
        """Whether removals are being held back."""
        return bool(self._held)

    def __aiter__(self) -> Feed:
        return self

    async def __anext__(self) -> WatchEvent:
        """Return the next event. Cancelling loses none.

        Raises:
            DynamoError: why the source cannot go on.
        """
        if not self._begun and not self._closed:
            await self._begin()
            self._begun = True
        while not self._closed:
            if not self._queue and self._behind:
                self._compare()
            if self._queue:
                return self._note(self._queue.popleft())
            self._wake.clear()
            await self._wake.wait()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """End the watch. Idempotent."""
        self.close()

    def close(self, failure: BaseException | None = None) -> None:
        """End the watch; its reader stops, or gets the failure. Idempotent."""
        if not self._closed:
            self._closed = True
            self._failure = failure
            self._wake.set()
            self._left(self)

    def apply(self, events: Iterable[RecordPut | RecordDeleted], revision: int) -> None:
        """Take changes in order."""
        for event in events:
            self._held.discard(event.key)
            if isinstance(event, RecordPut):
                self.records[event.key] = Record(event.key, event.value, event.revision)
            else:
                self.records.pop(event.key, None)
            self._push(event)
        self.revision = revision
        self._wake.set()

    def replace(self, records: Mapping[str, Record], revision: int, *, hold_removals: bool = False) -> None:
        """Take the whole view anew."""
        gone = self.records.keys() - records.keys() if hold_removals else set[str]()
        self._held = (self._held | gone) - records.keys()
        # What is held back stays part of the view, so that no other comparison lets it out.
        self.records = {**{key: self.records[key] for key in self._held}, **records}
        self.revision = revision
        self._queue.clear()
        self._compare()
        self._queue.append(WatchSynced(revision, resync=self._synced))
        self._synced = True
        self._wake.set()

    def release(self) -> None:
        """Let out the removals that were held back."""
        held, self._held = sorted(self._held), set()
        self.apply([RecordDeleted(key, self.revision) for key in held], self.revision)

    def looks_reset(self, records: Mapping[str, Record], revision: int) -> bool:
        """Whether this view cannot be an older state of the other one: the store has begun anew.

        Its count of revisions has gone back, or no record is as it was. The count comes first: the first records that
        their owners write again may well get the revisions that they had.
        """
        if revision < self.revision:
            return True
        return bool(self.records) and not any(records.get(key) == record for key, record in self.records.items())

    def _push(self, event: WatchEvent) -> None:
        if self._behind:
            return
        if len(self._queue) >= self._max_events:
            self._queue.clear()
            self._behind = True
        else:
            self._queue.append(event)

    def _compare(self) -> None:
        self._behind = False
        changes: list[RecordPut | RecordDeleted] = [
            RecordDeleted(key, self.revision) for key in self._shown if key not in self.records
        ]
        changes += [
            RecordPut(record.key, record.value, record.revision)
            for key, record in self.records.items()
            if self._shown.get(key) != record
        ]
        self._queue.extend(sorted(changes, key=_order))

    def _note(self, event: WatchEvent) -> WatchEvent:
        if isinstance(event, RecordPut):
            self._shown[event.key] = Record(event.key, event.value, event.revision)
        elif isinstance(event, RecordDeleted):
            self._shown.pop(event.key, None)
        return event


def _order(event: RecordPut | RecordDeleted) -> int:
    return event.revision
