"""A time limit on the worker's clock; ``asyncio.timeout`` would use the machine's."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from dynamo_core.clock import Clock

T = TypeVar("T")


async def within(clock: Clock, limit_s: float, coroutine: Coroutine[Any, Any, T]) -> T:
    """Return the coroutine's result. Cancelling the wait cancels the coroutine.

    Raises:
        TimeoutError: after ``limit_s`` seconds; the coroutine has then been cancelled.
    """
    work = asyncio.ensure_future(coroutine)
    timer = asyncio.ensure_future(clock.sleep(limit_s))
    try:
        await asyncio.wait({work, timer}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise TimeoutError(f"nothing happened within {limit_s} s")
        return work.result()
    finally:
        timer.cancel()
        if not work.done():
            work.cancel()
        await asyncio.gather(timer, work, return_exceptions=True)
