"""Leases in Kubernetes: objects that say when their process was last alive, and who ends those that have lapsed."""

from __future__ import annotations

import datetime
import secrets
from typing import TYPE_CHECKING, Any

import structlog

from dynamo_core.clock import Clock
from dynamo_runtime._discovery._metrics import DiscoveryMetrics
from dynamo_runtime._discovery.k8s_client import CONFIG_MAPS, LEASES, K8sClient, K8sError
from dynamo_runtime._discovery.k8s_objects import (
    LEASE,
    LEASE_ROLE,
    ROLE,
    SCOPE,
    Owner,
    lease_name,
    record_name,
    record_object,
)
from dynamo_runtime._discovery.k8s_options import K8sOptions
from dynamo_runtime._discovery.lease import OwnLease
from dynamo_runtime._discovery.tending import LeaseStore

logger = structlog.get_logger(__name__)


class K8sLeases:
    """The leases of one client in the store.

    Args:
        client: Calls; their refusals, ``K8sError``, are typed by whoever awaits.
        options: Scope and pod.
        clock: Time.
    """

    def __init__(self, client: K8sClient, options: K8sOptions, clock: Clock) -> None:
        self._client = client
        self._options = options
        self._clock = clock
        self._uids: dict[int, str] = {}

    def owner(self, lease: OwnLease) -> Owner:
        """Return what a record says of its lease."""
        return Owner(lease.id, self._uids.get(lease.id, ""), self._options.pod_name)

    async def grant(self, lease: OwnLease) -> None:
        """Create a lease under its id; one that exists already is taken over."""
        try:
            made = await self._client.create(LEASES, self._object(lease))
        except K8sError as error:
            if error.reason != "AlreadyExists":
                raise
            made = await self._client.patch(LEASES, lease_name(lease.id), {"spec": self._spec(lease)})
        self._uids[lease.id] = str(made["metadata"]["uid"])

    async def keep_alive(self, lease: OwnLease) -> None:
        """Show a sign of life, and note whether the store still knows the lease."""
        try:
            await self._client.patch(LEASES, lease_name(lease.id), {"spec": {"renewTime": self._now()}})
        except K8sError as error:
            if error.code != 404:
                raise
            lease.present = False

    async def restore(self, lease: OwnLease) -> None:
        """Grant a lost lease again and write the keys that nobody else has taken meanwhile."""
        await self.grant(lease)
        for key, value in list(lease.records.items()):
            try:
                await self._client.create(
                    CONFIG_MAPS, record_object(self._options.scope, key, value, self.owner(lease))
                )
            except K8sError as error:
                if error.reason != "AlreadyExists":
                    raise
                if not await self._holds(lease, key):
                    lease.records.pop(key, None)

    async def end(self, lease: OwnLease) -> None:
        """End a lease and delete its keys; one that has lapsed is no error."""
        self._uids.pop(lease.id, None)
        await end_lease(self._client, self._options.scope, lease_name(lease.id), f"{lease.id:x}")

    async def probe(self) -> None:
        """See whether the server answers. Raises ``UnavailableError`` if not."""
        await self._client.get(LEASES, reaper_name(self._options.scope))

    async def _holds(self, lease: OwnLease, key: str) -> bool:
        found = await self._client.get(CONFIG_MAPS, record_name(self._options.scope, key))
        return found is not None and found["metadata"].get("labels", {}).get(LEASE) == f"{lease.id:x}"

    def _object(self, lease: OwnLease) -> dict[str, Any]:
        options = self._options
        labels = {SCOPE: options.scope, ROLE: LEASE_ROLE, LEASE: f"{lease.id:x}"}
        metadata: dict[str, Any] = {"name": lease_name(lease.id), "labels": labels}
        if options.pod_name and options.pod_uid:
            pod = {"apiVersion": "v1", "kind": "Pod", "name": options.pod_name, "uid": options.pod_uid}
            metadata["ownerReferences"] = [pod]
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": metadata,
            "spec": {"holderIdentity": options.pod_name or lease_name(lease.id), **self._spec(lease)},
        }

    def _spec(self, lease: OwnLease) -> dict[str, Any]:
        return {"leaseDurationSeconds": int(lease.ttl_s), "renewTime": self._now()}

    def _now(self) -> str:
        return timestamp(self._clock)


