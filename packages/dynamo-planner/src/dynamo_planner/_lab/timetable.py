"""The replicas that a known load is served with at least cost, by dynamic programming.

Time is cut into slots, in each of which the fleet has one size. A plan pays for its replicas, for a start-up each time
one is added, and a price for every request that waits too long; the price is the lowest at which few enough do. Work is
a fluid that whole replicas drain. The work left over at a slot's end is that of the cheapest plan that ends there with
the same fleet, so the plan is the best of those and not of all: near enough for a timetable that is run afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dynamo_planner._trace import Floats

Sizes: TypeAlias = npt.NDArray[np.intp]

PRICES = (1.0, 1e4)
PRICE_STEPS = 7
SPARE = 2


@dataclass(frozen=True)
class Terms:
    """What a plan is made under.

    Attributes:
        slot_s: Seconds of a slot.
        startup_s: Replica-seconds that one more replica costs before it serves.
        slack_s: Seconds that work may wait.
        late_share: Share of the work that may wait longer.
        least: Fewest replicas.
        most: Most replicas.
    """

    slot_s: int
    startup_s: float
    slack_s: float
    late_share: float
    least: int
    most: int


def planned_counts(work_s: Floats, terms: Terms) -> list[int]:
    """Return the replicas of each slot.

    Args:
        work_s: Replica-seconds of work that arrive in each second.
        terms: What the plan is made under.
    """
    slot_s, least = terms.slot_s, terms.least
    seconds = np.concatenate([work_s, np.zeros(-len(work_s) % slot_s)]).reshape(-1, slot_s)
    busiest = int(np.ceil(seconds.max(initial=0.0))) + SPARE
    sizes = np.arange(least, max(least, min(terms.most, busiest)) + 1, dtype=np.intp)
    low, high = PRICES
    counts, _ = _plan(seconds, sizes, terms, high)
    for _ in range(PRICE_STEPS):
        price = float(np.sqrt(low * high))
        found, late_s = _plan(seconds, sizes, terms, price)
        if late_s <= terms.late_share * work_s.sum():
            counts, high = found, price
        else:
            low = price
    return counts


def _plan(seconds: Floats, sizes: Sizes, terms: Terms, price: float) -> tuple[list[int], float]:
    """Return the cheapest sizes of all slots at a price of late work, and the work that is late."""
    running = np.maximum(sizes[None, :] - sizes[:, None], 0) * terms.startup_s + sizes[None, :] * terms.slot_s
    # Whatever the first fleet is, it is there already.
    cost, left_s, late_s = np.zeros(len(sizes)), np.zeros(len(sizes)), np.zeros(len(sizes))
    before: list[Sizes] = []
    everyone = np.arange(len(sizes))
    for arriving in seconds:
        waiting, late = _served(np.repeat(left_s[:, None], len(sizes), axis=1), arriving, sizes, terms.slack_s)
        total = cost[:, None] + running + price * late
        best = total.argmin(axis=0)
        cost, left_s = total[best, everyone], waiting[best, everyone]
        late_s = late_s[best] + late[best, everyone]
        before.append(best)
    end = int(cost.argmin())
    counts: list[int] = []
    place = end
    for best in reversed(before):
        counts.append(int(sizes[place]))
        place = int(best[place])
    return counts[::-1], float(late_s[end])


def _served(waiting_s: Floats, arriving: Floats, sizes: Sizes, slack_s: float) -> tuple[Floats, Floats]:
    """Let every size drain a slot's seconds one by one; return what is left, and what waited too long."""
    late = np.zeros_like(waiting_s)
    limit = sizes[None, :] * slack_s
    for work in arriving.tolist():
        waiting_s = np.maximum(waiting_s + work - sizes[None, :], 0.0)
        if work:
            late += work * (waiting_s > limit)
    return waiting_s, late
