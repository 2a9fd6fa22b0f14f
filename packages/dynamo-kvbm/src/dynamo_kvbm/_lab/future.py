"""What a trace knows of its own future: the oracle's next uses, and the hints that sessions could give."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dynamo_kvbm._lab.trace import TraceRequest

NEVER = math.inf


def next_uses(trace: Sequence[TraceRequest]) -> list[list[float]]:
    """Return, for each request and each block of it, the index of the next request that uses the block."""
    latest: dict[int, int] = {}
    found: list[list[float]] = []
    for index in range(len(trace) - 1, -1, -1):
        found.append([latest.get(block, NEVER) for block in trace[index].path])
        latest.update(dict.fromkeys(trace[index].path, index))
    return found[::-1]


def next_turns(trace: Sequence[TraceRequest]) -> list[float | None]:
    """Return, for each request, when the next turn of its session arrives; None if the session ends with it.

    The next turn repeats the prompt and adds to it. The prompt's last block may be partly filled and then changes, so a
    later request that shares all blocks but the last is a next turn too. The first block alone, which a system prompt
    fills, makes no session.
    """
    latest: dict[int, float] = {}
    found: list[float | None] = []
    for request in reversed(trace):
        tails = [block for position, block in enumerate(request.path) if position and position >= len(request.path) - 2]
        times = [latest[block] for block in tails if block in latest]
        found.append(min(times) if times else None)
        latest.update(dict.fromkeys(request.path, request.arrival_s))
    return found[::-1]
