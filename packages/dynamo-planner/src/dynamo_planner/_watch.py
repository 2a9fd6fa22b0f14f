"""What a planner remembers of one role: recent needs, replicas that do not get ready, and edits by someone else."""

from __future__ import annotations

import enum
import math
from collections import deque

from dynamo_core.planning import PoolState

MAX_BACKOFF_S = 3600.0
MAX_DOUBLINGS = 20
STARTUPS_UNTIL_STUCK = 3
ASKED_AT_MOST = 2
HOLD_DOUBLINGS = 6


class RecentNeeds:
    """The highest need within a delay, so that a short lull lets no replica go.

    Args:
        delay_s: How long fewer replicas must suffice.
    """

    def __init__(self, delay_s: float) -> None:
        self.delay_s = delay_s
        self._needs: deque[tuple[float, int]] = deque()
        self._since_s: float | None = None
        self._last_s = -math.inf

    def add(self, at_s: float, need: int) -> None:
        """Remember a need. After a pause longer than the delay the watch starts anew."""
        if self._since_s is None or at_s - self._last_s > self.delay_s:
            self._since_s = at_s
        self._last_s = at_s
        # Only needs that exceed all later ones can ever be the maximum, so the list stays short.
        while self._needs and self._needs[-1][1] <= need:
            self._needs.pop()
        self._needs.append((at_s, need))

    def highest(self, at_s: float, cooldown_s: float = 0.0) -> int | None:
        """Return the most that was needed within the longer of delay and cool-down; None before that has passed."""
        delay_s = max(self.delay_s, cooldown_s)
        if self._since_s is None or at_s - self._since_s < delay_s:
            return None
        while len(self._needs) > 1 and self._needs[0][0] <= at_s - delay_s:
            self._needs.popleft()
        return self._needs[0][1]

    def reset(self) -> None:
        """Forget everything, for example because the clock jumped."""
        self._needs.clear()
        self._since_s = None


class StartWatch:
    """Notices replicas that never become ready, and asks for more only now and then.

    Args:
        timeout_s: Seconds without progress after which a start counts as failed, if start-ups are not measured or
            fast.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = self._limit_s = timeout_s
        self._ready = -1
        self._since_s: float | None = None
        self._retry_at_s: float | None = None
        self._failures = 0

    def stuck(self, at_s: float, pool: PoolState) -> bool:
        """Take the newest state; return whether more replicas must not be asked for."""
        if not (pool.starting or pool.failed):
            self.reset()
            return False
        if pool.ready > self._ready:
            self.reset()
        self._ready = pool.ready
        if self._since_s is None:
            self._since_s = at_s
        self._limit_s = max(self._timeout_s, STARTUPS_UNTIL_STUCK * (pool.startup_s or 0.0))
        if self._retry_at_s is None and (pool.failed or at_s - self._since_s >= self._limit_s):
            self._back_off(at_s)
        return self._retry_at_s is not None and at_s < self._retry_at_s

    def tried(self, at_s: float) -> None:
        """Note that more was asked for after all; without progress the next time comes twice as late."""
        if self._retry_at_s is not None:
            self._back_off(at_s)

    def reset(self) -> None:
        """Forget everything."""
        self._ready, self._since_s, self._retry_at_s, self._failures = -1, None, None, 0

    def _back_off(self, at_s: float) -> None:
        self._retry_at_s = at_s + min(MAX_BACKOFF_S, self._limit_s * 2**self._failures)
        self._failures = min(self._failures + 1, MAX_DOUBLINGS)


class Edit(enum.Enum):
    """Whose wish the desired replicas are, and what to do about it."""

    OWN = enum.auto()
    KEEP = enum.auto()
    REVERT = enum.auto()


class EditWatch:
    """Tells another hand's edits from one's own, and never fights over them.

    An edit is kept for a while and then taken as the new starting point; or, by policy, reverted, at most once in that
    while. The same edit made again is kept twice as long. A request that seems lost (all is as before it) is repeated
    a few times before it counts as an edit.

    Args:
        hold_s: The while.
        revert: Revert instead of keep.
    """

    def __init__(self, hold_s: float, *, revert: bool) -> None:
        self._hold_s = hold_s
        self._revert = revert
        self._before: int | None = None
        self._lost = 0
        self._edit: int | None = None
        self._last_edit: int | None = None
        self._again = 0
        self._until_s = -math.inf
        self._no_revert_before_s = -math.inf
        self.asked: int | None = None

    def look(self, at_s: float, desired: int) -> Edit:
        """Take what is desired now."""
        if self.asked is None or desired == self.asked:
            self._lost, self._edit = 0, None
            return Edit.OWN
        if self._edit is None and desired == self._before and self._lost < ASKED_AT_MOST:
            self._lost += 1
            return Edit.OWN
        if desired != self._edit:
            self._again = min(self._again + 1, HOLD_DOUBLINGS) if desired == self._last_edit else 0
            self._edit = self._last_edit = desired
            self._until_s = at_s + self._hold_s * 2**self._again
        if self._revert and at_s >= self._no_revert_before_s:
            self._no_revert_before_s = at_s + self._hold_s * 2**self._again
            self._again = min(self._again + 1, HOLD_DOUBLINGS)
            return Edit.REVERT
        if at_s >= self._until_s:
            self.reset()
            return Edit.OWN
        return Edit.KEEP

    def note(self, before: int, wanted: int) -> None:
        """Note what is asked for, and what was desired before."""
        self._before, self.asked = before, wanted

    def reset(self) -> None:
        """Take what is desired as one's own."""
        self._before = self.asked = self._edit = None
        self._lost = 0
