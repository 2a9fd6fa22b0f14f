"""Measuring: CPU seconds of processes, and repeated timings."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

_USER_FIELD = 11
_SYSTEM_FIELD = 12


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system CPU seconds that processes have used, their threads included.

    Raises:
        ProcessLookupError: if one is gone: its time can no longer be read.
    """
    return sum(_ticks(pid) for pid in pids) / os.sysconf("SC_CLK_TCK")


def repeat(run: Callable[[], float], runs: int) -> list[float]:
    """Collect one figure of several runs, after one run that only warms up."""
    run()
    return [run() for _ in range(runs)]


def cpu_us_per_call(call: Callable[[], object], calls: int) -> float:
    """CPU microseconds of this process per call, over many calls in a row."""
    started = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - started) / calls * 1e6


def _ticks(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ProcessLookupError(f"process {pid} is gone; read its CPU time before it ends") from error
    # The command's name may hold spaces and brackets; fields are counted after its closing bracket.
    fields = text.rpartition(")")[2].split()
    return int(fields[_USER_FIELD]) + int(fields[_SYSTEM_FIELD])
