"""Leader election and barriers in memory, on a directory and in etcd."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from dynamo_core.clock import SystemClock
from dynamo_core.discovery import Discovery
from dynamo_core.errors import ConflictError
from dynamo_core.memory import MemoryDiscovery
from dynamo_runtime import Barrier, LeaderElection
from dynamo_runtime._discovery.etcd import etcd_discovery
from dynamo_runtime._discovery.file import file_discovery

Client = Callable[[], Awaitable[Discovery]]
FAST: dict[str, object] = {"retry_interval_s": 0.02, "max_retry_interval_s": 0.1, "probe_interval_s": 0.2}


@pytest_asyncio.fixture(params=["mem", "file", "etcd"])
async def client(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Client]:
    """Make clients of one store."""
    made: list[Discovery] = []
    memory = MemoryDiscovery()
    if request.param == "etcd":
        request.getfixturevalue("shared_etcd").control("del", "", "--prefix")

    async def make() -> Discovery:
        if request.param == "mem":
            discovery: Discovery = memory.peer()
        elif request.param == "file":
            discovery = file_discovery(f"file://{tmp_path}", clock=SystemClock(), options={})
        else:
            place = request.getfixturevalue("shared_etcd").host_port
            discovery = etcd_discovery(f"etcd://{place}", clock=SystemClock(), options=FAST)
        await discovery.start()
        made.append(discovery)
        return discovery

    yield make
    for discovery in made:
        await discovery.close()


async def test_one_leads_and_the_next_takes_over(client: Client, until: Any) -> None:
    elections = [LeaderElection(await client(), "planner", candidate=b"%d" % number) for number in range(3)]
    campaigns = [asyncio.create_task(election.campaign()) for election in elections]
    terms: list[int] = []
    for _ in range(3):
        await until(lambda: any(election.leading for election in elections))
        (leader,) = [election for election in elections if election.leading]
        assert await elections[0].leader() == b"%d" % elections.index(leader)
        assert leader.term is not None
        terms.append(leader.term)
        await leader.resign()
        await leader.resign()
        assert not leader.leading
    assert terms == sorted(set(terms))
    assert await elections[0].leader() is None
    await asyncio.gather(*campaigns)


async def test_leader_that_leaves_is_replaced(client: Client) -> None:
    first, second = await client(), await client()
    leader, other = LeaderElection(first, "planner"), LeaderElection(second, "planner")
    await asyncio.wait_for(leader.campaign(), 10)
    waiting = asyncio.create_task(other.campaign())
    await first.close()
    await asyncio.wait_for(waiting, 20)
    assert other.leading
    await asyncio.wait_for(leader.wait_lost(), 10)
    await leader.resign()
    await other.resign()


async def test_record_that_an_operator_deleted_ends_leadership(client: Client) -> None:
    store = await client()
    election = LeaderElection(store, "planner")
    await asyncio.wait_for(election.campaign(), 10)
    await (await client()).delete("v1/elections/planner")
    await asyncio.wait_for(election.wait_lost(), 20)
    await asyncio.wait_for(election.campaign(), 10)
    assert election.leading
    await election.resign()


async def test_cancelled_campaign_leaves_the_race(client: Client) -> None:
    leader, doomed = LeaderElection(await client(), "planner"), LeaderElection(await client(), "planner")
    await asyncio.wait_for(leader.campaign(), 10)
    waiting = asyncio.create_task(doomed.campaign())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    await leader.resign()
    assert not doomed.leading
    assert await doomed.leader() is None


async def test_leader_without_etcd_knows_before_its_lease_ends(own_etcd: Any, until: Any) -> None:
    store = etcd_discovery(f"etcd://{own_etcd.host_port}", clock=SystemClock(), options=FAST)
    await store.start()
    election = LeaderElection(store, "planner", ttl_s=2)
    await asyncio.wait_for(election.campaign(), 10)
    own_etcd.kill()
    own_etcd.wipe()
    await asyncio.wait_for(election.wait_lost(), 10)
    assert store.status().stale_for_s < 2
    own_etcd.start()
    await until(lambda: store.status().connected and not election.leading)
    await until(lambda: election.term is None)
    await asyncio.wait_for(election.campaign(), 10)
    await election.resign()
    await store.close()


async def test_members_wait_for_each_other_and_learn_what_each_brought(client: Client) -> None:
    barriers = [Barrier(await client(), "tp-group", size=3) for _ in range(3)]
    first = asyncio.create_task(barriers[0].arrive("leader", b"tcp://10.0.0.1:29500"))
    second = asyncio.create_task(barriers[1].arrive("worker 1"))
    await asyncio.sleep(0)
    assert not first.done()
    found = await asyncio.wait_for(asyncio.gather(first, second, barriers[2].arrive("worker/2", b"x")), 20)
    assert found == [{"leader": b"tcp://10.0.0.1:29500", "worker 1": b"", "worker/2": b"x"}] * 3
    for barrier in barriers:
        await barrier.leave()
        await barrier.leave()


async def test_one_too_many_and_one_twice_are_refused(client: Client) -> None:
    store = await client()
    first, second = Barrier(store, "pair", size=2), Barrier(store, "pair", size=2)
    waiting = asyncio.create_task(first.arrive("a"))
    async with asyncio.timeout(10):
        while not await store.list("v1/barriers/pair/members/"):
            await asyncio.sleep(0.01)
    with pytest.raises(ConflictError, match="already"):
        await Barrier(store, "pair", size=2).arrive("a")
    await asyncio.wait_for(second.arrive("b"), 10)
    assert set(await asyncio.wait_for(waiting, 10)) == {"a", "b"}
    with pytest.raises(ConflictError, match="completed by others"):
        await asyncio.wait_for(Barrier(store, "pair", size=2).arrive("c"), 10)
    await first.leave()
    await second.leave()
    assert await store.list("v1/barriers/") == []
