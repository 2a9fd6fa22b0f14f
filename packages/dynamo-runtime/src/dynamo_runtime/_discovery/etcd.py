"""Discovery in etcd."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any, cast

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
from dynamo_core.errors import ConflictError, UnavailableError
from dynamo_runtime._discovery._metrics import DiscoveryMetrics
from dynamo_runtime._discovery.etcd_client import EtcdClient, record, revision, text
from dynamo_runtime._discovery.etcd_connection import EtcdConnection
from dynamo_runtime._discovery.etcd_leases import EtcdLeases
from dynamo_runtime._discovery.etcd_options import EtcdTarget, etcd_target
from dynamo_runtime._discovery.etcd_watches import EtcdWatches, listing
from dynamo_runtime._discovery.lease import OwnLease
from dynamo_runtime._discovery.tending import LeaseTender

if TYPE_CHECKING:
    from dynamo_core.telemetry import Metrics


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
        self._client = EtcdClient(target, clock)
        self._connection = EtcdConnection("etcd", self._client, clock, target.options)
        self._watches = EtcdWatches(self._connection, self._client)
        self._connection.metrics = DiscoveryMetrics(metrics, self.status, lambda: self._watches.records)
        self._tender = LeaseTender(self._connection, EtcdLeases(self._client))
        self._leases = self._tender.leases
        self._closed = False

    async def start(self) -> None:
        """Connect.

        Raises:
            UnavailableError: if no server can be reached within the start-up limit.
            UnauthenticatedError: if the cluster refuses the user.
        """
        await self._tender.start()

    async def close(self) -> None:
        """Revoke own leases, end own watches, disconnect, all within a few seconds. Idempotent."""
        if self._closed:
            return
        await self._tender.revoke_all()
        self._closed = True
        await self._watches.close()
        await self._tender.close()
        await self._client.close()

    async def lease(self, ttl_s: float = DEFAULT_LEASE_TTL_S) -> Lease:
        """Create a lease; etcd counts in whole seconds and has a least time to live of its own."""
        self._require_open()
        return await self._tender.lease(ttl_s)

    async def put(self, key: str, value: bytes, *, lease: Lease | None = None) -> int:
        """Write a key and return its revision.

        Raises:
            ConflictError: if the lease has ended.
            UnavailableError: if no server answers; the key may or may not have been written.
        """
        own = self._leases.own(lease)
        body = {"key": text(key), "value": text(value), "lease": str(own.id if own else 0)}
        answer = await self._leased(own, "kv/put", body, repeatable=True)
        self._leases.disown(key)
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
        own = self._leases.own(lease)
        body = {
            "compare": [{"target": "MOD", "key": text(key), "result": "EQUAL", "mod_revision": str(expected or 0)}],
            "success": [{"request_put": {"key": text(key), "value": text(value), "lease": str(own.id if own else 0)}}],
        }
        answer = await self._leased(own, "kv/txn", body, repeatable=False)
        if not answer.get("succeeded"):
            return None
        self._leases.disown(key)
        return revision(answer)

    async def get(self, key: str) -> Record | None:
        """Return a key's record, or None."""
        found = (await self._call("kv/range", {"key": text(key)})).get("kvs", [])
        return record(found[0]) if found else None

    async def delete(self, key: str) -> bool:
        """Delete a key; return whether it was there."""
        self._leases.disown(key)
        answer = await self._call("kv/deleterange", {"key": text(key)})
        return int(answer.get("deleted", 0)) > 0

    async def list(self, prefix: str) -> list[Record]:
        """Return the records under a prefix, in key order."""
        self._require_open()
        records, _ = await self._connection.reaching(listing(self._client, prefix, self._connection.metrics))
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
        self, lease: OwnLease | None, path: str, body: Mapping[str, Any], *, repeatable: bool
    ) -> dict[str, Any]:
        """Call; if the store has lost the lease that the call writes under, restore it and call again."""
        self._require_open()
        for _ in range(2):
            try:
                return await self._connection.reaching(self._client.call(path, body, repeatable=repeatable))
            except ConflictError:
                if lease is None or lease.revoked:
                    raise
                await self._connection.reaching(self._tender.restore(lease))
        raise ConflictError(f"lease {lease.id if lease else 0:x} does not stay", reason="discovery.lease_ended")

    def _require_open(self) -> None:
        if self._closed:
            raise UnavailableError("this discovery client is closed", reason="discovery.closed")


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
