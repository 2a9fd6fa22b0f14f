from __future__ import annotations

import pytest

from dynamo_runtime._settings import SupervisorSettings
from dynamo_runtime._supervisor.spec import Backoff


def settings(**changes: float) -> SupervisorSettings:
    values = {"restart_initial_s": 1.0, "restart_max_s": 5.0, "restart_limit": 4, "stable_after_s": 30.0}
    return SupervisorSettings.model_validate({**values, **changes})


def test_waits_double_up_to_the_longest_and_then_it_gives_up() -> None:
    backoff = Backoff(settings())
    assert [backoff.next_delay_s(0.0) for _ in range(5)] == [1.0, 2.0, 4.0, 5.0, None]


def test_a_stable_run_forgets_earlier_failures() -> None:
    backoff = Backoff(settings())
    assert [backoff.next_delay_s(0.0) for _ in range(3)] == [1.0, 2.0, 4.0]
    assert backoff.next_delay_s(30.0) == 1.0


def test_a_short_ready_run_forgets_nothing() -> None:
    backoff = Backoff(settings())
    assert [backoff.next_delay_s(29.9) for _ in range(2)] == [1.0, 2.0]


def test_limit_0_never_restarts() -> None:
    assert Backoff(settings(restart_limit=0)).next_delay_s(0.0) is None


def test_the_first_wait_may_not_exceed_the_longest() -> None:
    with pytest.raises(ValueError, match="--restart-initial-s must not exceed"):
        settings(restart_initial_s=9.0)
