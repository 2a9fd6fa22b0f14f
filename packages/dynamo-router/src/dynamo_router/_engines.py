"""Follows the engines of the instances that are in discovery, as they come and go."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from dynamo_core.errors import DynamoError
from dynamo_core.events import KvEventBatch
from dynamo_router._engine_address import EngineAddress
from dynamo_router._engine_events import SourceState
from dynamo_router._listeners import EngineListeners

_log = structlog.get_logger(__name__)


class _Wish:
    """One wanted engine; another wish for the same worker is another stream of events."""

    __slots__ = ("address",)

    def __init__(self, address: EngineAddress) -> None:
        self.address = address


class Engines:
    """Makes the engines that are followed those that are wanted.

    Args:
        apply: Takes batches of wanted engines in order.
    """

    def __init__(self, apply: Callable[[KvEventBatch], object]) -> None:
        self.problems: dict[int, str] = {}
        self._apply = apply
        self._listeners = EngineListeners()
        self._wanted: dict[int, _Wish] = {}
        self._followed: dict[int, _Wish] = {}
        self._changed = asyncio.Event()

    def want(self, worker_id: int, address: EngineAddress | None) -> None:
        """Follow a worker's engine from now on, at this address; None to follow it no more."""
        present = self._wanted.get(worker_id)
        if (present and present.address) == address:
            return
        self._wanted.pop(worker_id, None)
        self.problems.pop(worker_id, None)
        if address is not None:
            self._wanted[worker_id] = _Wish(address)
        self._changed.set()

    def counts(self) -> dict[SourceState, int]:
        """Return how many engines there are in each state."""
        return self._listeners.counts()

    async def run(self) -> None:
        """Open and close streams until cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self._settle()

    async def close(self) -> None:
        """Follow nothing any more. Idempotent."""
        self._wanted.clear()
        self._followed.clear()
        await self._listeners.close_all()

    async def _settle(self) -> None:
        for worker_id, wish in list(self._followed.items()):
            if self._wanted.get(worker_id) is not wish:
                del self._followed[worker_id]
                await self._listeners.close(worker_id)
        for worker_id, wish in list(self._wanted.items()):
            if worker_id not in self._followed:
                self._followed[worker_id] = wish
                await self._open(worker_id, wish)

    async def _open(self, worker_id: int, wish: _Wish) -> None:
        def apply(batch: KvEventBatch) -> None:
            # What an engine sent before its worker left must not reach one that came back meanwhile.
            if self._wanted.get(worker_id) is wish:
                self._apply(batch)

        try:
            await self._listeners.open(wish.address, apply)
        except DynamoError as error:
            _log.warning("engine_not_followed", worker=f"{worker_id:x}", reason=error.message)
            self.problems[worker_id] = error.message
            await self._listeners.close(worker_id)
