"""A clock that moves only when told, so that a test owns every timeout."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

DEFAULT_EPOCH_S = 1_700_000_000.0
SETTLE_TICKS = 50


class FakeClock:
    """Time under the test's control.

    Sleepers wake in order of their due time, and of their call where that is equal. After each one the event loop
    runs for ``settle_ticks`` turns, so that what it does (also its next sleep) happens at its own time.

    Args:
        epoch_s: Unix time at the start.
        settle_ticks: Turns of the event loop after each wake-up.
    """

    def __init__(self, *, epoch_s: float = DEFAULT_EPOCH_S, settle_ticks: int = SETTLE_TICKS) -> None:
        self._now = 0.0
        self._epoch_s = epoch_s
        self._settle_ticks = settle_ticks
        self._numbers = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def monotonic(self) -> float:
        """Seconds advanced so far."""
        return self._now

    def time(self) -> float:
        """Unix time: the epoch and the seconds advanced so far."""
        return self._epoch_s + self._now

    async def sleep(self, delay_s: float) -> None:
        """Wait until the clock is advanced that far; 0 or less gives up one turn. Cancellation ends the wait."""
        if delay_s <= 0:
            await asyncio.sleep(0)
            return
        future = asyncio.get_running_loop().create_future()
        entry = (self._now + delay_s, next(self._numbers), future)
        heapq.heappush(self._sleepers, entry)
        try:
            await future
        except asyncio.CancelledError:
            if entry in self._sleepers:
                self._sleepers.remove(entry)
                heapq.heapify(self._sleepers)
            raise

    @property
    def sleepers(self) -> int:
        """How many tasks sleep."""
        return len(self._sleepers)

    @property
    def next_due_s(self) -> float | None:
        """Seconds from now to the first wake-up; None if nobody sleeps."""
        return self._sleepers[0][0] - self._now if self._sleepers else None

    async def settle(self) -> None:
        """Let the event loop run without advancing time."""
        for _ in range(self._settle_ticks):
            await asyncio.sleep(0)

    async def advance(self, seconds: float) -> None:
        """Move time on, waking sleepers on the way, each at its own time.

        Raises:
            ValueError: if ``seconds`` is negative.
        """
        if seconds < 0:
            raise ValueError(f"a clock cannot go back by {-seconds} s")
        target = self._now + seconds
        await self.settle()
        while self._sleepers and self._sleepers[0][0] <= target:
            due, _, future = heapq.heappop(self._sleepers)
            self._now = max(self._now, due)
            if not future.done():
                future.set_result(None)
            await self.settle()
        self._now = target

    async def wait_for_sleepers(self, count: int, *, limit_ticks: int = 10_000) -> None:
        """Let the event loop run until at least ``count`` tasks sleep.

        Raises:
            TimeoutError: if that has not happened after ``limit_ticks`` turns.
        """
        for _ in range(limit_ticks):
            if len(self._sleepers) >= count:
                return
            await asyncio.sleep(0)
        raise TimeoutError(f"{len(self._sleepers)} tasks sleep, not {count}")

    async def run(self, work: Coroutine[Any, Any, T] | Awaitable[T], *, limit_s: float = 3600.0) -> T:
        """Finish ``work``, jumping from wake-up to wake-up.

        Raises:
            TimeoutError: if it is not done after ``limit_s`` fake seconds, or waits for something that never comes.
        """
        task = asyncio.ensure_future(work)
        end = self._now + limit_s
        try:
            await self.settle()
            while not task.done():
                if self.next_due_s is None or self._now + self.next_due_s > end:
                    raise TimeoutError(f"not done at {self._now:g} fake seconds, with {self.sleepers} sleepers")
                await self.advance(self.next_due_s)
            return await task
        finally:
            task.cancel()
