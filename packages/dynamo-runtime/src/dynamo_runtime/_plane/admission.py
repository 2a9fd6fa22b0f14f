"""Admission: how many calls a process serves at once, how many wait for a place, and for how long."""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from typing import Protocol

from dynamo_core.errors import CancelledRequestError, CapacityExhaustedError
from dynamo_runtime._plane._metrics import PlaneMetrics
from dynamo_runtime._plane.stream import ServerCall
from dynamo_runtime._plane.timers import Timers

OVERLOADED = "capacity.worker_overloaded"


class AdmissionLimits(Protocol):
    """Limits among a plane's options."""

    @property
    def max_calls(self) -> int:
        """Calls served at once."""
        ...

    @property
    def max_queued_calls(self) -> int:
        """Calls that may wait for a place."""
        ...

    @property
    def max_queue_age_s(self) -> float:
        """Longest such wait."""
        ...


class Admission:
    """Places for running calls, with a bounded queue before them. First come, first served.

    A call that waits too long is refused as one for which there is no room: its caller may go elsewhere, since the
    handler has not seen it.

    Args:
        limits: How many and how long.
        timers: Timers of the waits.
        metrics: Counts.
    """

    def __init__(self, limits: AdmissionLimits, timers: Timers, metrics: PlaneMetrics) -> None:
        self._limits = limits
        self._timers = timers
        self._metrics = metrics
        self._running: set[ServerCall] = set()
        self._waiting: deque[tuple[ServerCall, asyncio.Future[None]]] = deque()

    @property
    def waiting(self) -> int:
        """Calls that wait for a place."""
        return sum(not turn.done() for _, turn in self._waiting)

    def check(self) -> None:
        """See whether there is room for one more call, running or waiting.

        Raises:
            CapacityExhaustedError: if there is none.
        """
        limits = self._limits
        if len(self._running) < limits.max_calls or self.waiting < limits.max_queued_calls:
            return
        self._metrics.fault("overloaded")
        raise CapacityExhaustedError(
            f"{limits.max_calls} calls run here already and {limits.max_queued_calls} wait; try another worker",
            reason=OVERLOADED,
        )

    def enter(self, call: ServerCall) -> bool:
        """Take a place if one is free and nobody waits for it."""
        if len(self._running) >= self._limits.max_calls or self._waiting:
            return False
        self._running.add(call)
        return True

    async def turn(self, call: ServerCall) -> None:
        """Wait for a place. Cancelling leaves the queue.

        Raises:
            CapacityExhaustedError: if none came free in time.
            CancelledRequestError: if the caller left meanwhile.
        """
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((call, turn))
        timer = self._timers.after(self._limits.max_queue_age_s, functools.partial(self._refuse, turn))
        call.on_stop(functools.partial(_give_up, turn))
        try:
            await turn
        finally:
            timer.cancel()
            if not turn.done():
                turn.cancel()
            self._advance()

    def leave(self, call: ServerCall) -> None:
        """Free the place of a call, if it has one."""
        if call in self._running:
            self._running.discard(call)
            self._advance()

    def _advance(self) -> None:
        while self._waiting and (self._waiting[0][1].done() or len(self._running) < self._limits.max_calls):
            call, turn = self._waiting.popleft()
            if not turn.done():
                self._running.add(call)
                turn.set_result(None)

    def _refuse(self, turn: asyncio.Future[None]) -> None:
        if not turn.done():
            self._metrics.fault("overloaded")
            waited = f"waited {self._limits.max_queue_age_s:g} s for a place; try another worker"
            turn.set_exception(CapacityExhaustedError(waited, reason=OVERLOADED))


def _give_up(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_exception(CancelledRequestError("The caller left while the call waited for a place."))
