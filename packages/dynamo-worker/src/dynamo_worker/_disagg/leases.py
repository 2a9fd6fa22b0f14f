"""Holds on computed blocks until a decode worker has pulled them, with a deadline."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from dynamo_core.clock import Clock
from dynamo_core.errors import UnavailableError
from dynamo_worker._disagg.handoff import SupportsKvHandoff
from dynamo_worker._metrics import WorkerMetrics

_SWEEPS_PER_LEASE = 8

log = structlog.get_logger(__name__)


@dataclass(eq=False, slots=True)
class _Lease:
    hashes: list[int]
    ends_at_s: float
    in_use: bool = False


class LeaseTable:
    """Leases of one prefill worker. Blocks under lease are at most ``max_blocks``: beyond that the oldest ends.

    Args:
        engine: Holds the blocks.
        lease_s: Seconds a lease lives unless it is used.
        max_blocks: Most blocks under lease.
        clock: Time.
        metrics: Where counts go.
    """

    def __init__(
        self, engine: SupportsKvHandoff, *, lease_s: float, max_blocks: int, clock: Clock, metrics: WorkerMetrics
    ) -> None:
        self.lease_s = lease_s
        self._engine = engine
        self._max_blocks = max_blocks
        self._clock = clock
        self._metrics = metrics
        self._leases: dict[str, _Lease] = {}
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def num_blocks(self) -> int:
        """Blocks under lease, each counted as often as it is held."""
        return sum(len(lease.hashes) for lease in self._leases.values())

    async def grant(self, hashes: Sequence[int], lease_id: str = "") -> tuple[str, int]:
        """Hold the longest known prefix of blocks; return the lease, under that name or a new one, and its blocks."""
        wanted = list(hashes)[: self._max_blocks]
        await self._make_room(len(wanted))
        held = await self._engine.hold_blocks(wanted)
        lease_id = lease_id or secrets.token_hex(8)
        self._leases[lease_id] = _Lease(wanted[:held], self._clock.monotonic() + self.lease_s)
        self._empty.clear()
        self._count()
        return lease_id, held

    def use(self, lease_id: str) -> bool:
        """Keep a lease from expiring while its blocks are copied; False if it is unknown."""
        lease = self._leases.get(lease_id)
        if lease is not None:
            lease.in_use = True
        return lease is not None

    async def release(self, lease_id: str) -> None:
        """End a lease; unknown ones are ignored."""
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            return
        if not self._leases:
            self._empty.set()
        self._count()
        try:
            await self._engine.release_blocks(lease.hashes)
        except UnavailableError as error:  # the engine has stopped, and its blocks are gone with it
            log.info("blocks of a lease are gone", reason=error.reason)

    async def sweep(self) -> None:
        """End leases whose time is up, until cancelled."""
        while True:
            await self._clock.sleep(self.lease_s / _SWEEPS_PER_LEASE)
            now = self._clock.monotonic()
            for lease_id in [name for name, lease in self._leases.items() if lease.ends_at_s <= now]:
                if not self._leases[lease_id].in_use:
                    await self._expire(lease_id, "nobody pulled it in time")

    async def wait_empty(self) -> None:
        """Return once there is no lease. Cancellation only ends the wait."""
        await self._empty.wait()

    async def close(self) -> None:
        """End all leases."""
        for lease_id in list(self._leases):
            await self.release(lease_id)

    async def _make_room(self, count: int) -> None:
        while self._leases and self.num_blocks + count > self._max_blocks:
            oldest = next((name for name, lease in self._leases.items() if not lease.in_use), None)
            if oldest is None:
                return
            await self._expire(oldest, "newer ones need its room")

    async def _expire(self, lease_id: str, why: str) -> None:
        self._metrics.kv_leases_expired.inc()
        log.info("KV lease ended unused", lease=lease_id, why=why)
        await self.release(lease_id)

    def _count(self) -> None:
        self._metrics.kv_leases.set(len(self._leases))
