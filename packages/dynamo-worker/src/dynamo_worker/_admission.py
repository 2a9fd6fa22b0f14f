"""Admission: how many requests are inside the engine, how many wait, for how long, and who goes next.

The queue sheds by age rather than by position (controlled delay), and after a shed request the newest waiter goes
first: under overload somebody is served in time instead of everybody too late.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from dynamo_core.clock import Clock
from dynamo_core.errors import CapacityExhaustedError, DynamoError, UnavailableError
from dynamo_worker._metrics import WorkerMetrics


@dataclass(eq=False, slots=True)
class _Waiter:
    admitted: asyncio.Future[None]
    since_s: float


class Admission:
    """A bounded number of slots with a bounded queue before them.

    Args:
        limit: Slots.
        queue_limit: Most waiting requests.
        max_age_s: Longest wait; older waiters are refused.
        clock: Time.
        metrics: Where counts go.
    """

    def __init__(self, *, limit: int, queue_limit: int, max_age_s: float, clock: Clock, metrics: WorkerMetrics) -> None:
        self.limit = limit
        self.active = 0
        self._queue_limit = queue_limit
        self._max_age_s = max_age_s
        self._clock = clock
        self._metrics = metrics
        self._waiters: deque[_Waiter] = deque()
        self._shed = False

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiters)

    def try_acquire(self) -> bool:
        """Take a slot if one is free; nobody waits while one is."""
        if self.active >= self.limit:
            return False
        self._occupy()
        return True

    async def acquire(self) -> None:
        """Wait for a slot. Cancelling the wait leaves the queue as if nobody had come.

        Raises:
            CapacityExhaustedError: if the queue is full, or the wait grows too old.
            UnavailableError: if the worker begins to drain.
        """
        if len(self._waiters) >= self._queue_limit:
            self._shed = True
            raise self._refusal("queue_full", f"all {self.limit} slots and {self._queue_limit} queue places are taken")
        waiter = _Waiter(asyncio.get_running_loop().create_future(), self._clock.monotonic())
        self._waiters.append(waiter)
        self._count()
        try:
            await waiter.admitted
        except asyncio.CancelledError:
            self._abandon(waiter)
            raise

    def release(self) -> None:
        """Give a slot back; the next waiter takes it."""
        self.active -= 1
        self.shed_old()
        while self._waiters and self.active < self.limit:
            # One newest waiter after each shedding, then oldest first again.
            waiter = self._waiters.pop() if self._shed else self._waiters.popleft()
            self._shed = False
            if not waiter.admitted.done():
                self._occupy()
                waiter.admitted.set_result(None)
        self._count()

    def shed_old(self) -> None:
        """Refuse waiters whose time is up. Called on every release and by the worker's watchdog."""
        oldest_allowed = self._clock.monotonic() - self._max_age_s
        while self._waiters and self._waiters[0].since_s <= oldest_allowed:
            self._shed = True
            refusal = self._refusal("queue_age", f"it waited longer than {self._max_age_s * 1000:.0f} ms")
            _fail(self._waiters.popleft(), refusal)
        self._count()

    def refuse_waiting(self, message: str) -> None:
        """Refuse everyone in the queue as ``backend.draining``: nothing of theirs has begun."""
        while self._waiters:
            _fail(self._waiters.popleft(), UnavailableError(message, reason="backend.draining"))
        self._count()

    def _occupy(self) -> None:
        self.active += 1
        self._count()

    def _abandon(self, waiter: _Waiter) -> None:
        if waiter.admitted.done() and not waiter.admitted.cancelled() and waiter.admitted.exception() is None:
            self.release()  # the slot came in the same tick as the cancellation
        elif waiter in self._waiters:
            self._waiters.remove(waiter)
            self._count()

    def _refusal(self, reason: str, why: str) -> CapacityExhaustedError:
        self._metrics.rejected.labels(reason=reason).inc()
        return CapacityExhaustedError(
            f"The worker is overloaded: {why}.", reason="capacity.worker_overloaded", retry_after_s=1.0
        )

    def _count(self) -> None:
        self._metrics.engine_requests.set(self.active)
        self._metrics.queued_requests.set(len(self._waiters))


def _fail(waiter: _Waiter, error: DynamoError) -> None:
    if not waiter.admitted.done():
        waiter.admitted.set_exception(error)
