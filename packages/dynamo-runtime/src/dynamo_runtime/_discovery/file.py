"""Discovery for all processes of one machine, on a directory."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import structlog
import watchfiles

from dynamo_core.clock import Clock
from dynamo_core.discovery import (
    DEFAULT_LEASE_TTL_S,
    Discovery,
    DiscoveryFactory,
    DiscoveryStatus,
    Lease,
    Record,
    WatchEvent,
)
from dynamo_core.errors import ConfigurationError, ConflictError, DynamoError, UnavailableError
from dynamo_runtime._discovery._metrics import DiscoveryMetrics
from dynamo_runtime._discovery.files import FileStore, StoreBusyError, View
from dynamo_runtime._discovery.keeper import LeaseObserver, keep_alive
from dynamo_runtime._discovery.lease import KEEPALIVES_PER_TTL, OwnLease, OwnLeases
from dynamo_runtime._discovery.options import FileDiscoveryOptions, file_options
from dynamo_runtime._discovery.owner import this_process
from dynamo_runtime._discovery.watches import FileWatch

if TYPE_CHECKING:
    from dynamo_core.telemetry import Metrics

logger = structlog.get_logger(__name__)
T = TypeVar("T")

_FIRST_RETRY_S = 0.001
_LAST_RETRY_S = 0.05
_NOTIFY_STEP_MS = 50
"""How often the library looks whether the kernel has told it anything; at 10 ms that alone is 0.4 % of a core."""

_NOTIFY_DEBOUNCE_MS = 50
_TENDS_PER_TTL = 4
_LEAST_TEND_S = 0.01
"""However short the lease of somebody else, looking at it must not take all of a core."""


class FileDiscovery:
    """A client of a discovery directory.

    All file access happens on one thread of its own, so the event loop never waits for a disk. Keys written with
    ``put`` under a lease come back if other processes ended the lease while this one stood still; keys written with
    ``compare_and_set`` do not, because what they stand for, leadership say, may have passed on.

    Args:
        root: The directory, shared by all processes that shall find each other.
        clock: Time.
        options: Times.
        metrics: Scope to register metrics in.
    """

    def __init__(
        self,
        root: Path,
        *,
        clock: Clock,
        options: FileDiscoveryOptions | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._clock = clock
        self._options = options or FileDiscoveryOptions()
        self._store = FileStore(root)
        self._observer = LeaseObserver(self._store, clock)
        self._owner = this_process()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="file-discovery")
        self._view = View({}, 0, 0)
        self._leases = OwnLeases()
        self._watches: dict[FileWatch, None] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._follower_stop = asyncio.Event()
        self._following = False
        self._closed = False
        self._failure = ""
        self._reached_at_s = clock.monotonic()
        self._scanned_at_s = clock.monotonic()
        self._metrics = DiscoveryMetrics(metrics, self.status, lambda: len(self._view.records))

    async def start(self) -> None:
        """Make the directory if need be. Raises ``UnavailableError`` if it cannot be used."""
        await self._call(self._store.prepare)
        await self._refresh()
        if not self._tasks:
            self._spawn(self._tend())

    async def close(self) -> None:
        """Revoke own leases, end own watches. Idempotent."""
        if self._closed:
            return
        for lease in list(self._leases.values()):
            # A directory that is out of reach must not keep the process from leaving; the leases lapse by themselves.
            with contextlib.suppress(DynamoError):
                await lease.revoke()
        self._closed = True
        for watch in list(self._watches):
            watch.close()
        self._follower_stop.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._thread.shutdown(wait=False)

    async def lease(self, ttl_s: float = DEFAULT_LEASE_TTL_S) -> Lease:
        """Create a lease that lives as long as this process does, plus at most ``ttl_s``."""
        if ttl_s <= 0:
            raise ConfigurationError(f"lease ttl_s {ttl_s} must be above 0")
        lease = OwnLease(secrets.randbits(62) + 1, ttl_s, self._end_lease)
        lease.due_at_s = self._clock.monotonic() + ttl_s / KEEPALIVES_PER_TTL
        # Known before it is written, so that the observer never takes it for a stranger's.
        self._leases[lease.id] = lease
        try:
            await self._call(self._store.create_lease, lease.id, ttl_s, self._owner)
        except BaseException:
            del self._leases[lease.id]
            raise
        return lease

    async def put(self, key: str, value: bytes, *, lease: Lease | None = None) -> int:
        """Write a key and return its revision.

        Raises:
            ConflictError: if the lease has ended.
            UnavailableError: if the directory cannot be written, for example because the disk is full.
            PayloadTooLargeError: if the value exceeds what a record's file may take.
        """
        own = self._own(lease)
        record = await self._call(self._store.put, key, value, own.id if own else 0)
        self._leases.disown(key)
        if own is not None:
            own.records[key] = value
        await self._note(record)
        return record.revision

    async def compare_and_set(
        self, key: str, value: bytes, *, expected: int | None, lease: Lease | None = None
    ) -> int | None:
        """Write a key if its revision is ``expected`` (None: if it is absent); None if the comparison failed.

        Raises:
            ConflictError: if the lease has ended.
            UnavailableError: if the directory cannot be written.
        """
        own = self._own(lease)
        record = await self._call(self._store.compare_and_set, key, value, expected, own.id if own else 0)
        if record is None:
            return None
        self._leases.disown(key)
        await self._note(record)
        return record.revision

    async def get(self, key: str) -> Record | None:
        """Return a key's record, or None."""
        return await self._call(self._store.get, key)

    async def delete(self, key: str) -> bool:
        """Delete a key; return whether it was there."""
        revision = await self._call(self._store.delete, key)
        self._leases.disown(key)
        if revision is None:
            return False
        if self._watches and revision == self._view.revision + 1:
            records = {name: record for name, record in self._view.records.items() if name != key}
            self._publish(View(records, revision, self._view.garbled))
        elif self._following:
            await self._catch_up()
        return True

    async def list(self, prefix: str) -> list[Record]:
        """Return the records under a prefix, in key order."""
        view = await self._refresh()
        return [view.records[key] for key in sorted(view.records) if key.startswith(prefix)]

    def watch(self, prefix: str) -> AsyncIterator[WatchEvent]:
        """Yield present records, then ``WatchSynced``, then changes in the order of revisions."""
        self._require_open()
        watch = FileWatch(prefix, self._first_view, lambda gone: self._watches.pop(gone, None))
        self._watches[watch] = None
        return watch

    def status(self) -> DiscoveryStatus:
        """Return whether the directory could be used the last time."""
        if self._closed:
            return DiscoveryStatus(connected=False, detail="closed")
        if not self._failure:
            return DiscoveryStatus(connected=True, detail=f"directory {self._store.root}")
        return DiscoveryStatus(False, self._failure, self._clock.monotonic() - self._reached_at_s)

    # Views.

    async def _first_view(self) -> None:
        if not self._following:
            self._following = True
            self._spawn(self._follow())
        view = await self._refresh()
        for watch in self._watches:
            watch.update(view.records, view.revision)

    async def _refresh(self) -> View:
        view = await self._call(self._store.scan)
        self._scanned_at_s = self._clock.monotonic()
        if view.garbled > self._view.garbled:
            self._metrics.garbled(view.garbled - self._view.garbled)
            logger.warning("discovery.garbled_files", directory=str(self._store.root), files=view.garbled)
        changed = view.records != self._view.records
        self._view = view
        if changed:
            self._publish(view)
        return view

    async def _note(self, record: Record) -> None:
        """Show an own write to own watches at once."""
        if not self._watches:
            return
        if record.revision == self._view.revision + 1:
            records = {**self._view.records, record.key: record}
            self._publish(View(records, record.revision, self._view.garbled))
        elif self._following:
            await self._catch_up()

    def _publish(self, view: View) -> None:
        self._view = view
        for watch in self._watches:
            watch.update(view.records, view.revision)

    async def _catch_up(self) -> None:
        # Others wrote in between; only a scan can bring all changes into order. The own write has happened whatever
        # becomes of the scan, and the next one makes up for it.
        with contextlib.suppress(UnavailableError):
            await self._refresh()

    async def _follow(self) -> None:
        """Refresh the view whenever a file of the directory changes."""
        while not self._closed:
            # Notifications may be out of reach (too many watches on the machine, directory gone): polling goes on.
            with contextlib.suppress(OSError, RuntimeError, DynamoError):
                async for _ in watchfiles.awatch(
                    self._store.root,
                    recursive=False,
                    step=_NOTIFY_STEP_MS,
                    debounce=_NOTIFY_DEBOUNCE_MS,
                    watch_filter=None,
                    stop_event=self._follower_stop,
                ):
                    while not (await self._refresh()).whole:
                        pass
            if self._follower_stop.is_set():
                return
            await self._clock.sleep(self._options.poll_interval_s)

    # Leases.

    async def _tend(self) -> None:
        """Keep own leases alive, end dead ones, and scan now and then."""
        while True:
            await self._clock.sleep(self._tend_period_s())
            try:
                await self._tend_once()
            except UnavailableError as error:
                logger.warning("discovery.unavailable", directory=str(self._store.root), error=error.message)

    async def _tend_once(self) -> None:
        now_s = self._clock.monotonic()
        for lease in await self._call(keep_alive, self._store, list(self._leases.values()), self._owner, now_s):
            await self._restore(lease)
        for dead in await self._call(self._observer.dead, set(self._leases)):
            if await self._call(self._store.end_lease, dead.lease_id, dead.heartbeat):
                self._metrics.lease_expired()
                logger.info("discovery.lease_expired", lease=f"{dead.lease_id:x}")
                await self._refresh()
        if self._watches and now_s - self._scanned_at_s >= self._options.poll_interval_s:
            await self._refresh()

    def _tend_period_s(self) -> float:
        ttls_s = [lease.ttl_s for lease in self._leases.values()]
        if self._observer.shortest_ttl_s is not None:
            ttls_s.append(self._observer.shortest_ttl_s)
        wanted_s = min(self._options.tend_interval_s, *(ttl_s / _TENDS_PER_TTL for ttl_s in ttls_s), 3600.0)
        return max(_LEAST_TEND_S, wanted_s)

    async def _restore(self, lease: OwnLease) -> None:
        logger.warning("discovery.lease_restored", lease=f"{lease.id:x}", keys=len(lease.records))
        self._metrics.lease_restored()
        for key, value in list(lease.records.items()):
            if await self._call(self._store.compare_and_set, key, value, None, lease.id) is None:
                lease.records.pop(key, None)
        lease.present = True
        await self._refresh()

    async def _end_lease(self, lease: OwnLease) -> None:
        self._leases.pop(lease.id, None)
        await self._call(self._store.end_lease, lease.id)
        if self._watches:
            await self._refresh()

    def _own(self, lease: Lease | None) -> OwnLease | None:
        own = self._leases.own(lease)
        if own is not None and not own.valid:
            raise ConflictError(f"lease {own.id:x} is being restored; try again", reason="discovery.lease_ended")
        return own

    # Access.

    async def _call(self, work: Callable[..., T], *args: object) -> T:
        """Run file access on the client's thread, waiting for the lock and making the layout again if it is gone."""
        self._require_open()
        deadline_s = self._clock.monotonic() + self._options.lock_timeout_s
        retry_s = _FIRST_RETRY_S
        while True:
            try:
                result = await asyncio.get_running_loop().run_in_executor(self._thread, self._attempt, work, args)
            except StoreBusyError as error:
                if self._clock.monotonic() >= deadline_s:
                    raise self._failed(f"{self._store.root} stayed locked", error) from error
                await self._clock.sleep(retry_s)
                retry_s = min(_LAST_RETRY_S, retry_s * 2)
            except OSError as error:
                raise self._failed(f"{self._store.root}: {error.strerror or error}", error) from error
            else:
                self._failure = ""
                self._reached_at_s = self._clock.monotonic()
                return result

    def _attempt(self, work: Callable[..., T], args: tuple[object, ...]) -> T:
        try:
            return work(*args)
        except FileNotFoundError:
            # Somebody removed the directory, or parts of it.
            self._store.prepare()
            return work(*args)

    def _failed(self, detail: str, error: Exception) -> UnavailableError:
        self._failure = detail
        self._metrics.failed()
        return UnavailableError(
            f"The discovery directory cannot be used: {detail}",
            reason="discovery.unavailable",
            diagnostic=f"{type(error).__name__}: {error}",
        )

    def _require_open(self) -> None:
        if self._closed:
            raise UnavailableError("this discovery client is closed", reason="discovery.closed")

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(work))


def file_discovery(url: str, *, clock: object, options: Mapping[str, object]) -> Discovery:
    """Make the client for a ``file:///directory`` URL; see ``FileDiscoveryOptions`` for the options.

    Raises:
        ConfigurationError: if the URL names no absolute directory, or an option is wrong.
    """
    root, parsed, metrics = file_options(url, options)
    return FileDiscovery(root, clock=cast("Clock", clock), options=parsed, metrics=metrics)


if TYPE_CHECKING:
    _DISCOVERY: type[Discovery] = FileDiscovery
    _FACTORY: DiscoveryFactory = file_discovery
