"""Discovery in etcd."""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
from collections.abc import AsyncIterator, Awaitable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import structlog

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
from dynamo_runtime._discovery.etcd_client import CLOSE_TIMEOUT_S, EtcdClient, record, revision, text
from dynamo_runtime._discovery.etcd_connection import EtcdConnection
from dynamo_runtime._discovery.etcd_leases import KEEPALIVES_PER_TTL, EtcdLease, grant, keep_alive, restore
from dynamo_runtime._discovery.etcd_options import EtcdTarget, etcd_target
from dynamo_runtime._discovery.etcd_watches import EtcdWatches, listing
from dynamo_runtime._plane.timers import cancelled_within, wait_within

if TYPE_CHECKING:
    from dynamo_core.telemetry import Metrics

logger = structlog.get_logger(__name__)

_SHORTEST_PAUSE_S = 0.01
_REVOKE_TIMEOUT_S = 2.0
"""Time that ``close`` gives to ending leases, whatever the limit of a call is."""


class EtcdDiscovery:
    """A client of an etcd cluster.

    While no server answers, watches keep their last view, leases are tried again and again, and calls raise
    ``UnavailableError``. When one answers again, leases that it no longer knows are granted anew with the same id,
    keys written with ``put`` under them come back, and each watch gets the difference. Keys written with
    ``compare_and_set`` do not come back: what they stand for, leadership say, may have passed on.

    Args:
        target: Servers and options.
        clock: Time.
        metrics: Scope to register metrics in.
    """

    def __init__(self, target: EtcdTarget, *, clock: Clock, metrics: Metrics | None = None) -> None:
        self._options = target.options
        self._clock = clock
        self._client = EtcdClient(target, clock)
        self._connection = EtcdConnection(self._client, clock, target.options)
        self._watches = EtcdWatches(self._connection)
        self._metrics = DiscoveryMetrics(metrics, self.status, lambda: self._watches.records)
        self._connection.metrics = self._metrics
        self._leases: dict[int, EtcdLease] = {}
        self._tending: asyncio.Task[None] | None = None
        self._closed = False

    async def start(self) -> None:
        """Connect.

        Raises:
            UnavailableError: if no server can be reached within the start-up limit.
            UnauthenticatedError: if the cluster refuses the user.
        """
        give_up_at_s = self._clock.monotonic() + self._options.startup_timeout_s
        while self._tending is None:
            try:
                await self._connection.probe()
            except UnavailableError as error:
                pause_s = self._connection.next_retry_s()
                if self._clock.monotonic() + pause_s >= give_up_at_s:
                    raise
                logger.warning("discovery.waiting", error=error.message)
                await self._clock.sleep(pause_s)
            else:
                self._tending = asyncio.get_running_loop().create_task(self._tend(), name="etcd-leases")

    async def close(self) -> None:
        """Revoke own leases, end own watches, disconnect, all within a few seconds. Idempotent."""
        if self._closed:
            return
        if not self._connection.failure:
            # Out of reach they lapse by themselves; that must not keep the process from leaving.
            revoking = (lease.revoke() for lease in list(self._leases.values()))
            await wait_within(self._clock, _REVOKE_TIMEOUT_S, _all_tried(revoking))
        self._closed = True
        await self._watches.close()
        if self._tending is not None:
            await cancelled_within(self._clock, CLOSE_TIMEOUT_S, [self._tending])
        await self._client.close()

    async def lease(self, ttl_s: float = DEFAULT_LEASE_TTL_S) -> Lease:
        """Create a lease; etcd counts in whole seconds and has a least time to live of its own."""
        if ttl_s <= 0:
            raise ConfigurationError(f"lease ttl_s {ttl_s} must be above 0")
        self._require_open()
        lease = EtcdLease(secrets.randbits(62) + 1, math.ceil(ttl_s), self._end_lease)
        await self._connection.reaching(grant(self._client, lease.id, lease.ttl_s))
        self._schedule(lease)
        self._leases[lease.id] = lease
        self._connection.disturbed.set()
        return lease

    async def put(self, key: str, value: bytes, *, lease: Lease | None = None) -> int:
        """Write a key and return its revision.

        Raises:
            ConflictError: if the lease has ended.
            UnavailableError: if no server answers; the key may or may not have been written.
        """
        own = self._own(lease)
        body = {"key": text(key), "value": text(value), "lease": str(own.id if own else 0)}
        answer = await self._leased(own, "kv/put", body, repeatable=True)
        self._disown(key)
        if own is not None:
            own.records[key] = value
        return revision(answer)

    async def compare_and_set(
        self, key: str, value: bytes, *, expected: int | None, lease: Lease | None = None
    ) -> int | None:
        """Write a key if its revision is ``expected`` (None: if it is absent); None if the comparison failed.

        Raises:
            ConflictError: if the lease has ended.
            UnavailableError: if no server answers; the key may or may not have been written.
        """
        own = self._own(lease)
        body = {
            "compare": [{"target": "MOD", "key": text(key), "result": "EQUAL", "mod_revision": str(expected or 0)}],
            "success": [{"request_put": {"key": text(key), "value": text(value), "lease": str(own.id if own else 0)}}],
        }
        answer = await self._leased(own, "kv/txn", body, repeatable=False)
        if not answer.get("succeeded"):
            return None
        self._disown(key)
        return revision(answer)

    async def get(self, key: str) -> Record | None:
        """Return a key's record, or None."""
        found = (await self._call("kv/range", {"key": text(key)})).get("kvs", [])
        return record(found[0]) if found else None

    async def delete(self, key: str) -> bool:
        """Delete a key; return whether it was there."""
        self._disown(key)
        answer = await self._call("kv/deleterange", {"key": text(key)})
        return int(answer.get("deleted", 0)) > 0

    async def list(self, prefix: str) -> list[Record]:
        """Return the records under a prefix, in key order."""
        self._require_open()
        records, _ = await self._connection.reaching(listing(self._client, prefix))
        return list(records.values())

    def watch(self, prefix: str) -> AsyncIterator[WatchEvent]:
        """Yield present records, then ``WatchSynced``, then changes in the order of revisions.

        A watch begun while no server answers waits for one.
        """
        self._require_open()
        return self._watches.open(prefix)

    def status(self) -> DiscoveryStatus:
        """Return whether a server answered the last time."""
        if self._closed:
            return DiscoveryStatus(connected=False, detail="closed")
        return self._connection.status()

    # Calls.

    async def _call(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        self._require_open()
        return await self._connection.reaching(self._client.call(path, body))

    async def _leased(
        self, lease: EtcdLease | None, path: str, body: Mapping[str, Any], *, repeatable: bool
    ) -> dict[str, Any]:
        """Call; if the store has lost the lease that the call writes under, restore it and call again."""
        self._require_open()
        for _ in range(2):
            try:
                return await self._connection.reaching(self._client.call(path, body, repeatable=repeatable))
            except ConflictError:
                if lease is None or lease.revoked:
                    raise
                await self._connection.reaching(self._restore(lease))
        raise ConflictError(f"lease {lease.id if lease else 0:x} does not stay", reason="discovery.lease_ended")

    # Leases.

    async def _tend(self) -> None:
        """Keep own leases alive, and try a connection that has been silent."""
        while True:
            await self._pause()
            # What goes wrong shows in the status; the next round tries again.
            with contextlib.suppress(DynamoError):
                await self._tend_once()

    async def _pause(self) -> None:
        connection = self._connection
        if connection.failure:
            await self._clock.sleep(connection.next_retry_s())
            return
        due_s = [lease.due_at_s for lease in self._leases.values()]
        due_s.append(connection.reached_at_s + self._options.probe_interval_s)
        pause_s = max(_SHORTEST_PAUSE_S, min(due_s) - self._clock.monotonic())
        await wait_within(self._clock, pause_s, connection.disturbed.wait())
        connection.disturbed.clear()

    async def _tend_once(self) -> None:
        now_s = self._clock.monotonic()
        for lease in [lease for lease in self._leases.values() if lease.due_at_s <= now_s or self._connection.failure]:
            await self._connection.reaching(keep_alive(self._client, lease))
            if not lease.present and not lease.revoked:
                await self._connection.reaching(self._restore(lease))
            self._schedule(lease)
        if (
            self._connection.failure
            or self._clock.monotonic() - self._connection.reached_at_s >= self._options.probe_interval_s
        ):
            await self._connection.probe()

    def _schedule(self, lease: EtcdLease) -> None:
        lease.due_at_s = self._clock.monotonic() + lease.ttl_s / KEEPALIVES_PER_TTL

    async def _restore(self, lease: EtcdLease) -> None:
        lease.present = False
        await restore(self._client, lease)
        self._metrics.lease_restored()
        logger.warning("discovery.lease_restored", lease=f"{lease.id:x}", keys=len(lease.records))

    async def _end_lease(self, lease: EtcdLease) -> None:
        self._leases.pop(lease.id, None)
        try:
            await self._connection.reaching(self._client.call("lease/revoke", {"ID": str(lease.id)}))
        except ConflictError:
            # It had lapsed already.
            return

    def _own(self, lease: Lease | None) -> EtcdLease | None:
        if lease is None:
            return None
        own = self._leases.get(lease.id)
        if own is None or own is not lease:
            raise ConflictError(f"lease {lease.id:x} has ended; create a new one", reason="discovery.lease_ended")
        return own

    def _disown(self, key: str) -> None:
        for lease in self._leases.values():
            lease.records.pop(key, None)

    def _require_open(self) -> None:
        if self._closed:
            raise UnavailableError("this discovery client is closed", reason="discovery.closed")


async def _all_tried(work: Iterable[Awaitable[None]]) -> None:
    await asyncio.gather(*work, return_exceptions=True)


def etcd_discovery(url: str, *, clock: object, options: Mapping[str, object]) -> Discovery:
    """Make the client for an ``etcd://host:port[,host:port...]`` URL; see ``EtcdOptions`` for the options.

    Raises:
        ConfigurationError: if the URL or an option is wrong, or a TLS file cannot be used.
    """
    target, metrics = etcd_target(url, options)
    return EtcdDiscovery(target, clock=cast("Clock", clock), metrics=metrics)


if TYPE_CHECKING:
    _DISCOVERY: type[Discovery] = EtcdDiscovery
    _FACTORY: DiscoveryFactory = etcd_discovery
