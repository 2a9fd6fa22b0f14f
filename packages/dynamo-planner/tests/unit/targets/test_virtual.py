from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, cast

import pytest

from dynamo_core import plugins
from dynamo_core.errors import ConfigurationError, UnavailableError
from dynamo_core.memory import MemoryDiscovery
from dynamo_core.planning import ScalingTarget
from dynamo_core.testing import ScalingTargetConformance
from dynamo_planner._targets.virtual import VirtualClient, VirtualDecision, VirtualTarget


class TestVirtual(ScalingTargetConformance):
    async def make_target(self, replicas: Mapping[str, int]) -> ScalingTarget:
        target = VirtualTarget(MemoryDiscovery(), "dynamo", replicas)
        await target.start()
        return target


async def test_a_client_waits_acts_and_completes() -> None:
    discovery = MemoryDiscovery()
    target, client = VirtualTarget(discovery, "dynamo", {"prefill": 1, "decode": 1}), VirtualClient(discovery, "dynamo")
    await target.start()
    assert await client.get() == VirtualDecision(-1, {"prefill": 1, "decode": 1})
    waiting = asyncio.create_task(client.wait())
    await target.scale({"decode": 4}, decision_id=7)
    async with asyncio.timeout(5):
        decision = await waiting
    assert decision == VirtualDecision(7, {"prefill": 1, "decode": 4})
    pool = (await target.state())["decode"]
    assert (pool.ready, pool.starting, pool.desired) == (0, 4, 4)
    await client.complete(decision)
    pool = (await target.state())["decode"]
    assert (pool.ready, pool.starting, pool.desired) == (4, 0, 4)


async def test_the_keys_are_those_that_clients_know() -> None:
    discovery = MemoryDiscovery()
    target = VirtualTarget(discovery, "dynamo", {"prefill": 2, "decode": 3})
    await target.start()
    await target.scale({"prefill": 5}, decision_id=1)
    found = {record.key: record.value for record in await discovery.list("dynamo/planner/")}
    assert found == {
        "dynamo/planner/decision_id": b"1",
        "dynamo/planner/num_decode_workers": b"3",
        "dynamo/planner/num_prefill_workers": b"5",
    }


async def test_counts_outlive_the_planner_and_nonsense_is_out_of_reach() -> None:
    discovery = MemoryDiscovery()
    first = VirtualTarget(discovery, "dynamo", {"worker": 1})
    await first.start()
    await first.scale({"worker": 6}, decision_id=1)
    second = VirtualTarget(discovery, "dynamo", {"worker": 1})
    await second.start()
    assert (await second.state())["worker"].desired == 6
    await discovery.put("dynamo/planner/num_workers", b"many")
    with pytest.raises(UnavailableError, match="no number"):
        await second.state()


def test_the_plug_in_refuses_roles_without_a_key() -> None:
    make = plugins.load("scaling_targets", "virtual")
    for options in ({"encode": 1}, {"worker": -1}, {"worker": "two"}):
        with pytest.raises(ConfigurationError, match="target 'virtual'"):
            make(cast("Any", None), options)
