from __future__ import annotations

from dynamo_core.memory import MemoryDiscovery
from dynamo_planner._election import Election


async def test_one_of_several_leads_and_the_next_continues_its_numbers() -> None:
    discovery = MemoryDiscovery()
    one, two = Election(discovery, "dynamo", "one"), Election(discovery, "dynamo", "two")
    assert await one.claim()
    assert not await two.claim()
    assert await one.claim()
    assert await one.fence(41)
    assert await one.fence(42)
    await one.resign()
    await one.resign()
    assert not one.leading
    assert await two.claim()
    assert two.last_decision_id == 42
    assert not await one.claim()


async def test_a_leader_that_was_replaced_is_fenced_off() -> None:
    discovery = MemoryDiscovery()
    suspended, successor = Election(discovery, "dynamo", "one"), Election(discovery, "dynamo", "two")
    assert await suspended.claim()
    assert await suspended.fence(1)
    await discovery.delete("dynamo/planner/leader")
    assert await successor.claim()
    assert await successor.fence(2)
    assert not await suspended.fence(2)
    assert not suspended.leading
    assert await successor.fence(3)


async def test_a_lease_that_ended_ends_the_leadership() -> None:
    discovery = MemoryDiscovery()
    one, two = Election(discovery, "dynamo", "one"), Election(discovery, "dynamo", "two")
    assert await one.claim()
    assert one._lease is not None
    await one._lease.revoke()
    assert not one.leading
    assert await two.claim()
    assert not await one.claim()
