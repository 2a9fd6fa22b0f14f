from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from dynamo_core.discovery import EVENT_CHANNELS_PREFIX, INSTANCES_PREFIX, MODELS_PREFIX
from dynamo_core.ids import EndpointId
from dynamo_core.memory import MemoryDiscovery, MemoryRequestPlane
from dynamo_runtime._tracked import HELD_BACK, TrackedDiscovery, TrackedRequestPlane

INSTANCE = INSTANCES_PREFIX + "a/b/c/1"
MODEL = MODELS_PREFIX + "a/b/c/1"
CHANNEL = EVENT_CHANNELS_PREFIX + "t/1"


@pytest.fixture
async def store() -> AsyncIterator[MemoryDiscovery]:
    store = MemoryDiscovery()
    await store.start()
    yield store
    await store.close()


async def keys(store: MemoryDiscovery) -> list[str]:
    return [record.key for record in await store.list("")]


async def test_withdrawing_takes_announcements_out_and_nothing_else(store: MemoryDiscovery) -> None:
    tracked = TrackedDiscovery(store)
    lease = await tracked.lease()
    for key in (INSTANCE, MODEL, CHANNEL):
        await tracked.put(key, b"x", lease=lease)
    assert tracked.announced == 2
    await tracked.withdraw()
    assert (await keys(store), tracked.announced) == ([CHANNEL], 0)


async def test_announcing_puts_them_back_as_they_are_meanwhile(store: MemoryDiscovery) -> None:
    tracked = TrackedDiscovery(store)
    lease = await tracked.lease()
    await tracked.put(INSTANCE, b"old", lease=lease)
    await tracked.withdraw()
    assert await tracked.put(INSTANCE, b"new", lease=lease) == HELD_BACK
    assert await tracked.get(INSTANCE) is None
    await tracked.announce()
    record = await tracked.get(INSTANCE)
    assert record is not None and record.value == b"new"


async def test_what_a_component_deleted_itself_does_not_come_back(store: MemoryDiscovery) -> None:
    tracked = TrackedDiscovery(store)
    lease = await tracked.lease()
    await tracked.put(INSTANCE, b"x", lease=lease)
    await tracked.withdraw()
    await tracked.delete(INSTANCE)
    await tracked.announce()
    assert await keys(store) == []


async def test_the_end_of_the_lease_still_ends_the_announcement(store: MemoryDiscovery) -> None:
    tracked = TrackedDiscovery(store)
    lease = await tracked.lease()
    await tracked.put(INSTANCE, b"x", lease=lease)
    await lease.revoke()
    assert await keys(store) == []


async def test_closing_what_a_component_was_given_closes_nothing(store: MemoryDiscovery) -> None:
    tracked = TrackedDiscovery(store)
    await tracked.close()
    await tracked.put("k", b"v")
    assert await keys(store) == ["k"]


async def test_running_calls_are_counted_over_all_endpoints() -> None:
    plane = MemoryRequestPlane()
    await plane.start()
    tracked = TrackedRequestPlane(plane)

    async def handler(payload: bytes, call: object, sink: object) -> None:
        return None

    await tracked.serve(EndpointId("a", "b", "c"), handler)
    await tracked.serve(EndpointId("a", "b", "d"), handler)
    assert tracked.in_flight == 0
    await plane.close()
