"""Discovery in one process: a dictionary with revisions, leases and watches.

A lease ends when it is revoked, when its client closes, or when ``MemoryDiscovery.lapse`` says so: the process that
holds it is alive by definition, so its time to live never runs out.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator, Mapping

from dynamo_core.discovery import (
    DEFAULT_LEASE_TTL_S,
    DiscoveryStatus,
    Lease,
    Record,
    RecordDeleted,
    RecordPut,
    WatchEvent,
    WatchSynced,
)
from dynamo_core.errors import ConfigurationError, ConflictError, UnavailableError

DEFAULT_WATCH_EVENTS = 4096
"""Changes that a slow watcher may fall behind before its view is rebuilt by diff."""


class MemoryLease:
    """A lease of a memory store."""

    def __init__(self, store: _Store, lease_id: int) -> None:
        self._store = store
        self._id = lease_id
        self._valid = True

    @property
    def id(self) -> int:
        """Identity within the store."""
        return self._id

    @property
    def valid(self) -> bool:
        """False once it has ended."""
        return self._valid

    async def revoke(self) -> None:
        """End it now and delete its keys. Idempotent."""
        self.end()

    def end(self) -> None:
        """End it and delete its keys."""
        if self._valid:
            self._valid = False
            self._store.drop_lease(self._id)


class MemoryDiscovery:
    """A client of a memory store.

    Args:
        watch_events: Changes that a slow watcher may fall behind before it is resynced by diff.
        store: The store of another client; a new one if omitted. ``peer`` is the way to share.
    """

    def __init__(self, *, watch_events: int = DEFAULT_WATCH_EVENTS, store: _Store | None = None) -> None:
        self._store = store if store is not None else _Store(watch_events)
        self._leases: dict[int, MemoryLease] = {}
        self._watches: dict[_Watch, None] = {}
        self._closed = False

    def peer(self) -> MemoryDiscovery:
        """Return another client of the same store, as another process would be."""
        return MemoryDiscovery(store=self._store)

    async def start(self) -> None:
        """Do nothing: the store is here."""

    async def close(self) -> None:
        """Revoke own leases and end own watches. Idempotent."""
        self._closed = True
        for lease in list(self._leases.values()):
            lease.end()
        self._leases.clear()
        for watch in self._watches:
            watch.close()

    async def lease(self, ttl_s: float = DEFAULT_LEASE_TTL_S) -> MemoryLease:
        """Create a lease; ``ttl_s`` is checked and otherwise has no effect."""
        self._require_open()
        if ttl_s <= 0:
            raise ConfigurationError(f"lease ttl_s {ttl_s} must be above 0")
        lease = MemoryLease(self._store, self._store.new_lease_id())
        self._leases = {key: known for key, known in self._leases.items() if known.valid}
        self._leases[lease.id] = lease
        return lease

    def lapse(self, lease: Lease) -> None:
        """End a lease as if its keep-alives had stopped; for tests of what happens then.

        Raises:
            ConflictError: if the lease is not a live one of this client.
        """
        self._own(lease).end()

    async def put(self, key: str, value: bytes, *, lease: Lease | None = None) -> int:
        """Write a key and return its revision.

        Raises:
            ConflictError: if the lease has ended.
        """
        self._require_open()
        return self._store.put(key, value, self._lease_id(lease))

    async def compare_and_set(
        self, key: str, value: bytes, *, expected: int | None, lease: Lease | None = None
    ) -> int | None:
        """Write a key if its revision is ``expected`` (None: if absent); return the new revision or None.

        Raises:
            ConflictError: if the lease has ended.
        """
        self._require_open()
        lease_id = self._lease_id(lease)
        present = self._store.records.get(key)
        if (present.revision if present else None) != expected:
            return None
        return self._store.put(key, value, lease_id)

    async def get(self, key: str) -> Record | None:
        """Return a key's record, or None."""
        self._require_open()
        return self._store.records.get(key)

    async def delete(self, key: str) -> bool:
        """Delete a key; return whether it was there."""
        self._require_open()
        return self._store.delete(key)

    async def list(self, prefix: str) -> list[Record]:
        """Return the records under a prefix, in key order."""
        self._require_open()
        return self._store.select(prefix)

    def watch(self, prefix: str) -> AsyncGenerator[WatchEvent, None]:
        """Yield present records, ``WatchSynced``, then changes in order, until closed or cancelled."""
        self._require_open()
        return self._run_watch(prefix)

    def status(self) -> DiscoveryStatus:
        """Connected until closed."""
        return DiscoveryStatus(connected=not self._closed, detail="closed" if self._closed else "in this process")

    async def _run_watch(self, prefix: str) -> AsyncGenerator[WatchEvent, None]:
        if self._closed:
            return
        watch = _Watch(self._store, prefix)
        self._watches[watch] = None
        self._store.watches[watch] = None
        try:
            while batch := await watch.next_batch():
                for event in batch:
                    yield event
        finally:
            del self._watches[watch]
            del self._store.watches[watch]

    def _lease_id(self, lease: Lease | None) -> int | None:
        return None if lease is None else self._own(lease).id

    def _own(self, lease: Lease) -> MemoryLease:
        own = self._leases.get(lease.id)
        if own is None or own is not lease or not own.valid:
            raise ConflictError(f"lease {lease.id} has ended; create a new one", reason="discovery.lease_ended")
        return own

    def _require_open(self) -> None:
        if self._closed:
            raise UnavailableError("this discovery client is closed", reason="discovery.closed")


