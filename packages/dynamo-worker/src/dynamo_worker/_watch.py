"""Watches the engine: enforces time limits, probes it when it is idle or under suspicion, and declares it dead."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from dynamo_core.clock import Clock
from dynamo_core.errors import UnavailableError
from dynamo_worker._handler import GenerateHandler
from dynamo_worker._probe import Probe
from dynamo_worker._settings import WorkerSettings

_SWEEP_S = 0.25
_SWEEPS_PER_LIMIT = 4


class EngineWatch:
    """Background checks of one engine.

    Args:
        handler: Whose requests to watch.
        probe: How to ask the engine whether it lives.
        settings: Limits.
        clock: Time.
        on_dead: Called once, with the reason.
    """

    def __init__(
        self,
        handler: GenerateHandler,
        probe: Probe,
        *,
        settings: WorkerSettings,
        clock: Clock,
        on_dead: Callable[[str], Awaitable[None]],
    ) -> None:
        self._handler = handler
        self._probe = probe
        self._settings = settings
        self._clock = clock
        self._on_dead = on_dead
        self._inquiry: asyncio.Task[None] | None = None

    def suspect(self, reason: str) -> None:
        """Probe the engine now, unless that is under way; no answer means it is dead."""
        if self._inquiry is None or self._inquiry.done():
            self._inquiry = asyncio.ensure_future(self._inquire(reason))

    async def sweep(self) -> None:
        """Enforce time limits until cancelled."""
        limits = [self._settings.request_queue_timeout_ms / 1000, self._settings.cancel_timeout_s]
        if self._settings.stall_timeout_s:
            limits.append(self._settings.stall_timeout_s)
        interval_s = min(_SWEEP_S, min(limits) / _SWEEPS_PER_LIMIT)
        while True:
            await self._clock.sleep(interval_s)
            self._handler.sweep()

    async def canary(self) -> None:
        """Probe the engine whenever nothing has passed through it for a while, until cancelled."""
        idle_s = self._settings.canary_idle_s
        while idle_s:
            quiet_s = 0.0 if self._handler.active else self._clock.monotonic() - self._handler.last_end_s
            if quiet_s < idle_s:
                await self._clock.sleep(idle_s - quiet_s)
            elif not self._handler.accepting:
                await self._clock.sleep(idle_s)
            else:
                await self._inquire("a canary went unanswered")

    async def close(self) -> None:
        """End a probe that is under way."""
        if self._inquiry is not None:
            self._inquiry.cancel()
            await asyncio.gather(self._inquiry, return_exceptions=True)

    async def _inquire(self, reason: str) -> None:
        failure = await self._probe.failure()
        if failure:
            await self._on_dead(f"{reason}; {failure}")


async def report_death(stopped: asyncio.Event, reason: str) -> None:
    """End the process as failed once its worker has been drained and stopped: whoever started it must know.

    Raises:
        UnavailableError: always, unless it is cancelled before.
    """
    await stopped.wait()
    raise UnavailableError(f"the engine is dead: {reason}", reason="backend.engine_shutdown")
