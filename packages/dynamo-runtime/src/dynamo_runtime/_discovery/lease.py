"""A lease of this process, whatever the store."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from dynamo_core.discovery import Lease
from dynamo_core.errors import ConflictError

KEEPALIVES_PER_TTL = 3


class OwnLease:
    """A lease of this process.

    Args:
        lease_id: Identity, kept over restorations.
        ttl_s: Seconds it outlives its last sign of life.
        end: Ends it in the store.

    Attributes:
        records: Keys that come back with it, and their values.
        present: Whether the store knew it the last time.
        due_at_s: When its next sign of life is due, monotonic.
    """

    def __init__(self, lease_id: int, ttl_s: float, end: Callable[[OwnLease], Awaitable[None]]) -> None:
        self.ttl_s = ttl_s
        self.records: dict[str, bytes] = {}
        self.present = True
        self.due_at_s = 0.0
        self._id = lease_id
        self._end = end
        self._revoked = False

    @property
    def id(self) -> int:
        """Identity, unique within the store."""
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
            UnavailableError: if the store cannot be reached; then the lease lapses by itself.
        """
        if not self._revoked:
            self._revoked = True
            await self._end(self)


class OwnLeases(dict[int, OwnLease]):
    """The leases of one client by identity."""

    def own(self, lease: Lease | None) -> OwnLease | None:
        """Return a lease as this client's own; None for None.

        Raises:
            ConflictError: if it has ended.
        """
        if lease is None:
            return None
        found = self.get(lease.id)
        if found is None or found is not lease:
            raise ConflictError(f"lease {lease.id:x} has ended; create a new one", reason="discovery.lease_ended")
        return found

    def disown(self, key: str) -> None:
        """A key is no longer under any of them."""
        for lease in self.values():
            lease.records.pop(key, None)


if TYPE_CHECKING:
    _LEASE: type[Lease] = OwnLease
