"""Rate limits: a bucket that refills evenly, from which amounts are taken and to which they may be given back."""

from __future__ import annotations

import math

from dynamo_core.clock import Clock

_MINUTE_S = 60.0


class RateBucket:
    """A limit of so much a minute.

    It holds at most a minute's amount. What was reserved is settled once the true amount is known; if that was more,
    the bucket may fall below zero, and whoever comes next waits for it.

    Args:
        per_minute: Amount of a minute.
        clock: Time.
    """

    def __init__(self, per_minute: float, clock: Clock) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = per_minute
        self._at_s = clock.monotonic()

    def take(self, amount: float) -> float:
        """Take an amount; return 0.0, or, taking nothing, the seconds until there is enough.

        More than the bucket can ever hold is taken from a full one.
        """
        self._refill()
        wanted = min(amount, self.per_minute)
        if self._level >= wanted:
            self._level -= amount
            return 0.0
        return (wanted - self._level) / self.per_minute * _MINUTE_S

    def settle(self, reserved: float, used: float) -> None:
        """Replace a reserved amount by the true one."""
        self._refill()
        self._level = min(self.per_minute, self._level + reserved - used)

    @property
    def remaining(self) -> int:
        """Amount at hand."""
        self._refill()
        return max(0, math.floor(self._level))

    @property
    def full_in_s(self) -> float:
        """Seconds until it is full again."""
        self._refill()
        return (self.per_minute - self._level) / self.per_minute * _MINUTE_S

    def _refill(self) -> None:
        now = self._clock.monotonic()
        self._level = min(self.per_minute, self._level + (now - self._at_s) * self.per_minute / _MINUTE_S)
        self._at_s = now
