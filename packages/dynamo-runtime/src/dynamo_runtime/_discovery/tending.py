"""Own leases kept alive and restored, and a silent connection tried: the background of a client of a server."""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
from collections.abc import Awaitable, Iterable
from typing import Protocol

import structlog

from dynamo_core.errors import ConfigurationError, DynamoError, UnavailableError
from dynamo_runtime._discovery.connection import StoreConnection
from dynamo_runtime._discovery.http import CLOSE_TIMEOUT_S
from dynamo_runtime._discovery.lease import KEEPALIVES_PER_TTL, OwnLease, OwnLeases
from dynamo_runtime._plane.timers import cancelled_within, wait_within

logger = structlog.get_logger(__name__)

_SHORTEST_PAUSE_S = 0.01
_REVOKE_TIMEOUT_S = 2.0
"""Time that ``close`` gives to ending leases, whatever the limit of a call is."""


class LeaseStore(Protocol):
    """What a store must be able to do with leases. Errors are those of ``dynamo_core``."""

    async def grant(self, lease: OwnLease) -> None:
        """Create a lease under its id; one that exists already is taken over."""
        ...

    async def keep_alive(self, lease: OwnLease) -> None:
        """Show a sign of life, and note in ``lease.present`` whether the store still knows the lease."""
        ...

    async def restore(self, lease: OwnLease) -> None:
        """Grant a lost lease again and write the keys that nobody else has taken meanwhile."""
        ...

    async def end(self, lease: OwnLease) -> None:
        """End a lease and delete its keys; one that has lapsed is no error."""
        ...

    async def probe(self) -> None:
        """See whether a server answers. Raises ``UnavailableError`` if none does."""
        ...


class LeaseTender:
    """Tends the leases and the connection of one client.

    Args:
        connection: What the client's parts share.
        store: The leases in the store.
    """

    def __init__(self, connection: StoreConnection, store: LeaseStore) -> None:
        self.leases = OwnLeases()
        self._connection = connection
        self._clock = connection.clock
        self._store = store
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Wait for a server to answer, then tend in the background. Idempotent.

        Raises:
            UnavailableError: if no server can be reached within the start-up limit.
        """
        give_up_at_s = self._clock.monotonic() + self._connection.times.startup_timeout_s
        while self._task is None:
            try:
                await self._connection.reaching(self._probe())
            except UnavailableError as error:
                pause_s = self._connection.next_retry_s()
                if self._clock.monotonic() + pause_s >= give_up_at_s:
                    raise
                logger.warning("discovery.waiting", error=error.message)
                await self._clock.sleep(pause_s)
            else:
                self._task = asyncio.get_running_loop().create_task(self._tend(), name="discovery-leases")

    async def revoke_all(self) -> None:
        """End all leases, unless the store is out of reach: then they lapse by themselves."""
        if not self._connection.failure:
            revoking = (lease.revoke() for lease in list(self.leases.values()))
            await wait_within(self._clock, _REVOKE_TIMEOUT_S, _all_tried(revoking))

    async def close(self) -> None:
        """Stop tending."""
        if self._task is not None:
            await cancelled_within(self._clock, CLOSE_TIMEOUT_S, [self._task])

    async def lease(self, ttl_s: float) -> OwnLease:
        """Create a lease; its time to live is rounded up to whole seconds, in which stores count."""
        if ttl_s <= 0:
            raise ConfigurationError(f"lease ttl_s {ttl_s} must be above 0")
        lease = OwnLease(secrets.randbits(62) + 1, math.ceil(ttl_s), self._end)
        await self._connection.reaching(self._grant(lease))
        self._schedule(lease)
        self.leases[lease.id] = lease
        self._connection.disturbed.set()
        return lease

    async def restore(self, lease: OwnLease) -> None:
        """Restore a lease that the store has lost."""
        lease.present = False
        await self._store.restore(lease)
        lease.present = True
        self._connection.metrics.lease_restored()
        logger.warning("discovery.lease_restored", lease=f"{lease.id:x}", keys=len(lease.records))

    async def _tend(self) -> None:
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
        due_s = [lease.due_at_s for lease in self.leases.values()]
        due_s.append(connection.reached_at_s + connection.times.probe_interval_s)
        pause_s = max(_SHORTEST_PAUSE_S, min(due_s) - self._clock.monotonic())
        await wait_within(self._clock, pause_s, connection.disturbed.wait())
        connection.disturbed.clear()

    async def _tend_once(self) -> None:
        connection = self._connection
        now_s = self._clock.monotonic()
        for lease in [lease for lease in self.leases.values() if lease.due_at_s <= now_s or connection.failure]:
            await connection.reaching(self._keep_alive(lease))
            self._schedule(lease)
        if connection.failure or self._clock.monotonic() - connection.reached_at_s >= connection.times.probe_interval_s:
            await connection.reaching(self._probe())

    async def _keep_alive(self, lease: OwnLease) -> None:
        await self._store.keep_alive(lease)
        if not lease.present and not lease.revoked:
            await self.restore(lease)

    async def _grant(self, lease: OwnLease) -> None:
        await self._store.grant(lease)

    async def _probe(self) -> None:
        await self._store.probe()

    async def _end(self, lease: OwnLease) -> None:
        self.leases.pop(lease.id, None)
        await self._connection.reaching(self._ended(lease))

    async def _ended(self, lease: OwnLease) -> None:
        await self._store.end(lease)

    def _schedule(self, lease: OwnLease) -> None:
        lease.due_at_s = self._clock.monotonic() + lease.ttl_s / KEEPALIVES_PER_TTL


async def _all_tried(work: Iterable[Awaitable[None]]) -> None:
    await asyncio.gather(*work, return_exceptions=True)