def create_discovery(url: str, *, clock: object, options: Mapping[str, object]) -> MemoryDiscovery:
    """Entry point ``mem`` of ``dynamo_core.discoveries``: return a client of a new store.

    Raises:
        ConfigurationError: if the URL is not ``mem://`` or an option is given.
    """
    require_memory_url(url, options, ())
    return MemoryDiscovery()


def require_memory_url(url: str, options: Mapping[str, object], known: tuple[str, ...]) -> None:
    """Refuse another scheme and unknown options.

    Raises:
        ConfigurationError: naming the URL or the option.
    """
    if not url.startswith("mem://"):
        raise ConfigurationError(f"{url!r} is not a mem:// URL")
    unknown = sorted(set(options) - set(known))
    if unknown:
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise ConfigurationError(f"{url} does not know the option {unknown[0]!r}; {takes}")


class _Store:
    """What all clients share."""

    def __init__(self, watch_events: int) -> None:
        self.records: dict[str, Record] = {}
        self.revision = 0
        # Dictionaries as ordered sets: watchers wake in the order in which they came.
        self.watches: dict[_Watch, None] = {}
        self.watch_events = watch_events
        self._lease_of: dict[str, int] = {}
        self._lease_ids = itertools.count(1)

    def new_lease_id(self) -> int:
        return next(self._lease_ids)

    def put(self, key: str, value: bytes, lease_id: int | None) -> int:
        self.revision += 1
        self.records[key] = Record(key, value, self.revision)
        if lease_id is None:
            self._lease_of.pop(key, None)
        else:
            self._lease_of[key] = lease_id
        self._tell(RecordPut(key, value, self.revision))
        return self.revision

    def delete(self, key: str) -> bool:
        if self.records.pop(key, None) is None:
            return False
        self._lease_of.pop(key, None)
        self.revision += 1
        self._tell(RecordDeleted(key, self.revision))
        return True

    def drop_lease(self, lease_id: int) -> None:
        for key in [key for key, owner in self._lease_of.items() if owner == lease_id]:
            self.delete(key)

    def select(self, prefix: str) -> list[Record]:
        return [self.records[key] for key in sorted(self.records) if key.startswith(prefix)]

    def _tell(self, event: RecordPut | RecordDeleted) -> None:
        for watch in self.watches:
            watch.push(event)


class _Watch:
    """One watcher: a bounded queue of changes, and its view, from which it is rebuilt after falling behind."""

    def __init__(self, store: _Store, prefix: str) -> None:
        self._store = store
        self._prefix = prefix
        self._queue: deque[RecordPut | RecordDeleted] = deque()
        self._view: dict[str, int] = {}
        self._wake = asyncio.Event()
        self._behind = True
        self._synced = False
        self._closed = False

    def push(self, event: RecordPut | RecordDeleted) -> None:
        if self._behind or not event.key.startswith(self._prefix):
            return
        if len(self._queue) >= self._store.watch_events:
            self._queue.clear()
            self._behind = True
        else:
            self._queue.append(event)
        self._wake.set()

    def close(self) -> None:
        self._closed = True
        self._wake.set()

    async def next_batch(self) -> list[WatchEvent]:
        """Return what is ready, waiting for at least one event; an empty list is the end."""
        while not (self._closed or self._behind or self._queue):
            self._wake.clear()
            await self._wake.wait()
        if self._closed:
            return []
        if self._behind:
            return self._rebuild()
        batch: list[WatchEvent] = list(self._queue)
        self._queue.clear()
        for event in batch:
            self._note(event)
        return batch

    def _rebuild(self) -> list[WatchEvent]:
        records = self._store.select(self._prefix)
        revision = self._store.revision
        present = {record.key: record.revision for record in records}
        events: list[WatchEvent] = [RecordDeleted(key, revision) for key in self._view if key not in present]
        events += [RecordPut(r.key, r.value, r.revision) for r in records if self._view.get(r.key) != r.revision]
        events.append(WatchSynced(revision, resync=self._synced))
        self._view = present
        self._behind = False
        self._synced = True
        return events

    def _note(self, event: WatchEvent) -> None:
        if isinstance(event, RecordPut):
            self._view[event.key] = event.revision
        elif isinstance(event, RecordDeleted):
            self._view.pop(event.key, None)
