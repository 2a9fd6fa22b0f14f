"""Conformance of discovery backends."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncIterator

import pytest

from dynamo_core.discovery import (
    MODELS_PREFIX,
    Discovery,
    Lease,
    Record,
    RecordDeleted,
    RecordPut,
    WatchEvent,
    WatchSynced,
    quote_segment,
)
from dynamo_core.errors import ConflictError
from dynamo_core.testing._suite import ConformanceSuite


class DiscoveryConformance(ConformanceSuite, suite=True):
    """Every ``Discovery`` must pass this."""

    @abstractmethod
    async def make_discovery(self) -> Discovery:
        """Return a new client, not started, of the one empty store of this test; called up to twice."""
        ...

    async def lose_lease(self, discovery: Discovery, lease: Lease) -> None:
        """Make a lease end as if its process had died, and wait until the backend has seen it.

        Backends with keep-alives stop them here; the default revokes.
        """
        await lease.revoke()

    async def test_put_is_read_back(self) -> None:
        async with self.running(await self.make_discovery()) as (store,):
            revision = await store.put("a/1", b"\x00\xff")
            assert await store.get("a/1") == Record("a/1", b"\x00\xff", revision)

    async def test_absent_key_reads_as_none(self) -> None:
        async with self.running(await self.make_discovery()) as (store,):
            assert await store.get("a/absent") is None

    async def test_revisions_grow(self) -> None:
        async with self.running(await self.make_discovery()) as (store,):
            revisions = [await store.put(key, b"x") for key in ("a/1", "a/2", "a/1")]
            assert revisions == sorted(set(revisions))

    async def test_put_replaces(self) -> None:
        async with self.running(await self.make_discovery()) as (store,):
            await store.put("a/1", b"old")
            await store.put("a/1", b"new")
            assert [record.value for record in await store.list("a/")] == [b"new"]

    async def test_delete_tells_whether_it_was_there(self) -> None:
        async with self.running(await self.make_discovery()) as (store,):
            await store.put("a/1", b"x")
            assert await store.delete("a/1")
            assert not await store.delete("a/1")
            assert await store.get("a/1") is None

    async def test_list_is_in_key_order_and_keeps_to_its_prefix(self) -> None:
        async with self.running(await self.make_discovery()) as (store,):
            for key in ("a/c", "a/b", "b/a", "a/b/d", "ab"):
                await store.put(key, key.encode())
            assert [record.key for record in await store.list("a/")] == ["a/b", "a/b/d", "a/c"]

    async def test_list_of_many(self) -> None:
        async with self.running(await self.make_discovery()) as (store,):
            keys = [f"a/{number:04d}" for number in range(200)]
            for key in reversed(keys):
                await store.put(key, b"x")
            assert [record.key for record in await store.list("a/")] == keys

    async def test_large_value_is_kept_whole(self) -> None:
        value = bytes(range(256)) * 1024
        async with self.running(await self.make_discovery()) as (store,):
            await store.put("a/large", value)
            record = await store.get("a/large")
            assert record is not None
            assert record.value == value

    async def test_keys_with_quoted_names_stay_apart(self) -> None:
        names = ("org/Model-7B", "org.Model-7B", "org~Model 7B", "モデル")
        keys = [MODELS_PREFIX + quote_segment(name) for name in names]
        async with self.running(await self.make_discovery()) as (store,):
            for key in keys:
                await store.put(key, key.encode())
            assert {record.key: record.value for record in await store.list(MODELS_PREFIX)} == {
                key: key.encode() for key in keys
            }

    async def test_compare_and_set_creates_only_what_is_absent(self) -> None:
        async with self.running(await self.make_discovery()) as (store,):
            revision = await store.compare_and_set("a/1", b"first", expected=None)
            assert revision is not None
            assert await store.compare_and_set("a/1", b"second", expected=None) is None
            assert await store.get("a/1") == Record("a/1", b"first", revision)

    async def test_compare_and_set_needs_the_present_revision(self) -> None:
        async with self.running(await self.make_discovery()) as (store,):
            old = await store.put("a/1", b"old")
            new = await store.compare_and_set("a/1", b"new", expected=old)
            assert new is not None
            assert new > old
            assert await store.compare_and_set("a/1", b"late", expected=old) is None
            assert await store.compare_and_set("a/absent", b"x", expected=new) is None

    async def test_compare_and_set_after_delete_sees_absence(self) -> None:
        async with self.running(await self.make_discovery()) as (store,):
            old = await store.put("a/1", b"old")
            await store.delete("a/1")
            assert await store.compare_and_set("a/1", b"x", expected=old) is None
            assert await store.compare_and_set("a/1", b"x", expected=None) is not None

    async def test_concurrent_compare_and_set_has_one_winner(self) -> None:
        async with self.running(await self.make_discovery(), await self.make_discovery()) as clients:
            results = await asyncio.gather(
                *(clients[i % 2].compare_and_set("a/1", b"%d" % i, expected=None) for i in range(10))
            )
            won = [i for i, revision in enumerate(results) if revision is not None]
            record = await clients[0].get("a/1")
            assert len(won) == 1
            assert record is not None
            assert record.value == b"%d" % won[0]

    async def test_clients_share_the_store(self) -> None:
        async with self.running(await self.make_discovery(), await self.make_discovery()) as (one, other):
            await one.put("a/1", b"x")
            record = await other.get("a/1")
            assert record is not None
            assert record.value == b"x"

    async def test_lease_ids_differ(self) -> None:
        async with self.running(await self.make_discovery(), await self.make_discovery()) as clients:
            leases = [await client.lease() for client in clients for _ in range(3)]
            assert len({lease.id for lease in leases}) == 6
            assert all(lease.valid for lease in leases)

    async def test_revoked_lease_takes_its_keys(self) -> None:
        async with self.running(await self.make_discovery()) as (store,):
            lease = await store.lease()
            await store.put("a/1", b"x", lease=lease)
            await store.compare_and_set("a/2", b"x", expected=None, lease=lease)
            await store.put("a/3", b"x")
            await lease.revoke()
            await lease.revoke()
            assert not lease.valid
            assert [record.key for record in await store.list("a/")] == ["a/3"]

    async def test_ended_lease_is_refused(self) -> None:
        async with self.running(await self.make_discovery()) as (store,):
            lease = await store.lease()
            await lease.revoke()
            with pytest.raises(ConflictError):
                await store.put("a/1", b"x", lease=lease)
            assert await store.get("a/1") is None

    async def test_key_written_without_its_lease_outlives_it(self) -> None:
        async with self.running(await self.make_discovery()) as (store,):
            lease = await store.lease()
            await store.put("a/1", b"leased", lease=lease)
            await store.put("a/1", b"free")
            await lease.revoke()
            record = await store.get("a/1")
            assert record is not None
            assert record.value == b"free"

    async def test_lost_lease_is_seen_by_watchers(self) -> None:
        async with self.running(await self.make_discovery(), await self.make_discovery()) as (one, other):
            lease = await one.lease()
            await one.put("a/1", b"x", lease=lease)
            watch = other.watch("a/")
            assert [event.key for event in await self._first_view(watch)] == ["a/1"]
            await self.lose_lease(one, lease)
            event = await self.within(anext(watch))
            assert isinstance(event, RecordDeleted)
            assert event.key == "a/1"

    async def test_close_revokes_own_leases_only(self) -> None:
        async with self.running(await self.make_discovery(), await self.make_discovery()) as (one, other):
            await one.put("a/one", b"x", lease=await one.lease())
            await other.put("a/other", b"x", lease=await other.lease())
            await one.close()
            await one.close()
            assert [record.key for record in await other.list("a/")] == ["a/other"]

    async def test_watch_gives_present_records_then_synced_then_changes(self) -> None:
        async with self.running(await self.make_discovery()) as (store,):
            await store.put("a/1", b"old")
            await store.put("b/1", b"elsewhere")
            watch = store.watch("a/")
            assert [(event.key, event.value) for event in await self._first_view(watch)] == [("a/1", b"old")]
            await store.put("a/2", b"x")
            await store.put("b/2", b"elsewhere")
            await store.put("a/1", b"new")
            await store.delete("a/2")
            events = [await self.within(anext(watch)) for _ in range(3)]
            assert [_brief(event) for event in events] == [("a/2", b"x"), ("a/1", b"new"), ("a/2", None)]
            revisions = [event.revision for event in events]
            assert revisions == sorted(revisions)

    async def test_watch_of_nothing_is_synced_at_once(self) -> None:
        async with self.running(await self.make_discovery()) as (store,):
            assert await self._first_view(store.watch("a/")) == []

    async def test_watch_sees_the_writes_of_another_client(self) -> None:
        async with self.running(await self.make_discovery(), await self.make_discovery()) as (one, other):
            watch = other.watch("a/")
            await self._first_view(watch)
            revision = await one.put("a/1", b"x")
            assert await self.within(anext(watch)) == RecordPut("a/1", b"x", revision)

    async def test_close_ends_watches(self) -> None:
        async with self.running(await self.make_discovery()) as (store,):
            watch = store.watch("a/")
            await self._first_view(watch)
            waiting = asyncio.create_task(_drain(watch))
            await store.close()
            assert await self.within(waiting) == []

    async def test_cancelled_watch_leaves_the_others(self) -> None:
        async with self.running(await self.make_discovery()) as (store,):
            watch = store.watch("a/")
            await self._first_view(watch)
            doomed = asyncio.create_task(_drain(store.watch("a/")))
            await asyncio.sleep(0)
            doomed.cancel()
            await asyncio.wait([doomed])
            revision = await store.put("a/1", b"x")
            assert await self.within(anext(watch)) == RecordPut("a/1", b"x", revision)

    async def test_status_is_connected_while_running(self) -> None:
        async with self.running(await self.make_discovery()) as (store,):
            status = store.status()
            assert status.connected
            assert status.stale_for_s == 0

    async def _first_view(self, watch: AsyncIterator[WatchEvent]) -> list[RecordPut]:
        found: list[RecordPut] = []
        while True:
            event = await self.within(anext(watch))
            if isinstance(event, WatchSynced):
                return found
            assert isinstance(event, RecordPut)
            found.append(event)


async def _drain(watch: AsyncIterator[WatchEvent]) -> list[WatchEvent]:
    return [event async for event in watch]


def _brief(event: WatchEvent) -> tuple[str, bytes | None]:
    assert not isinstance(event, WatchSynced)
    return (event.key, event.value if isinstance(event, RecordPut) else None)
