"""Leases in etcd: granted again with the same id and keys when the store has lost them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dynamo_runtime._discovery.etcd_client import NOT_FOUND, PRECONDITION, EtcdClient, EtcdError, text
from dynamo_runtime._discovery.lease import OwnLease
from dynamo_runtime._discovery.tending import LeaseStore


class EtcdLeases:
    """The leases of one client in the store.

    Args:
        client: Calls; their refusals, ``EtcdError``, are typed by whoever awaits.
    """

    def __init__(self, client: EtcdClient) -> None:
        self._client = client

    async def grant(self, lease: OwnLease) -> None:
        """Create a lease under its id; one that exists already is taken over."""
        try:
            await self._client.call("lease/grant", {"ID": str(lease.id), "TTL": str(int(lease.ttl_s))})
        except EtcdError as error:
            if error.code != PRECONDITION:
                raise

    async def keep_alive(self, lease: OwnLease) -> None:
        """Show a sign of life, and note whether the store still knows the lease."""
        answer = await self._client.call("lease/keepalive", {"ID": str(lease.id)})
        lease.present = int(answer.get("TTL", 0)) > 0

    async def restore(self, lease: OwnLease) -> None:
        """Grant a lost lease again and write the keys that nobody else has taken meanwhile."""
        await self.grant(lease)
        for key, value in list(lease.records.items()):
            body = {
                "compare": [{"target": "CREATE", "key": text(key), "result": "EQUAL", "create_revision": "0"}],
                "success": [{"request_put": {"key": text(key), "value": text(value), "lease": str(lease.id)}}],
                "failure": [{"request_range": {"key": text(key)}}],
            }
            answer = await self._client.call("kv/txn", body)
            if not answer.get("succeeded") and _holder(answer) != str(lease.id):
                lease.records.pop(key, None)

    async def end(self, lease: OwnLease) -> None:
        """End a lease and delete its keys; one that has lapsed is no error."""
        try:
            await self._client.call("lease/revoke", {"ID": str(lease.id)})
        except EtcdError as error:
            if error.code != NOT_FOUND:
                raise

    async def probe(self) -> None:
        """See whether a server answers. Raises ``UnavailableError`` if none does."""
        await self._client.call("kv/range", {"key": text("v1/"), "count_only": True})


def _holder(answer: dict[str, Any]) -> str:
    """Return the lease under which the key stands that a transaction's range found."""
    found = answer["responses"][0]["response_range"].get("kvs", [])
    return str(found[0].get("lease", "")) if found else ""


if TYPE_CHECKING:
    _STORE: type[LeaseStore] = EtcdLeases
