"""Waiting on a ``Clock``: many timers with a single sleeping task, and a wait with a limit."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import math
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

from dynamo_core.clock import Clock

T = TypeVar("T")

_COMPACT_AT = 64


class Timer:
    """One callback to come; ``cancel`` forgets it."""

    __slots__ = ("_owner", "callback", "when")

    def __init__(self, when: float, callback: Callable[[], None], owner: Timers) -> None:
        self.when = when
        self.callback: Callable[[], None] | None = callback
        self._owner = owner

    def __lt__(self, other: Timer) -> bool:
        return self.when < other.when

    def cancel(self) -> None:
        """Forget the callback. Idempotent."""
        if self.callback is not None:
            self.callback = None
            self._owner.note_cancelled()


class Timers:
    """A heap of timers. Cancelled ones are dropped once they are the majority, so it stays as large as what waits.

    Args:
        clock: Time.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._heap: list[Timer] = []
        self._cancelled = 0
        self._task: asyncio.Task[None] | None = None
        self._wakes_at = 0.0

    def __len__(self) -> int:
        return len(self._heap)

    def after(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        """Call back once, ``delay_s`` from now."""
        timer = Timer(self._clock.monotonic() + delay_s, callback, self)
        heapq.heappush(self._heap, timer)
        if self._task is None or timer.when < self._wakes_at:
            self._restart()
        return timer

    def note_cancelled(self) -> None:
        """Count a cancelled timer and compact the heap if most are."""
        self._cancelled += 1
        if self._cancelled > _COMPACT_AT and self._cancelled * 2 > len(self._heap):
            self._heap = [timer for timer in self._heap if timer.callback is not None]
            heapq.heapify(self._heap)
            self._cancelled = 0

    async def close(self) -> None:
        """Forget all timers."""
        self._heap.clear()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    def _restart(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._wakes_at = self._heap[0].when
        self._task = asyncio.get_running_loop().create_task(self._run(), name="request-plane-timers")

    async def _run(self) -> None:
        while self._heap:
            self._wakes_at = self._heap[0].when
            delay_s = self._wakes_at - self._clock.monotonic()
            if delay_s > 0:
                await self._clock.sleep(delay_s)
            self._fire()
        self._task = None

    def _fire(self) -> None:
        now = self._clock.monotonic()
        # A callback may add a timer; the loop that calls this looks at the heap again anyway.
        self._wakes_at = -math.inf
        while self._heap and self._heap[0].when <= now:
            timer = heapq.heappop(self._heap)
            callback, timer.callback = timer.callback, None
            if callback is None:
                self._cancelled -= 1
            else:
                callback()


async def wait_within(clock: Clock, timeout_s: float, waiting: Coroutine[Any, Any, object]) -> bool:
    """Await something for at most ``timeout_s``; return whether it happened. What did not is cancelled."""
    work = asyncio.ensure_future(waiting)
    limit = asyncio.ensure_future(clock.sleep(timeout_s))
    try:
        await asyncio.wait((work, limit), return_when=asyncio.FIRST_COMPLETED)
        return work.done()
    finally:
        for task in (work, limit):
            task.cancel()
        await asyncio.gather(work, limit, return_exceptions=True)


async def result_within(clock: Clock, timeout_s: float, waiting: Coroutine[Any, Any, T]) -> T:
    """Await a result for at most ``timeout_s``; what does not come is cancelled.

    Raises:
        TimeoutError: if it did not come in time.
    """
    work = asyncio.ensure_future(waiting)
    limit = asyncio.ensure_future(clock.sleep(timeout_s))
    try:
        await asyncio.wait((work, limit), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise TimeoutError(f"no answer within {timeout_s:g} s")
        return work.result()
    finally:
        for task in (work, limit):
            task.cancel()
        await asyncio.gather(work, limit, return_exceptions=True)


async def cancelled_within(clock: Clock, timeout_s: float, tasks: Iterable[asyncio.Future[Any]]) -> bool:
    """Cancel tasks and wait for at most ``timeout_s`` until they have ended; return whether all have.

    Whoever closes must come to an end, whatever the libraries below do with a cancellation: a task that does not end
    is left to the loop.
    """
    pending = [task for task in tasks if not task.done()]
    for task in pending:
        task.cancel()
    return not pending or await wait_within(clock, timeout_s, _all_done(pending))


async def _all_done(tasks: list[asyncio.Future[Any]]) -> None:
    await asyncio.wait(tasks)
