"""Watches: each turns the newest view of the store into the changes that its reader has not seen."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from dynamo_core.discovery import Record, RecordDeleted, RecordPut, WatchEvent, WatchSynced

MAX_QUEUED_EVENTS = 4096


class FileWatch:
    """Changes under a prefix, for one reader.

    Changes are found by comparing views and come in the order of revisions. A reader that falls behind by more than
    ``MAX_QUEUED_EVENTS`` is given the difference to the newest view once it has caught up.

    Args:
        prefix: Start of the keys.
        first_view: Awaited once before anything is yielded; brings the view up to date.
        left: Called once when the watch ends.
    """

    def __init__(
        self, prefix: str, first_view: Callable[[], Awaitable[None]], left: Callable[[FileWatch], None]
    ) -> None:
        self._prefix = prefix
        self._first_view = first_view
        self._left = left
        self._records: dict[str, Record] = {}
        self._revision = 0
        self._seen: dict[str, int] = {}
        self._ready: deque[WatchEvent] = deque()
        self._wake = asyncio.Event()
        self._behind = False
        self._synced = False
        self._resync = False
        self._closed = False

    def __aiter__(self) -> FileWatch:
        return self

    async def __anext__(self) -> WatchEvent:
        """Return the next event. Cancelling loses none."""
        if not self._synced and not self._closed:
            await self._first_view()
        while not self._ready and not self._closed:
            self._wake.clear()
            if self._behind:
                self._compare()
            else:
                await self._wake.wait()
        if self._closed:
            raise StopAsyncIteration
        return self._ready.popleft()

    async def aclose(self) -> None:
        """End the watch. Idempotent."""
        self.close()

    def close(self) -> None:
        """End the watch; its reader stops. Idempotent."""
        if not self._closed:
            self._closed = True
            self._wake.set()
            self._left(self)

    def update(self, records: dict[str, Record], revision: int, *, resync: bool = False) -> None:
        """Take note of the newest view."""
        self._records = records
        self._revision = revision
        self._resync = self._resync or resync
        self._behind = True
        if self._synced and len(self._ready) < MAX_QUEUED_EVENTS:
            self._compare()
        self._wake.set()

    def _compare(self) -> None:
        self._behind = False
        present = {key: record for key, record in self._records.items() if key.startswith(self._prefix)}
        changes: list[RecordPut | RecordDeleted] = [
            RecordDeleted(key, self._revision) for key in self._seen if key not in present
        ]
        changes += [
            RecordPut(key, record.value, record.revision)
            for key, record in present.items()
            if self._seen.get(key) != record.revision
        ]
        changes.sort(key=_order)
        self._ready.extend(changes)
        self._seen = {key: record.revision for key, record in present.items()}
        if not self._synced or self._resync:
            self._ready.append(WatchSynced(self._revision, resync=self._synced))
            self._synced, self._resync = True, False


def _order(event: RecordPut | RecordDeleted) -> int:
    return event.revision
