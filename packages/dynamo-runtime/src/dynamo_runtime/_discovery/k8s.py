"""Discovery in Kubernetes: records are ConfigMaps, leases are Leases, EndpointSlices say which pods are ready."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

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
from dynamo_core.errors import ConflictError, DynamoError, UnavailableError
from dynamo_runtime._discovery._metrics import DiscoveryMetrics
from dynamo_runtime._discovery.connection import StoreConnection
from dynamo_runtime._discovery.http import CLOSE_TIMEOUT_S
from dynamo_runtime._discovery.k8s_client import CONFIG_MAPS, K8sClient, K8sError, as_discovery_error
from dynamo_runtime._discovery.k8s_leases import K8sLeases, LeaseReaper
from dynamo_runtime._discovery.k8s_objects import Owner, record_name, record_object, version
from dynamo_runtime._discovery.k8s_options import K8sTarget, k8s_target
from dynamo_runtime._discovery.k8s_watches import K8sWatches, PodReadiness
from dynamo_runtime._discovery.lease import OwnLease
from dynamo_runtime._discovery.tending import LeaseTender
from dynamo_runtime._plane.timers import cancelled_within

if TYPE_CHECKING:
    from dynamo_core.telemetry import Metrics

T = TypeVar("T")
_PUT_ATTEMPTS = 5


class K8sConnection(StoreConnection):
    """A connection that types the refusals of Kubernetes."""

    async def reaching(self, work: Coroutine[Any, Any, T]) -> T:
        """Await calls to the store, note whether they reached it, and type their refusals."""
        try:
            return await super().reaching(work)
        except K8sError as error:
            self.note_reached()
            raise as_discovery_error(error) from error


class K8sDiscovery:
    """A client of the API server of a cluster.

    While the server is away it behaves as etcd discovery does: watches keep their last view, leases are tried again,
    calls raise ``UnavailableError``, and what was lost meanwhile comes back, keys written with ``compare_and_set``
    aside.

    Args:
        target: Server, namespace and options.
        clock: Time.
        metrics: Scope to register metrics in.
    """

    def __init__(self, target: K8sTarget, *, clock: Clock, metrics: Metrics | None = None) -> None:
        options = target.options
        self._scope = options.scope
        self._reap_interval_s = options.reap_interval_s
        self._clock = clock
        self._client = K8sClient(target, clock)
        self._connection = K8sConnection("Kubernetes", self._client, clock, options)
        self._readiness = PodReadiness(self._connection, self._client, options.service, self._readiness_changed)
        self._watches = K8sWatches(self._connection, self._client, options.scope, self._readiness.ready)
        counts = DiscoveryMetrics(metrics, self.status, lambda: self._watches.records)
        self._connection.metrics = counts
        self._store = K8sLeases(self._client, options, clock)
        self._reaper = LeaseReaper(self._client, options, clock, counts)
        self._tender = LeaseTender(self._connection, self._store)
        self._leases = self._tender.leases
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False

    async def start(self) -> None:
        """Connect.

        Raises:
            UnavailableError: if the server cannot be reached within the start-up limit.
            UnauthenticatedError: if it refuses the token.
            PermissionDeniedError: if the token does not allow what discovery needs.
        """
        await self._tender.start()
        await self._connection.reaching(self._readiness.refresh())
        if not self._tasks:
            loop = asyncio.get_running_loop()
            self._tasks = [
                loop.create_task(self._readiness.keep_following(), name="discovery-readiness"),
                loop.create_task(self._reap(), name="discovery-reaper"),
            ]

    async def close(self) -> None:
        """Revoke own leases, end own watches, disconnect, all within a few seconds. Idempotent."""
        if self._closed:
            return
        await self._tender.revoke_all()
        self._closed = True
        await cancelled_within(self._clock, CLOSE_TIMEOUT_S, self._tasks)
        await self._watches.close()
        await self._tender.close()
        await self._client.close()

    async def lease(self, ttl_s: float = DEFAULT_LEASE_TTL_S) -> Lease:
        """Create a lease; Kubernetes counts in whole seconds."""
        self._require_open()
        return await self._tender.lease(ttl_s)

    async def put(self, key: str, value: bytes, *, lease: Lease | None = None) -> int:
        """Write a key and return its revision.

        Raises:
            ConflictError: if the lease has ended.
            UnavailableError: if the server does not answer; the key may or may not have been written.
        """
        own = self._leases.own(lease)
        revision = await self._reaching(self._put(key, value, self._owner(own)))
        self._leases.disown(key)
        if own is not None:
            own.records[key] = value
        return revision

    async def compare_and_set(
        self, key: str, value: bytes, *, expected: int | None, lease: Lease | None = None
    ) -> int | None:
        """Write a key if its revision is ``expected`` (None: if it is absent); None if the comparison failed.

        Raises:
            ConflictError: if the lease has ended.
            UnavailableError: if the server does not answer; the key may or may not have been written.
        """
        own = self._leases.own(lease)
        revision = await self._reaching(self._compare_and_set(key, value, expected, self._owner(own)))
        if revision is not None:
            self._leases.disown(key)
        return revision

    async def get(self, key: str) -> Record | None:
        """Return a key's record, or None; one that cannot be read counts as absent."""
        found = await self._reaching(self._client.get(CONFIG_MAPS, record_name(self._scope, key)))
        readable = self._watches.readable(found) if found is not None else None
        return readable.record if readable is not None else None

    async def delete(self, key: str) -> bool:
        """Delete a key; return whether it was there."""
        self._leases.disown(key)
        return await self._reaching(self._client.delete(CONFIG_MAPS, record_name(self._scope, key)))

    async def list(self, prefix: str) -> list[Record]:
        """Return the records under a prefix, in key order."""
        view, _ = await self._reaching(self._watches.listing(prefix))
        return list(self._watches.visible(view).values())

    def watch(self, prefix: str) -> AsyncIterator[WatchEvent]:
        """Yield present records, then ``WatchSynced``, then changes in the order of revisions.

        A watch begun while the server is away waits for it.
        """
        self._require_open()
        return self._watches.open(prefix)

    def status(self) -> DiscoveryStatus:
        """Return whether the server answered the last time."""
        if self._closed:
            return DiscoveryStatus(connected=False, detail="closed")
        return self._connection.status()

    async def _put(self, key: str, value: bytes, owner: Owner | None) -> int:
        for _ in range(_PUT_ATTEMPTS):
            body = record_object(self._scope, key, value, owner)
            try:
                return version(await self._client.create(CONFIG_MAPS, body))
            except K8sError as error:
                if error.reason != "AlreadyExists":
                    raise
            try:
                return version(await self._client.replace(CONFIG_MAPS, body))
            except K8sError as error:
                # Deleted, or written by another, in between.
                if error.code not in (404, 409):
                    raise
        raise ConflictError(f"key {key} is created and deleted without end", reason="request.conflict")

    async def _compare_and_set(self, key: str, value: bytes, expected: int | None, owner: Owner | None) -> int | None:
        body = record_object(self._scope, key, value, owner, expected)
        try:
            written = await (self._client.create if expected is None else self._client.replace)(CONFIG_MAPS, body)
        except K8sError as error:
            if error.code in (404, 409):
                return None
            raise
        return version(written)

    def _owner(self, lease: OwnLease | None) -> Owner | None:
        return self._store.owner(lease) if lease is not None else None

    async def _reap(self) -> None:
        while True:
            with contextlib.suppress(DynamoError):
                await self._connection.reaching(self._reaper.turn())
            await self._clock.sleep(self._reap_interval_s)

    def _readiness_changed(self) -> None:
        self._watches.readiness_changed()

    async def _reaching(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            self._require_open()
        except UnavailableError:
            work.close()
            raise
        return await self._connection.reaching(work)

    def _require_open(self) -> None:
        if self._closed:
            raise UnavailableError("this discovery client is closed", reason="discovery.closed")


def k8s_discovery(url: str, *, clock: object, options: Mapping[str, object]) -> Discovery:
    """Make the client for a ``k8s://[host:port]/[namespace]`` URL; see ``K8sOptions`` for the options.

    Raises:
        ConfigurationError: if the URL, an option or a kubeconfig is wrong, or a TLS file cannot be used.
    """
    # Settings cost pydantic, which most processes have loaded by now and others need not.
    from dynamo_runtime._settings import process_environment

    target, metrics = k8s_target(url, options, process_environment())
    return K8sDiscovery(target, clock=cast("Clock", clock), metrics=metrics)


if TYPE_CHECKING:
    _DISCOVERY: type[Discovery] = K8sDiscovery
    _FACTORY: DiscoveryFactory = k8s_discovery
