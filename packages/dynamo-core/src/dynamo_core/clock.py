"""Time as a parameter: whatever sleeps or measures takes a ``Clock``, so tests own time."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol, runtime_checkable


@runtime_checkable
class Clock(Protocol):
    """Source of time for a component."""

    def monotonic(self) -> float:
        """Seconds since an arbitrary start; never goes back."""
        ...

    def time(self) -> float:
        """Unix time in seconds; may jump."""
        ...

    async def sleep(self, delay_s: float) -> None:
        """Wait. Cancellation ends the wait at once."""
        ...


class SystemClock:
    """The machine's clock."""

    def monotonic(self) -> float:
        """Return ``time.monotonic()``."""
        return time.monotonic()

    def time(self) -> float:
        """Return ``time.time()``."""
        return time.time()

    async def sleep(self, delay_s: float) -> None:
        """Sleep on the running event loop."""
        await asyncio.sleep(delay_s)
