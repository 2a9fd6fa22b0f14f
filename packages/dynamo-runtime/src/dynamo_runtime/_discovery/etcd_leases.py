"""Leases in etcd: kept alive together, granted again with the same id and keys when the store has lost them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from dynamo_core.discovery import Lease
from dynamo_runtime._discovery.etcd_client import PRECONDITION, EtcdClient, EtcdError, text

KEEPALIVES_PER_TTL = 3


class EtcdLease:
    """A lease of this process.

    Args:
        lease_id: Identity, kept over restorations.
        ttl_s: Seconds it outlives its last sign of life.
        end: Ends it in the store.
    """

    def __init__(self, lease_id: int, ttl_s: int, end: Callable[[EtcdLease], Awaitable[None]]) -> None:
        self.ttl_s = ttl_s
        self.records: dict[str, bytes] = {}
        self.present = True
        self.due_at_s = 0.0
        self._id = lease_id
        self._end = end
        self._revoked = False

    @property
    def id(self) -> int:
        """Identity, unique within the cluster."""
        return self._id

    @property
    def revoked(self) -> bool:
        """Whether its owner ended it."""
        return self._revoked

    @property
    def valid(self) -> bool:
        """False once it has ended, or while it is being restored after the store lost it."""
        return self.present and not self._revoked

    async def revoke(self) -> None:
        """End it now and delete its keys. Idempotent.

        Raises:
            UnavailableError: if etcd cannot be reached; then the lease lapses by itself.
        """
        if not self._revoked:
            self._revoked = True
            await self._end(self)


async def grant(client: EtcdClient, lease_id: int, ttl_s: int) -> None:
    """Create a lease under an id; one that exists already is taken over."""
    try:
        await client.call("lease/grant", {"ID": str(lease_id), "TTL": str(ttl_s)})
    except EtcdError as error:
        if error.code != PRECONDITION:
            raise


async def keep_alive(client: EtcdClient, lease: EtcdLease) -> None:
    """Show a sign of life, and note whether the store still knows the lease."""
    answer = await client.call("lease/keepalive", {"ID": str(lease.id)})
    lease.present = int(answer.get("TTL", 0)) > 0


async def restore(client: EtcdClient, lease: EtcdLease) -> None:
    """Grant a lost lease again and write the keys that nobody else has taken meanwhile."""
    await grant(client, lease.id, lease.ttl_s)
    for key, value in list(lease.records.items()):
        body = {
            "compare": [{"target": "CREATE", "key": text(key), "result": "EQUAL", "create_revision": "0"}],
            "success": [{"request_put": {"key": text(key), "value": text(value), "lease": str(lease.id)}}],
            "failure": [{"request_range": {"key": text(key)}}],
        }
        answer = await client.call("kv/txn", body)
        if not answer.get("succeeded") and _holder(answer) != str(lease.id):
            lease.records.pop(key, None)
    lease.present = True


def _holder(answer: dict[str, Any]) -> str:
    """Return the lease under which the key stands that a transaction's range found."""
    found = answer["responses"][0]["response_range"].get("kvs", [])
    return str(found[0].get("lease", "")) if found else ""


if TYPE_CHECKING:
    _LEASE: type[Lease] = EtcdLease
