from __future__ import annotations

from dynamo_core.planning import PoolState
from dynamo_planner._watch import ASKED_AT_MOST, Edit, EditWatch, RecentNeeds, StartWatch


def test_the_highest_need_within_the_delay_counts() -> None:
    needs = RecentNeeds(60)
    for at_s, need in ((0, 5), (30, 3), (60, 2)):
        needs.add(at_s, need)
    assert needs.highest(60) == 3
    needs.add(95, 1)
    assert needs.highest(95) == 2
    assert needs.highest(95, cooldown_s=96) is None


def test_a_pause_longer_than_the_delay_starts_the_watch_anew() -> None:
    needs = RecentNeeds(60)
    for at_s in (0, 50, 100):
        needs.add(at_s, 4)
    needs.add(500, 1)
    assert needs.highest(500) is None
    needs.add(560, 1)
    assert needs.highest(560) == 1


def test_a_start_without_progress_is_noticed_and_retried_ever_more_rarely() -> None:
    watch = StartWatch(100)
    pool = PoolState(ready=1, starting=2, desired=3)
    asks = 0
    for at_s in range(0, 10_000, 10):
        if not watch.stuck(at_s, pool):
            watch.tried(at_s)
            asks += at_s >= 100
    assert 1 <= asks <= 8


def test_progress_and_slow_but_measured_start_ups_are_given_time() -> None:
    watch = StartWatch(100)
    assert not watch.stuck(0, PoolState(ready=1, starting=3))
    assert not watch.stuck(90, PoolState(ready=2, starting=2))
    assert not watch.stuck(180, PoolState(ready=2, starting=2))
    assert watch.stuck(191, PoolState(ready=2, starting=2))
    assert not watch.stuck(200, PoolState(ready=4))
    slow = PoolState(ready=1, starting=1, startup_s=200)
    assert not watch.stuck(210, slow)
    assert not watch.stuck(700, slow)
    assert watch.stuck(811, slow)


def test_failed_replicas_are_stuck_at_once() -> None:
    assert StartWatch(100).stuck(0, PoolState(ready=1, failed=1))


def test_an_edit_is_kept_and_then_taken_as_the_starting_point() -> None:
    watch = EditWatch(100, revert=False)
    watch.note(1, 3)
    assert watch.look(0, 3) is Edit.OWN
    assert watch.look(10, 7) is Edit.KEEP
    assert watch.look(109, 7) is Edit.KEEP
    assert watch.look(110, 7) is Edit.OWN
    assert watch.look(120, 7) is Edit.OWN


def test_an_edit_is_reverted_once_in_a_while_and_kept_if_it_comes_back() -> None:
    watch = EditWatch(100, revert=True)
    watch.note(1, 3)
    assert watch.look(0, 7) is Edit.REVERT
    watch.note(7, 3)
    assert watch.look(10, 3) is Edit.OWN
    answers = [watch.look(at_s, 7) for at_s in range(20, 400, 10)]
    assert answers.count(Edit.REVERT) <= 4


def test_a_request_that_seems_lost_is_repeated_a_few_times() -> None:
    watch = EditWatch(1000, revert=False)
    watch.note(1, 3)
    answers = [watch.look(at_s, 1) for at_s in range(0, 100, 10)]
    assert answers == [Edit.OWN] * ASKED_AT_MOST + [Edit.KEEP] * (10 - ASKED_AT_MOST)
