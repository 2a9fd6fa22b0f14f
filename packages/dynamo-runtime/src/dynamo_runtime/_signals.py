"""Signals and the wish to stop: the first asks for a drain, the second for an end at once."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager

from dynamo_core.clock import Clock
from dynamo_core.errors import ConfigurationError

_PR_SET_PDEATHSIG = 1
ECHO_S = 0.5
"""A second signal within this time is the first one again: a terminal and a launcher both pass on one Ctrl-C."""

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """What the rest of the host waits on.

    Args:
        clock: Time, to tell a second signal from an echo of the first.

    Attributes:
        drain: Set by the first request; running work may finish.
        abort: Set by the second signal; nothing is waited for.
        reason: Why, in words.
    """

    def __init__(self, clock: Clock) -> None:
        self.drain = asyncio.Event()
        self.abort = asyncio.Event()
        self.reason = ""
        self._clock = clock
        self._signalled_at_s: float | None = None

    def request(self, reason: str) -> None:
        """Ask for a drain; repeated requests change nothing."""
        if not self.drain.is_set():
            self.reason = reason
            self.drain.set()

    def on_signal(self, number: signal.Signals) -> None:
        """Take one signal: drain first, then abort."""
        now_s = self._clock.monotonic()
        if self._signalled_at_s is None:
            self._signalled_at_s = now_s
        elif now_s - self._signalled_at_s >= ECHO_S:
            self.abort.set()
        self.request(f"signal {number.name}")


@contextmanager
def stop_signals(stop: StopRequest) -> Generator[None]:
    """Send SIGTERM and SIGINT to ``stop`` while the context is open; a no-op outside the main thread."""
    loop = asyncio.get_running_loop()
    installed: list[signal.Signals] = []
    for number in _STOP_SIGNALS:
        try:
            loop.add_signal_handler(number, stop.on_signal, number)
        except (ValueError, RuntimeError):  # asyncio refuses outside the main thread, where no signal arrives
            break
        installed.append(number)
    try:
        yield
    finally:
        for number in installed:
            loop.remove_signal_handler(number)


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies, even if the parent is killed with SIGKILL.

    Linux only; elsewhere a supervised process outlives a killed supervisor until its lease or its work ends.

    Raises:
        ConfigurationError: if ``parent_pid`` is not the parent (any more).
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Checked after the call above: a parent that died before it would go unnoticed.
    if os.getppid() != parent_pid:
        raise ConfigurationError(
            f"option --parent-pid has the value {parent_pid}, but the parent is {os.getppid()}; "
            "leave it out unless a supervisor starts this process"
        )
