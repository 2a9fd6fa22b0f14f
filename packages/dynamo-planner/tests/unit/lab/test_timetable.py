"""Timetables by dynamic programming: whole replicas, start-ups that cost, and work that may be late."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dynamo_planner._lab.timetable import Terms, planned_counts

TERMS = Terms(slot_s=10, startup_s=60.0, slack_s=1.0, late_share=0.0, least=1, most=8)


def load(*levels: tuple[int, float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.concatenate([np.full(seconds, level) for seconds, level in levels])


def test_a_steady_load_gets_the_fewest_replicas_that_keep_up() -> None:
    assert set(planned_counts(load((200, 2.5)), TERMS)) == {3}
    assert set(planned_counts(load((200, 0.0)), TERMS)) == {1}


def test_a_lull_shorter_than_a_start_up_keeps_its_replica_and_a_longer_one_lets_it_go() -> None:
    short = planned_counts(load((100, 3.0), (50, 0.5), (100, 3.0)), TERMS)
    assert set(short) == {3}
    longer = planned_counts(load((100, 3.0), (200, 0.5), (100, 3.0)), TERMS)
    assert set(longer) == {3, 1}
    assert sum(one != two for one, two in itertools.pairwise(longer)) == 2


def test_work_that_may_be_late_saves_the_replicas_of_a_spike() -> None:
    spiky = load((300, 1.5), (2, 6.0), (300, 1.5))
    strict = planned_counts(spiky, TERMS)
    lenient = planned_counts(spiky, Terms(10, 60.0, 1.0, late_share=0.05, least=1, most=8))
    assert max(strict) > 2
    assert max(lenient) == 2
    assert sum(lenient) < sum(strict)


def test_the_plan_of_a_short_load_is_the_cheapest_of_all() -> None:
    work = load((10, 0.5), (10, 2.0), (10, 0.5), (10, 3.0))
    terms = Terms(slot_s=10, startup_s=15.0, slack_s=1.0, late_share=0.0, least=1, most=4)

    def cost(counts: tuple[int, ...]) -> float:
        waiting = 0.0
        for second, arriving in enumerate(work):
            size = counts[second // 10]
            waiting = max(0.0, waiting + float(arriving) - size)
            if waiting > size * terms.slack_s:
                return float("inf")
        started = sum(max(0, two - one) for one, two in itertools.pairwise(counts))
        return 10 * sum(counts) + terms.startup_s * started

    best = min(itertools.product(range(1, 5), repeat=4), key=cost)
    assert cost(tuple(planned_counts(work, terms))) == pytest.approx(cost(best))


def test_limits_hold_even_if_work_is_late() -> None:
    assert set(planned_counts(load((100, 9.0)), Terms(10, 60.0, 1.0, 0.0, least=2, most=3))) <= {2, 3}
