"""The request context of a call that never left its process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from dynamo_core.clock import Clock, SystemClock


class LocalRequestContext:
    """What an engine is given when it is called directly.

    The deadline only tells ``remaining_s``; whoever sets one calls ``stop`` when it passes, as a plane would.

    Args:
        request_id: Id of the request.
        headers: Trace context and the like.
        deadline_s: Seconds from now; None for no limit.
        clock: Time.
    """

    def __init__(
        self,
        request_id: str = "",
        *,
        headers: Mapping[str, str] | None = None,
        deadline_s: float | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._request_id = request_id
        self._headers = dict(headers or {})
        self._clock = clock if clock is not None else SystemClock()
        self._deadline_at = None if deadline_s is None else self._clock.monotonic() + deadline_s
        self._stopped = asyncio.Event()
        self._callbacks: list[Callable[[], None]] = []

    @property
    def request_id(self) -> str:
        """Id of the request."""
        return self._request_id

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers of the caller."""
        return self._headers

    @property
    def stopped(self) -> bool:
        """Whether ``stop`` was called."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """Want no more. Idempotent."""
        if self.stopped:
            return
        self._stopped.set()
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def remaining_s(self) -> float | None:
        """Seconds to the deadline; None without one."""
        return None if self._deadline_at is None else max(0.0, self._deadline_at - self._clock.monotonic())

    async def wait_stopped(self) -> None:
        """Return once stopped. Cancellation only ends the wait."""
        await self._stopped.wait()

    def on_stop(self, callback: Callable[[], None]) -> None:
        """Call back once on ``stop``, at once if it already came."""
        if self.stopped:
            callback()
        else:
            self._callbacks.append(callback)
