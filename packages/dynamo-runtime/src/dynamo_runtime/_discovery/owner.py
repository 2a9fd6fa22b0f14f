"""Which process owns a lease, and whether that process is certainly gone."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import msgspec

_PROC = Path("/proc")
_START_TIME_FIELD = 19
"""Position of a process's start time in ``/proc/<pid>/stat`` after its name; see proc(5)."""


class Owner(msgspec.Struct, frozen=True, array_like=True):
    """A process, told apart from any other that ever had its number.

    Attributes:
        pid: Process number within ``scope``.
        started: Start time in the kernel's ticks.
        scope: Boot and process namespace in which the number means something; empty if it cannot be told.
    """

    pid: int
    started: str
    scope: str


def this_process() -> Owner:
    """Return this process."""
    return Owner(os.getpid(), _start_time(os.getpid()) or "", _scope())


def certainly_gone(owner: Owner) -> bool:
    """Whether the process has ended. False if it runs, or if it lives where this process cannot see it."""
    if not owner.scope or owner.scope != _scope() or not owner.started:
        return False
    return _start_time(owner.pid) != owner.started


def _start_time(pid: int) -> str | None:
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    # The name before it stands in parentheses and may contain anything.
    fields = text.rpartition(")")[2].split()
    dead = not fields or fields[0] in ("Z", "X")
    return None if dead or len(fields) <= _START_TIME_FIELD else fields[_START_TIME_FIELD]


@functools.cache
def _scope() -> str:
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{(_PROC / 'self/ns/pid').readlink()}"
    except OSError:
        return ""