class LeaseReaper:
    """Ends leases whose processes are gone. Of all clients one does so at a time, by holding a lease of its own.

    A lease is dead if its version has not changed for its time to live as this process measures it: no wall-clock time
    is compared with another, so a clock that jumps ends nothing.

    Args:
        client: Calls.
        options: Scope and times.
        clock: Time.
        metrics: Counts.
    """

    def __init__(self, client: K8sClient, options: K8sOptions, clock: Clock, metrics: DiscoveryMetrics) -> None:
        self._client = client
        self._scope = options.scope
        self._term_s = max(1, round(options.reap_interval_s * 3))
        self._clock = clock
        self._metrics = metrics
        self._identity = secrets.token_hex(8)
        self._sightings: dict[str, tuple[str, float]] = {}
        self._looked_at_s = clock.monotonic()

    async def turn(self) -> None:
        """Reap if it is this client's turn, or if whose turn it was is gone."""
        name = reaper_name(self._scope)
        found = await self._client.get(LEASES, name)
        now_s = self._clock.monotonic()
        idle_s, self._looked_at_s = now_s - self._looked_at_s, now_s
        try:
            if found is None:
                await self._client.create(LEASES, self._object({}))
            elif found["spec"].get("holderIdentity") == self._identity or self._silent(found, now_s, idle_s):
                await self._client.replace(LEASES, self._object(found["metadata"]))
            else:
                return
        except K8sError as error:
            # Another one was faster.
            if error.code != 409:
                raise
            return
        await self._reap(now_s, idle_s)

    async def _reap(self, now_s: float, idle_s: float) -> None:
        found, _ = await self._client.list(LEASES, f"{SCOPE}={self._scope},{ROLE}={LEASE_ROLE}")
        names = {lease["metadata"]["name"] for lease in found} | {reaper_name(self._scope)}
        self._sightings = {name: seen for name, seen in self._sightings.items() if name in names}
        for lease in found:
            if self._silent(lease, now_s, idle_s):
                await self._end(lease["metadata"])

    async def _end(self, metadata: dict[str, Any]) -> None:
        name, hex_id = str(metadata["name"]), str(metadata.get("labels", {}).get(LEASE, ""))
        try:
            await end_lease(self._client, self._scope, name, hex_id, version=str(metadata["resourceVersion"]))
        except K8sError as error:
            # It has just been renewed.
            if error.code != 409:
                raise
            return
        self._metrics.lease_expired()
        logger.info("discovery.lease_expired", lease=hex_id)

    def _silent(self, lease: dict[str, Any], now_s: float, idle_s: float) -> bool:
        name, present = str(lease["metadata"]["name"]), str(lease["metadata"]["resourceVersion"])
        ttl_s = float(lease["spec"].get("leaseDurationSeconds") or self._term_s)
        known = self._sightings.get(name)
        # If this process itself stood still for long, all may have stood still: silence then proves nothing.
        if known is None or known[0] != present or idle_s > max(ttl_s, self._term_s):
            self._sightings[name] = known = (present, now_s)
        return now_s - known[1] >= ttl_s

    def _object(self, metadata: dict[str, Any]) -> dict[str, Any]:
        kept = {key: metadata[key] for key in ("resourceVersion",) if key in metadata}
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": reaper_name(self._scope), "labels": {SCOPE: self._scope, ROLE: "reaper"}, **kept},
            "spec": {
                "holderIdentity": self._identity,
                "leaseDurationSeconds": self._term_s,
                "renewTime": timestamp(self._clock),
            },
        }


def reaper_name(scope: str) -> str:
    """Return the name of the lease of whoever reaps."""
    return f"dynamo-reaper-{scope.lower().replace('_', '-')}"


def timestamp(clock: Clock) -> str:
    """Return the time as Kubernetes writes it."""
    return datetime.datetime.fromtimestamp(clock.time(), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


async def end_lease(client: K8sClient, scope: str, name: str, hex_id: str, *, version: str = "") -> None:
    """Delete a lease, with a ``version`` only at that one, and then its records."""
    await client.delete(LEASES, name, version=version)
    if hex_id:
        await client.delete_all(CONFIG_MAPS, f"{SCOPE}={scope},{LEASE}={hex_id}")


if TYPE_CHECKING:
    _STORE: type[LeaseStore] = K8sLeases
