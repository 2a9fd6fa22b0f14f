"""What etcd discovery does when etcd is killed, cut off, emptied, compacted, or wants to know who asks."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from dynamo_core.clock import SystemClock
from dynamo_core.discovery import RecordDeleted, RecordPut, WatchEvent, WatchSynced
from dynamo_core.errors import (
    ConfigurationError,
    ConflictError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from dynamo_core.telemetry import Metrics
from dynamo_runtime._discovery.etcd import EtcdDiscovery, etcd_discovery
from dynamo_runtime._discovery.etcd_options import etcd_target

FAST: dict[str, object] = {
    "request_timeout_s": 1.0,
    "retry_interval_s": 0.02,
    "max_retry_interval_s": 0.2,
    "probe_interval_s": 0.3,
    "startup_timeout_s": 20,
}


OPENED: list[EtcdDiscovery] = []


async def opened(place: str, **options: object) -> EtcdDiscovery:
    target, metrics = etcd_target(f"etcd://{place}", {**FAST, **options})
    discovery = EtcdDiscovery(target, clock=SystemClock(), metrics=metrics)
    OPENED.append(discovery)
    await discovery.start()
    return discovery


@pytest_asyncio.fixture(autouse=True)
async def _everything_closed() -> AsyncIterator[None]:
    """A test that fails midway leaves no client behind."""
    yield
    while OPENED:
        await OPENED.pop().close()


class Reader:
    """Reads a watch in the background and keeps everything."""

    def __init__(self, watch: Any) -> None:
        self.events: list[WatchEvent] = []
        self.view: dict[str, bytes] = {}
        self.task = asyncio.create_task(self._read(watch))

    async def _read(self, watch: Any) -> None:
        async for event in watch:
            self.events.append(event)
            if isinstance(event, RecordPut):
                self.view[event.key] = event.value
            elif isinstance(event, RecordDeleted):
                del self.view[event.key]

    @property
    def synced(self) -> int:
        """Times the view was complete."""
        return sum(isinstance(event, WatchSynced) for event in self.events)

    @property
    def deleted(self) -> list[str]:
        """Keys whose removal was told."""
        return [event.key for event in self.events if isinstance(event, RecordDeleted)]


async def test_nobody_loses_anything_while_etcd_is_away(own_etcd: Any, until: Any) -> None:
    owner, other = await opened(own_etcd.host_port), await opened(own_etcd.host_port)
    lease = await owner.lease(2)
    await owner.put("a/1", b"x", lease=lease)
    reader = Reader(other.watch("a/"))
    await until(lambda: reader.synced)
    own_etcd.kill()
    await until(lambda: not owner.status().connected and not other.status().connected)
    with pytest.raises(UnavailableError):
        await other.list("a/")
    # Longer than the lease's time to live: nobody is there to end it, and the view stays.
    await until(lambda: other.status().stale_for_s > 3)
    assert reader.view == {"a/1": b"x"}
    own_etcd.start()
    await until(lambda: reader.synced == 2 and owner.status().connected)
    assert reader.deleted == []
    await owner.put("a/2", b"y", lease=lease)
    await until(lambda: reader.view == {"a/1": b"x", "a/2": b"y"})
    assert lease.valid
    await owner.close()
    await until(lambda: reader.view == {})
    await other.close()
    await reader.task


async def test_etcd_that_comes_back_empty_is_filled_again_and_no_watch_flickers(own_etcd: Any, until: Any) -> None:
    metrics = Metrics()
    owner, other = await opened(own_etcd.host_port, metrics=metrics), await opened(own_etcd.host_port)
    lease = await owner.lease(2)
    for number in range(20):
        await owner.put(f"a/{number}", b"x", lease=lease)
    await owner.compare_and_set("leader", b"owner", expected=None, lease=lease)
    reader = Reader(other.watch("a/"))
    await until(lambda: reader.synced)
    own_etcd.kill()
    own_etcd.wipe()
    await until(lambda: not owner.status().connected and not other.status().connected)
    own_etcd.start()
    await until(lambda: lease.valid and owner.status().connected and reader.synced >= 2)
    assert len(await owner.list("a/")) == 20
    assert reader.deleted == []
    assert len(reader.view) == 20
    # What a lost lease stood for may have passed on, so leadership is not taken back unasked.
    assert await owner.get("leader") is None
    assert metrics.registry.get_sample_value("dynamo_runtime_discovery_restored_leases_total") == 1
    await owner.close()
    await until(lambda: reader.view == {})
    await other.close()


async def test_records_whose_owner_died_with_the_store_leave_after_the_grace(own_etcd: Any, until: Any) -> None:
    owner = await opened(own_etcd.host_port)
    other = await opened(own_etcd.host_port, reset_grace_s=0.5)
    await owner.put("a/1", b"x", lease=await owner.lease(2))
    reader = Reader(other.watch("a/"))
    await until(lambda: reader.synced)
    own_etcd.kill()
    own_etcd.wipe()
    await owner.close()
    await until(lambda: not other.status().connected)
    own_etcd.start()
    await until(lambda: reader.synced == 2)
    assert reader.view == {"a/1": b"x"}
    await until(lambda: reader.view == {})
    await other.close()


async def test_compaction_behind_a_cut_off_watch_is_made_up_by_diff(shared_etcd: Any, proxy: Any, until: Any) -> None:
    shared_etcd.control("del", "", "--prefix")
    between = await proxy(shared_etcd.port)
    metrics = Metrics()
    near = await opened(shared_etcd.host_port)
    far = await opened(f"127.0.0.1:{between.port}", metrics=metrics)
    for key in ("a/kept", "a/changed", "a/gone"):
        await near.put(key, b"old")
    reader = Reader(far.watch("a/"))
    await until(lambda: reader.synced)
    between.cut()
    await near.put("a/changed", b"new")
    await near.delete("a/gone")
    revision = await near.put("a/new", b"new")
    shared_etcd.control("compact", str(revision))
    await until(lambda: not far.status().connected)
    between.reset()
    between.heal()
    await until(lambda: reader.synced == 2)
    assert reader.view == {"a/kept": b"old", "a/changed": b"new", "a/new": b"new"}
    assert [event.key for event in reader.events if isinstance(event, RecordPut)][3:] == ["a/changed", "a/new"]
    assert reader.events[-1] == WatchSynced(revision, resync=True)
    assert metrics.registry.get_sample_value("dynamo_runtime_discovery_resyncs_total") == 1
    await near.put("a/later", b"x")
    await until(lambda: "a/later" in reader.view)
    await near.close()
    await far.close()


async def test_compaction_does_not_disturb_a_watch_that_is_up_to_date(shared_etcd: Any, until: Any) -> None:
    shared_etcd.control("del", "", "--prefix")
    discovery = await opened(shared_etcd.host_port)
    reader = Reader(discovery.watch("a/"))
    await until(lambda: reader.synced)
    for number in range(50):
        revision = await discovery.put("a/1", b"%d" % number)
        if number % 10 == 0:
            shared_etcd.control("compact", str(revision))
    await until(lambda: reader.view == {"a/1": b"49"})
    assert reader.synced == 1
    assert len(reader.events) == 51
    await discovery.close()


async def test_silent_connection_is_noticed_and_replaced(shared_etcd: Any, proxy: Any, until: Any) -> None:
    shared_etcd.control("del", "", "--prefix")
    between = await proxy(shared_etcd.port)
    near, far = await opened(shared_etcd.host_port), await opened(f"127.0.0.1:{between.port}", request_timeout_s=0.2)
    reader = Reader(far.watch("a/"))
    await until(lambda: reader.synced)
    between.cut()
    await near.put("a/1", b"x")
    await until(lambda: not far.status().connected)
    assert "no answer within" in far.status().detail
    between.heal()
    await until(lambda: reader.view == {"a/1": b"x"} and far.status().connected)
    await near.close()
    await far.close()


@pytest.mark.filterwarnings("ignore:Sending a large body")
async def test_close_comes_to_an_end_though_the_last_write_never_leaves(
    shared_etcd: Any, proxy: Any, until: Any
) -> None:
    between = await proxy(shared_etcd.port)
    discovery = await opened(f"127.0.0.1:{between.port}", request_timeout_s=60.0, probe_interval_s=60.0)
    await discovery.lease()
    between.cut()
    writing = asyncio.create_task(discovery.put("a/1", bytes(32 << 20)))
    await until(lambda: between.held)
    await asyncio.wait_for(discovery.close(), 20)
    writing.cancel()
    between.heal()


async def test_stopped_server_makes_the_client_go_to_another(shared_etcd: Any, own_etcd: Any, until: Any) -> None:
    """Two servers of one cluster stand for each other; here they are two clusters, so that it shows which answered."""
    shared_etcd.control("del", "", "--prefix")
    own_etcd.control("put", "a/1", "own")
    discovery = await opened(f"{own_etcd.host_port},{shared_etcd.host_port}", request_timeout_s=0.5)
    found = await discovery.get("a/1")
    assert found is not None
    assert found.value == b"own"
    own_etcd.signal(signal.SIGSTOP)
    assert await discovery.get("a/1") is None
    assert discovery.status().connected
    assert shared_etcd.host_port in discovery.status().detail
    own_etcd.signal(signal.SIGCONT)
    await discovery.close()


async def test_lease_that_an_operator_revoked_comes_back_with_its_keys(shared_etcd: Any, until: Any) -> None:
    shared_etcd.control("del", "", "--prefix")
    discovery = await opened(shared_etcd.host_port)
    lease = await discovery.lease(2)
    await discovery.put("a/1", b"x", lease=lease)
    await discovery.put("a/2", b"x", lease=lease)
    await discovery.put("a/2", b"no longer under the lease")
    shared_etcd.control("lease", "revoke", f"{lease.id:x}")
    # The next write under it notices at once, the next keep-alive would otherwise.
    await discovery.put("a/3", b"x", lease=lease)
    assert [record.key for record in await discovery.list("a/")] == ["a/1", "a/2", "a/3"]
    shared_etcd.control("lease", "revoke", f"{lease.id:x}")
    await until(lambda: len(shared_etcd.control("get", "a/", "--prefix", "--keys-only").split()) == 3)
    await lease.revoke()
    with pytest.raises(ConflictError):
        await discovery.put("a/1", b"x", lease=lease)
    assert [record.key for record in await discovery.list("a/")] == ["a/2"]
    await discovery.close()


async def test_key_that_passed_to_another_owner_is_not_taken_back(shared_etcd: Any, until: Any) -> None:
    shared_etcd.control("del", "", "--prefix")
    discovery = await opened(shared_etcd.host_port)
    lease = await discovery.lease(2)
    await discovery.put("a/1", b"mine", lease=lease)
    shared_etcd.control("lease", "revoke", f"{lease.id:x}")
    shared_etcd.control("put", "a/1", "theirs")
    await discovery.put("a/2", b"mine", lease=lease)
    assert [record.value for record in await discovery.list("a/")] == [b"theirs", b"mine"]
    await discovery.close()


async def test_long_listings_come_in_pages_of_one_revision(shared_etcd: Any) -> None:
    shared_etcd.control("del", "", "--prefix")
    one, other = [await opened(shared_etcd.host_port, request_timeout_s=20.0) for _ in range(2)]
    keys = {f"a/{number:05}" for number in range(2500)}
    pending = list(keys)
    while pending:
        batch, pending = pending[:100], pending[100:]
        await asyncio.gather(*(one.put(key, b"x") for key in batch))
    assert [record.key for record in await other.list("a/")] == sorted(keys)
    assert [record.key for record in await other.list("")] == sorted(keys)
    await one.close()
    await other.close()


async def test_nobody_there_is_unavailable_after_the_startup_limit() -> None:
    discovery = etcd_discovery("etcd://127.0.0.1:1", clock=SystemClock(), options={**FAST, "startup_timeout_s": 0.2})
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1 cannot be reached"):
        await discovery.start()
    assert not discovery.status().connected
    await discovery.close()
    with pytest.raises(UnavailableError, match="closed"):
        await discovery.get("a")


async def test_start_waits_for_etcd(own_etcd: Any) -> None:
    own_etcd.kill()
    starting = asyncio.create_task(opened(own_etcd.host_port))
    await asyncio.sleep(0)
    own_etcd.start()
    discovery = await asyncio.wait_for(starting, 20)
    assert discovery.status().connected
    await discovery.close()


def protect(server: Any) -> None:
    """Turn authentication on: ``root`` may do anything, ``worker`` has the keys under ``a/``."""
    server.control("user", "add", "root:secret")
    server.control("user", "grant-role", "root", "root")
    server.control("role", "add", "workers")
    server.control("role", "grant-permission", "workers", "--prefix=true", "readwrite", "a/")
    server.control("role", "grant-permission", "workers", "--prefix=true", "readwrite", "v1/")
    server.control("user", "add", "worker:pass word")
    server.control("user", "grant-role", "worker", "workers")
    server.control("auth", "enable")


async def test_user_gets_what_the_role_allows_also_after_a_restart(own_etcd: Any, tmp_path: Any, until: Any) -> None:
    protect(own_etcd)
    (tmp_path / "password").write_text("pass word\n")
    discovery = await opened(own_etcd.host_port, username="worker", password_file=str(tmp_path / "password"))
    reader = Reader(discovery.watch("a/"))
    await until(lambda: reader.synced)
    lease = await discovery.lease(2)
    await discovery.put("a/1", b"x", lease=lease)
    with pytest.raises(PermissionDeniedError, match="role"):
        await discovery.put("b/1", b"x")
    with pytest.raises(PermissionDeniedError):
        await anext(discovery.watch("b/"))
    # Tokens do not outlive the server that gave them.
    own_etcd.kill()
    own_etcd.start()
    await until(lambda: reader.synced == 2)
    await discovery.put("a/2", b"x", lease=lease)
    await until(lambda: reader.view == {"a/1": b"x", "a/2": b"x"})
    await discovery.close()


@pytest.mark.parametrize("place", ["worker:wrong@", "nobody:secret@", ""])
async def test_wrong_user_is_refused_at_the_start(own_etcd: Any, place: str) -> None:
    protect(own_etcd)
    discovery = etcd_discovery(f"etcd://{place}{own_etcd.host_port}", clock=SystemClock(), options=FAST)
    with pytest.raises(UnauthenticatedError, match="username and password"):
        await discovery.start()
    await discovery.close()


async def test_both_sides_prove_themselves_with_tls(own_etcd: Any, authority: Any, until: Any) -> None:
    own_etcd.kill()
    server_cert, server_key = authority.issue("127.0.0.1", "etcd.test", to="etcd")
    cert, key = authority.issue("worker", to="etcd-client")
    own_etcd.scheme = "https"
    own_etcd.extra = (
        *("--cert-file", str(server_cert), "--key-file", str(server_key)),
        *("--client-cert-auth", "--trusted-ca-file", str(authority.ca_file)),
    )
    own_etcd.start()
    proof = {"tls_ca": str(authority.ca_file), "tls_cert": str(cert), "tls_key": str(key)}
    discovery = await opened(own_etcd.host_port, **proof, tls_server_name="etcd.test")
    reader = Reader(discovery.watch("a/"))
    await discovery.put("a/1", b"x", lease=await discovery.lease())
    await until(lambda: reader.view == {"a/1": b"x"})
    await discovery.close()
    for wrong in ({"tls_ca": proof["tls_ca"]}, {**proof, "tls_server_name": "another.test"}, {"tls": "true"}):
        other = etcd_discovery(
            f"etcd://{own_etcd.host_port}", clock=SystemClock(), options={**FAST, **wrong, "startup_timeout_s": 0.2}
        )
        with pytest.raises(UnavailableError):
            await other.start()
        await other.close()


@pytest.mark.parametrize(
    ("url", "options", "named"),
    [
        ("etcd://", {}, "etcd://host:port"),
        ("etcd://host/path", {}, "etcd://host:port"),
        ("etcd://host:port", {}, "port"),
        ("etcd://a,,b", {}, "host is empty"),
        ("etcd://a?colour=red", {}, "colour"),
        ("etcd://a", {"probe_interval_s": 0}, "probe_interval_s"),
        ("etcd://a", {"password_file": "/absent"}, "password_file /absent"),
        ("etcd://a", {"tls_ca": "/absent"}, "tls_ca /absent"),
        ("etcd://a", {"tls_cert": "/absent"}, "tls_key"),
        ("etcd://a", {"tls_cert": "/absent", "tls_key": "/absent"}, "tls_cert /absent"),
    ],
)
def test_wrong_urls_and_options_are_named(url: str, options: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        etcd_discovery(url, clock=SystemClock(), options=options)


def test_password_is_in_no_message() -> None:
    with pytest.raises(ConfigurationError) as caught:
        etcd_discovery("etcd://user:secret@host?colour=red", clock=SystemClock(), options={})
    assert "secret" not in str(caught.value)
