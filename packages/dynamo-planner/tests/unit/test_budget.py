from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_core.errors import ConfigurationError
from dynamo_core.planning import PoolState
from dynamo_planner._budget import Budget, RoleLimits

PREFILL, DECODE = RoleLimits("prefill", 2, 1, 10), RoleLimits("decode", 4, 1, 10)
BUDGET = Budget((PREFILL, DECODE), 24)


def test_a_fleet_that_fits_is_left_alone() -> None:
    assert BUDGET.clamp({"prefill": 4, "decode": 4}) == {"prefill": 4, "decode": 4}


def test_a_fleet_too_large_shrinks_in_proportion() -> None:
    fleet = BUDGET.clamp({"prefill": 8, "decode": 8})
    assert fleet == {"prefill": 4, "decode": 4}


def test_floors_come_before_proportion() -> None:
    budget = Budget((RoleLimits("prefill", 1, 1, 100), RoleLimits("decode", 4, 2, 100)), 12)
    assert budget.clamp({"prefill": 100, "decode": 2}) == {"prefill": 4, "decode": 2}


def test_the_floor_of_the_sum_is_met_where_the_fleet_is_thinnest() -> None:
    pinned = Budget((PREFILL, DECODE), 24, 24)
    fleet = pinned.clamp({"prefill": 1, "decode": 1})
    assert 24 - 4 < pinned.gpus(fleet) <= 24


def test_growth_waits_for_gpus_that_draining_replicas_hold() -> None:
    pools = {"prefill": PoolState(ready=4, desired=4), "decode": PoolState(ready=2, desired=2, draining=2)}
    assert BUDGET.grant({"prefill": 6, "decode": 2}, pools) == {"prefill": 4, "decode": 2}
    pools["decode"] = PoolState(ready=2, desired=2, draining=1)
    assert BUDGET.grant({"prefill": 6, "decode": 2}, pools) == {"prefill": 6, "decode": 2}


def test_what_one_role_gives_up_is_not_given_to_another_before_it_is_free() -> None:
    pools = {"prefill": PoolState(ready=2, desired=2), "decode": PoolState(ready=5, desired=5)}
    assert BUDGET.grant({"prefill": 10, "decode": 1}, pools) == {"prefill": 2, "decode": 1}


def test_a_fleet_over_the_ceiling_by_another_hand_is_not_grown() -> None:
    pools = {"prefill": PoolState(ready=2, desired=2), "decode": PoolState(ready=9, desired=9)}
    assert BUDGET.grant({"prefill": 3, "decode": 5}, pools) == {"prefill": 2, "decode": 5}


@pytest.mark.parametrize(
    ("roles", "most", "least", "field"),
    [
        ((RoleLimits("a", 4, 3, 3),), 8, 0, "take 12 GPUs, more than max_gpu_budget 8"),
        ((RoleLimits("a"),), 8, 9, "min_gpu_budget 9"),
        ((RoleLimits("a", 0),), 8, 0, "0 GPUs"),
        ((RoleLimits("a", 1, 5, 2),), 8, 0, r"5\.\.2"),
    ],
)
def test_limits_that_contradict_each_other_are_refused(
    roles: tuple[RoleLimits, ...], most: int, least: int, field: str
) -> None:
    with pytest.raises(ConfigurationError, match=field):
        Budget(roles, most, least)


@given(
    st.lists(
        st.tuples(st.integers(1, 8), st.integers(0, 3), st.integers(3, 20), st.integers(0, 40)), min_size=1, max_size=3
    ),
    st.integers(0, 60),
    st.integers(0, 60),
)
def test_clamping_keeps_every_limit(rows: list[tuple[int, int, int, int]], spare: int, floor: int) -> None:
    roles = tuple(RoleLimits(str(place), gpus, least, most) for place, (gpus, least, most, _) in enumerate(rows))
    ceiling = sum(role.gpus * role.min_replicas for role in roles) + spare
    budget = Budget(roles, max(ceiling, 1), min(floor, ceiling))
    fleet = budget.clamp({str(place): wanted for place, (*_, wanted) in enumerate(rows)})
    assert budget.gpus(fleet) <= budget.max_gpus
    for role in roles:
        assert role.min_replicas <= fleet[role.role] <= role.max_replicas
    full = all(fleet[role.role] == role.max_replicas for role in roles)
    assert full or budget.gpus(fleet) > budget.min_gpus - max(role.gpus for role in roles)
