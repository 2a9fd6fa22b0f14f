"""Keeps a forked child from using the locks and files of its parent's tiers.

A lock of ``flock`` belongs to the open file, which a fork shares: parent and child would hold it together, write the
same slots, and each take the other for itself. And a lock that a child keeps open outlives its parent, which then seems
alive. So a child gives such files up as it starts, and whoever uses the tier there is told.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from weakref import WeakSet

from dynamo_core.errors import ConflictError


class ForkGuard:
    """Ends the use of one tier in children of the process that made it.

    Args:
        what: The tier, for the error.
        locks: Descriptors of its locks, which a child closes. The parent's locks stay: it has them open too.
    """

    def __init__(self, what: str, locks: Sequence[int]) -> None:
        self._what = what
        self._locks = tuple(locks)
        self.is_foreign = False
        _guards.add(self)

    def require_owner(self) -> None:
        """Check that this process made the tier.

        Raises:
            ConflictError: if it was forked from the one that did.
        """
        if self.is_foreign:
            raise ConflictError(
                f"{self._what} was made before process {os.getpid()} was forked and belongs to its parent; "
                "make it after the fork, or start processes with the method 'spawn'"
            )

    def give_up(self) -> None:
        """Close the locks in a child that has just been forked."""
        self.is_foreign = True
        for descriptor in self._locks:
            os.close(descriptor)

    def end(self) -> None:
        """Stop watching: the owner has closed the tier, and its descriptors may be other files soon."""
        self._locks = ()


class OwnersLock:
    """A reentrant lock of threads that a forked child cannot take: its holder may not exist there.

    Args:
        guard: Says in whose process it is.
    """

    def __init__(self, guard: ForkGuard) -> None:
        self._guard = guard
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._guard.require_owner()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _give_up_all() -> None:
    for guard in list(_guards):
        guard.give_up()


# The interpreter keeps what is registered for as long as it runs, so one function is, for tiers that come and go.
_guards: WeakSet[ForkGuard] = WeakSet()
os.register_at_fork(after_in_child=_give_up_all)
