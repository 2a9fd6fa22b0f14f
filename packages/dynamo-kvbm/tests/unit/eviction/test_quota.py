"""Orders of several tenants as one: leaves only, over all tenants, and nobody beyond a quota for long."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_core.errors import ConfigurationError
from dynamo_kvbm._eviction.base import EvictionOrder, SupportsHints, SupportsPriority
from dynamo_kvbm._eviction.hinted import HintedOrder
from dynamo_kvbm._eviction.lru import LruOrder
from dynamo_kvbm._eviction.priority import PriorityOrder
from dynamo_kvbm._eviction.quota import QuotaOrder

CAPACITY = 8
PARENTS = {1: None, 2: 1, 3: 2, 4: 2, 5: None, 6: 5, 7: 6, 8: 1}
TENANTS = ["a", "b", ""]
ORDERS = {"lru": LruOrder, "hinted": HintedOrder, "priority": PriorityOrder}
STEPS = st.tuples(
    st.sampled_from(["insert", "touch", "evict", "discard", "pin", "unpin", "end", "weigh"]),
    st.sampled_from(sorted(PARENTS)),
    st.sampled_from(TENANTS),
)


def path(block: int) -> list[int]:
    parent = PARENTS[block]
    return [*path(parent), block] if parent is not None else [block]


class Shares:
    """A quota order beside what it holds, one method a step."""

    def __init__(self, name: str) -> None:
        self.next_tenant = ""
        self.order = QuotaOrder(CAPACITY, {"a": 2}, ORDERS[name], lambda item: self.next_tenant)
        self.owners: dict[int, str] = {}
        self.pins: dict[int, int] = {}

    def held(self, block: int) -> list[int]:
        return [item for item in path(block) if item in self.owners]

    def leaves(self) -> set[int]:
        parents = {PARENTS[item] for item in self.owners}
        return {item for item in self.owners if item not in parents and not self.pins.get(item)}

    def forget(self, block: int) -> None:
        del self.owners[block]
        self.pins.pop(block, None)

    def insert(self, block: int, tenant: str) -> None:
        if block in self.owners:
            return
        self.next_tenant = tenant
        if self.order.is_full(tenant, 1):
            own = {item for item in self.leaves() if self.owners[item] == tenant}
            victim = self.order.evict_from(tenant)
            assert (victim in own) if own else (victim is None)
            if victim is None:
                return
            self.forget(victim)
        self.order.insert([(block, PARENTS[block])])
        self.owners[block] = tenant

    def touch(self, block: int, tenant: str) -> None:
        self.order.touch(self.held(block))

    def evict(self, block: int, tenant: str) -> None:
        leaves, victim = self.leaves(), self.order.evict()
        assert (victim in leaves) if leaves else (victim is None)
        if victim is not None:
            self.forget(victim)

    def discard(self, block: int, tenant: str) -> None:
        assert self.order.discard(block) == (block in self.owners and not self.pins.get(block))
        if block in self.owners and not self.pins.get(block):
            self.forget(block)

    def pin(self, block: int, tenant: str) -> None:
        if block in self.owners:
            self.order.pin([block])
            self.pins[block] = self.pins.get(block, 0) + 1

    def unpin(self, block: int, tenant: str) -> None:
        if self.pins.get(block):
            self.order.unpin([block])
            self.pins[block] -= 1

    def end(self, block: int, tenant: str) -> None:
        self.order.expect(self.held(block), None)

    def weigh(self, block: int, tenant: str) -> None:
        self.order.prioritise([(item, block) for item in self.held(block)])

    def check(self) -> None:
        self.order.check_integrity()
        assert len(self.order) == len(self.owners)
        assert all(item in self.order for item in self.owners)
        for tenant in TENANTS:
            assert self.order.used_by(tenant) == list(self.owners.values()).count(tenant)
        assert self.order.used_by("a") <= 2


@pytest.mark.parametrize("name", ORDERS)
@given(steps=st.lists(STEPS, max_size=60))
def test_victims_are_leaves_over_all_tenants_and_quotas_hold(name: str, steps: list[tuple[str, int, str]]) -> None:
    shares = Shares(name)
    for step, block, tenant in steps:
        getattr(shares, step)(block, tenant)
        shares.check()


def test_it_is_an_order_that_takes_hints_and_priorities() -> None:
    order = QuotaOrder(4, {}, LruOrder, lambda item: "")
    assert isinstance(order, EvictionOrder)
    assert isinstance(order, SupportsHints)
    assert isinstance(order, SupportsPriority)
    assert order.evict() is None


@pytest.mark.parametrize("quota", [0, -1, 5])
def test_a_quota_that_is_none_or_too_large_is_refused(quota: int) -> None:
    with pytest.raises(ConfigurationError, match=f"quota {quota} of tenant 'a' must be 1 to 4 blocks"):
        QuotaOrder(4, {"a": quota}, LruOrder, lambda item: "")
