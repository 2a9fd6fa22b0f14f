"""What file discovery does when processes die or stand still, files are damaged, and the disk is full."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import stat
from pathlib import Path
from typing import Any

import pytest

from dynamo_core.clock import SystemClock
from dynamo_core.discovery import Record, RecordDeleted, RecordPut, WatchSynced
from dynamo_core.errors import ConfigurationError, ConflictError, InvalidRequestError, UnavailableError
from dynamo_core.telemetry import Metrics
from dynamo_core.testing import FakeClock
from dynamo_runtime._discovery.file import FileDiscovery, file_discovery
from dynamo_runtime._discovery.files import FileStore, LeaseFile, file_name
from dynamo_runtime._discovery.keeper import LeaseObserver
from dynamo_runtime._discovery.options import FileDiscoveryOptions
from dynamo_runtime._discovery.owner import Owner, certainly_gone, this_process
from dynamo_runtime._discovery.watches import MAX_QUEUED_EVENTS, FileWatch

FAST = FileDiscoveryOptions(tend_interval_s=0.02, poll_interval_s=0.05)
ELSEWHERE = Owner(1, "1", "another machine")


async def opened(root: Path, options: FileDiscoveryOptions = FAST) -> FileDiscovery:
    discovery = FileDiscovery(root, clock=SystemClock(), options=options)
    await discovery.start()
    return discovery


async def next_of(watch: Any, kind: type) -> Any:
    async with asyncio.timeout(20):
        while not isinstance(event := await anext(watch), kind):
            pass
    return event


async def test_keys_of_a_killed_process_expire(tmp_path: Path, spawn: Any) -> None:
    discovery = await opened(tmp_path)
    child = await spawn("hold_lease", tmp_path, 30)
    assert await child.line() == "held"
    watch = discovery.watch("held/")
    assert (await next_of(watch, RecordPut)).value == b"value"
    child.process.kill()
    await child.process.wait()
    # Its number is gone from the process table, so nobody waits for the 30 s.
    assert (await next_of(watch, RecordDeleted)).key == "held/key"
    await discovery.close()


async def test_keys_of_a_stopped_process_expire_and_come_back(tmp_path: Path, spawn: Any) -> None:
    discovery = await opened(tmp_path)
    child = await spawn("hold_lease", tmp_path, 0.4)
    assert await child.line() == "held"
    watch = discovery.watch("held/")
    await next_of(watch, WatchSynced)
    child.process.send_signal(signal.SIGSTOP)
    assert (await next_of(watch, RecordDeleted)).key == "held/key"
    child.process.send_signal(signal.SIGCONT)
    assert await next_of(watch, RecordPut) is not None
    record = await discovery.get("held/key")
    assert record is not None
    assert record.value == b"value"
    await discovery.close()


async def test_stranger_that_never_beats_lapses_after_its_time_and_not_before(tmp_path: Path) -> None:
    clock = FakeClock()
    store = FileStore(tmp_path)
    store.prepare()
    store.create_lease(7, 10.0, ELSEWHERE)
    observer = LeaseObserver(store, clock)
    for _ in range(10):
        assert observer.dead(set()) == []
        await clock.advance(1.0)
    assert [lease.lease_id for lease in observer.dead(set())] == [7]


@pytest.mark.parametrize("jump_s", [-86_400, 86_400])
async def test_clock_jumps_end_no_lease(tmp_path: Path, jump_s: int) -> None:
    clock = FakeClock()
    store = FileStore(tmp_path)
    store.prepare()
    store.create_lease(7, 10.0, ELSEWHERE)
    observer = LeaseObserver(store, clock)
    lease = tmp_path / ".state" / "leases" / "7"
    for beat in range(8):
        assert observer.dead(set()) == []
        await clock.advance(3.0)
        # The heartbeat as a machine writes it whose wall clock has jumped.
        os.utime(lease, (lease.stat().st_mtime + (jump_s if beat == 3 else 3),) * 2)
    assert observer.dead(set()) == []


async def test_observer_that_stood_still_itself_judges_nobody(tmp_path: Path) -> None:
    clock = FakeClock()
    store = FileStore(tmp_path)
    store.prepare()
    store.create_lease(7, 10.0, ELSEWHERE)
    observer = LeaseObserver(store, clock)
    observer.dead(set())
    await clock.advance(3600.0)
    assert observer.dead(set()) == []


async def test_lease_that_beats_while_being_ended_stays(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.prepare()
    store.create_lease(7, 10.0, ELSEWHERE)
    store.put("a/1", b"x", 7)
    (seen,) = store.leases()
    store.touch_lease(7)
    os.utime(tmp_path / ".state" / "leases" / "7", (1, 1))
    assert not store.end_lease(7, seen.heartbeat)
    assert store.get("a/1") is not None


async def test_leadership_does_not_come_back_by_itself(tmp_path: Path, until: Any) -> None:
    discovery = await opened(tmp_path)
    lease = await discovery.lease(0.3)
    await discovery.put("a/instance", b"x", lease=lease)
    await discovery.compare_and_set("a/leader", b"x", expected=None, lease=lease)
    other = FileStore(tmp_path)
    other.end_lease(lease.id)
    await until(lambda: other.get("a/instance") is not None and lease.valid)
    assert await discovery.get("a/leader") is None
    await discovery.close()


async def test_ended_lease_takes_no_keys(tmp_path: Path) -> None:
    discovery = await opened(tmp_path)
    lease = await discovery.lease()
    await lease.revoke()
    await lease.revoke()
    with pytest.raises(ConflictError):
        await discovery.put("a/1", b"x", lease=lease)
    await discovery.close()


async def test_close_removes_own_files(tmp_path: Path) -> None:
    discovery = await opened(tmp_path)
    await discovery.put("a/1", b"x", lease=await discovery.lease())
    await discovery.put("a/kept", b"x")
    await discovery.close()
    await discovery.close()
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == [file_name("a/kept")]
    assert list((tmp_path / ".state" / "leases").iterdir()) == []
    assert list((tmp_path / ".state" / "tmp").iterdir()) == []
    with pytest.raises(UnavailableError):
        await discovery.get("a/kept")


async def test_directory_is_private(tmp_path: Path) -> None:
    discovery = await opened(tmp_path / "deep" / "down")
    assert stat.S_IMODE((tmp_path / "deep" / "down").stat().st_mode) == 0o700
    await discovery.close()


@pytest.mark.parametrize("damage", [b"", b"garbage", b"\x96" + b"\xa1" * 5, "cut"])
async def test_damaged_file_breaks_no_watch(tmp_path: Path, damage: bytes | str) -> None:
    discovery = await opened(tmp_path)
    watch = discovery.watch("a/")
    await next_of(watch, WatchSynced)
    await discovery.put("a/1", b"good")
    assert (await next_of(watch, RecordPut)).value == b"good"
    path = tmp_path / file_name("a/1")
    path.write_bytes(path.read_bytes()[:-3] if isinstance(damage, str) else damage)
    (tmp_path / "stray file").write_bytes(b"stray")
    (tmp_path / "stray folder").mkdir()
    await discovery.put("a/2", b"next")
    assert (await next_of(watch, RecordPut)).key == "a/2"
    # The watch keeps the last good value; reading the file says that there is none; writing heals it.
    assert [record.value for record in await discovery.list("a/")] == [b"good", b"next"]
    assert await discovery.get("a/1") is None
    assert await discovery.compare_and_set("a/1", b"healed", expected=None) is not None
    assert (await next_of(watch, RecordPut)).value == b"healed"
    await discovery.close()


@pytest.mark.parametrize("damage", [b"", b"not a number", None])
async def test_revisions_grow_over_a_lost_counter(tmp_path: Path, damage: bytes | None) -> None:
    store = FileStore(tmp_path)
    store.prepare()
    store.put("a/1", b"x", 0)
    before = store.put("a/2", b"x", 0).revision
    counter = tmp_path / ".state" / "revision"
    if damage is None:
        counter.unlink()
    else:
        counter.write_bytes(damage)
    assert store.put("a/1", b"y", 0).revision > before
    counter.write_bytes(b"garbage")
    stranger = FileStore(tmp_path)
    assert stranger.put("a/1", b"z", 0).revision > before


async def test_removed_directory_is_made_again_with_what_this_process_holds(tmp_path: Path, until: Any) -> None:
    root = tmp_path / "discovery"
    discovery = await opened(root)
    lease = await discovery.lease(0.3)
    first = await discovery.put("a/1", b"x", lease=lease)
    watch = discovery.watch("a/")
    await next_of(watch, WatchSynced)
    shutil.rmtree(root)
    other = FileStore(root)
    await until(lambda: root.exists() and other.get("a/1") is not None)
    record = await discovery.get("a/1")
    assert record is not None
    assert record.revision > first
    await discovery.close()


async def test_full_disk_is_unavailable_and_keeps_what_was_there(tmp_path: Path, spawn: Any) -> None:
    child = await spawn("fill_disk", tmp_path)
    assert await child.line() == "refused discovery.unavailable EFBIG False"
    assert await child.line() == "kept before"
    assert await child.line() == "whole True"
    assert await child.process.wait() == 0


async def test_lock_that_is_never_released_is_unavailable(tmp_path: Path, spawn: Any) -> None:
    discovery = await opened(tmp_path, FileDiscoveryOptions(lock_timeout_s=0.05))
    await discovery.put("a/1", b"x")
    child = await spawn("hold_lock", tmp_path)
    assert await child.line() == "locked"
    with pytest.raises(UnavailableError, match="stayed locked"):
        await discovery.put("a/1", b"y")
    assert not discovery.status().connected
    assert (await discovery.list("a/"))[0].value == b"x"
    child.process.kill()
    await child.process.wait()
    await discovery.put("a/1", b"y")
    assert discovery.status().connected
    await discovery.close()


async def test_path_that_is_no_directory_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    discovery = FileDiscovery(tmp_path / "file", clock=SystemClock())
    with pytest.raises(UnavailableError):
        await discovery.start()
    status = discovery.status()
    assert not status.connected
    assert str(tmp_path) in status.detail
    await discovery.close()


async def test_thousand_keys_reach_a_watcher_of_another_client(tmp_path: Path) -> None:
    one, other = await opened(tmp_path), await opened(tmp_path)
    watch = other.watch("v1/instances/")
    await next_of(watch, WatchSynced)
    keys = {f"v1/instances/a/b/c/{number:x}" for number in range(1000)}
    for key in keys:
        await one.put(key, b"x" * 200)
    found: list[Any] = [await next_of(watch, RecordPut) for _ in keys]
    assert {event.key for event in found} == keys
    revisions = [event.revision for event in found]
    assert revisions == sorted(revisions)
    await one.close()
    await other.close()


async def test_slow_watcher_gets_the_newest_values_in_order() -> None:
    async def first_view() -> None:
        watch.update({}, 0)

    watch = FileWatch("a/", first_view, lambda gone: None)
    assert await anext(watch) == WatchSynced(0)
    count = 2 * MAX_QUEUED_EVENTS
    records: dict[str, Record] = {}
    for revision in range(1, count + 1):
        key = f"a/{revision % 5}"
        records = {**records, key: Record(key, b"%d" % revision, revision)}
        watch.update(records, revision)
    events = [await anext(watch) for _ in range(MAX_QUEUED_EVENTS + 5)]
    assert [event.revision for event in events] == [*range(1, MAX_QUEUED_EVENTS + 1), *range(count - 4, count + 1)]


def test_process_is_told_from_another_with_its_number() -> None:
    me = this_process()
    assert not certainly_gone(me)
    assert certainly_gone(Owner(me.pid, "1", me.scope))
    assert not certainly_gone(Owner(me.pid, "1", "another machine"))


def test_garbled_lease_is_nobodys(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.prepare()
    (tmp_path / ".state" / "leases" / "7").write_bytes(b"garbage")
    (tmp_path / ".state" / "leases" / "stray").write_bytes(b"garbage")
    (seen,) = LeaseObserver(store, FakeClock()).dead(set())
    assert (seen.lease_id, seen.lease) == (7, None)
    assert LeaseFile(1.0, ELSEWHERE).ttl_s == 1.0


@pytest.mark.parametrize("key", ["", "x" * 256, "/" * 90])
async def test_keys_that_fit_no_file_name_are_refused(tmp_path: Path, key: str) -> None:
    discovery = await opened(tmp_path)
    with pytest.raises(InvalidRequestError, match="discovery key"):
        await discovery.put(key, b"x")
    await discovery.close()


@pytest.mark.parametrize(
    ("url", "options", "named"),
    [
        ("file://relative/path", {}, "absolute"),
        ("mem://", {}, "absolute"),
        ("file:///d?colour=red", {}, "colour"),
        ("file:///d", {"poll_interval_s": 0}, "poll_interval_s"),
    ],
)
def test_wrong_urls_and_options_are_named(url: str, options: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        file_discovery(url, clock=SystemClock(), options=options)


async def test_metrics_show_expiry_and_damage(tmp_path: Path, until: Any) -> None:
    metrics = Metrics()
    options = {"metrics": metrics, "tend_interval_s": 0.02}
    discovery = file_discovery(f"file://{tmp_path}", clock=SystemClock(), options=options)
    await discovery.start()
    store = FileStore(tmp_path)
    store.create_lease(7, 30.0, Owner(this_process().pid, "1", this_process().scope))
    store.put("a/1", b"x", 7)
    (tmp_path / "garbled").write_bytes(b"x")

    def read(name: str) -> float | None:
        return metrics.registry.get_sample_value(name)

    await until(lambda: read("dynamo_runtime_discovery_expired_leases_total") == 1)
    assert store.get("a/1") is None
    await discovery.list("")
    assert read("dynamo_runtime_discovery_garbled_files_total") == 1
    assert read("dynamo_runtime_discovery_connected") == 1
    assert read("dynamo_runtime_discovery_records") == 0
    await discovery.close()
