"""A worker's records in discovery: they come last when it starts and go first when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog

from dynamo_core.discovery import Discovery, Instance, Lease, ModelRecord
from dynamo_core.errors import UnavailableError
from dynamo_core.wire import INSTANCE, MODEL_RECORD

log = structlog.get_logger(__name__)


class Registration:
    """Instances and model record of one worker under one lease.

    Args:
        discovery: Where to register.
        instances: Endpoints served, in the order in which they become visible.
        model: The model record; visible last, so that who sees the model finds the instance.
        lease_ttl_s: Seconds a dead worker stays visible at most.
    """

    def __init__(
        self, discovery: Discovery, *, instances: Sequence[Instance], model: ModelRecord, lease_ttl_s: float
    ) -> None:
        self._discovery = discovery
        self._records = {instance.key: INSTANCE.encode(instance) for instance in instances}
        self._records[model.key] = MODEL_RECORD.encode(model)
        self._lease_ttl_s = lease_ttl_s
        self._lease: Lease | None = None
        self._order = asyncio.Lock()
        self.registered = False

    @property
    def lease_valid(self) -> bool:
        """Whether the backend still honours the lease."""
        return self._lease is not None and self._lease.valid

    async def join(self) -> None:
        """Register everything. Harmless when registered."""
        async with self._order:
            if self.registered:
                return
            if self._lease is None or not self._lease.valid:
                self._lease = await self._discovery.lease(self._lease_ttl_s)
            for key, value in self._records.items():
                await self._discovery.put(key, value, lease=self._lease)
            self.registered = True

    async def leave(self) -> None:
        """Remove all records, the model first. Harmless when not registered."""
        async with self._order:
            if not self.registered:
                return
            self.registered = False
            try:
                for key in reversed(self._records):
                    await self._discovery.delete(key)
            except UnavailableError as error:
                # The records outlive us by at most the lease; whoever still comes is refused as draining.
                log.warning("discovery unreachable while leaving", reason=error.reason)

    async def publish(self, model: ModelRecord) -> None:
        """Add one more model, now if the worker is registered, and whenever it registers again."""
        async with self._order:
            self._records[model.key] = value = MODEL_RECORD.encode(model)
            if self.registered:
                await self._discovery.put(model.key, value, lease=self._lease)

    async def withdraw(self, key: str) -> None:
        """Remove a record that ``publish`` added; unknown keys are ignored."""
        async with self._order:
            if self._records.pop(key, None) is not None and self.registered:
                await self._discovery.delete(key)

    async def close(self) -> None:
        """Leave and end the lease. Idempotent."""
        await self.leave()
        if self._lease is not None:
            lease, self._lease = self._lease, None
            try:
                await lease.revoke()
            except UnavailableError as error:
                log.warning("lease left to expire", reason=error.reason)
