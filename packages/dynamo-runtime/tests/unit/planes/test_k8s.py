"""Discovery in Kubernetes keeps the contract, and what it does when the server fails or pods come and go."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import yaml

from dynamo_core import plugins
from dynamo_core.clock import SystemClock
from dynamo_core.discovery import Discovery, RecordDeleted, RecordPut, WatchEvent, WatchSynced
from dynamo_core.errors import ConfigurationError, PermissionDeniedError, UnauthenticatedError, UnavailableError
from dynamo_core.telemetry import Metrics
from dynamo_core.testing import DiscoveryConformance
from dynamo_runtime._discovery.k8s import K8sDiscovery
from dynamo_runtime._discovery.k8s_options import k8s_target
from dynamo_runtime._tls import TlsFiles

_spec = importlib.util.spec_from_file_location("k8s_server", Path(__file__).with_name("k8s_server.py"))
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
ApiServer = _module.ApiServer

FAST: dict[str, object] = {
    "request_timeout_s": 2.0,
    "retry_interval_s": 0.02,
    "max_retry_interval_s": 0.1,
    "probe_interval_s": 0.3,
    "startup_timeout_s": 10,
    "reap_interval_s": 0.2,
}


class K8sSuite:
    """The conformance kit calls ``make_discovery`` within each test's loop."""

    @pytest_asyncio.fixture(autouse=True)
    async def _server(self) -> AsyncIterator[None]:
        # Small pages, so that lists come in several.
        self._api = ApiServer(page=50)
        await self._api.start()
        yield
        await self._api.stop()

    async def make_discovery(self) -> Discovery:
        factory = plugins.load("discoveries", "k8s")
        return factory(f"k8s://{self._api.host_port}/serving", clock=SystemClock(), options={})


class TestK8s(K8sSuite, DiscoveryConformance):
    pass


@pytest_asyncio.fixture
async def api() -> AsyncIterator[Any]:
    server = ApiServer()
    await server.start()
    yield server
    await server.stop()


Opened = Any


@pytest_asyncio.fixture
async def opened() -> AsyncIterator[Opened]:
    """Open clients; all are closed at the end."""
    made: list[K8sDiscovery] = []

    async def open_one(api: Any, **options: object) -> K8sDiscovery:
        target, metrics = k8s_target(f"k8s://{api.host_port}/serving", {**FAST, **options}, {})
        made.append(K8sDiscovery(target, clock=SystemClock(), metrics=metrics))
        await made[-1].start()
        return made[-1]

    yield open_one
    for each in made:
        await each.close()


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


async def test_lease_of_a_process_that_is_gone_is_ended_by_another(api: Any, opened: Opened, until: Any) -> None:
    metrics = Metrics()
    gone, other = await opened(api), await opened(api, metrics=metrics)
    await gone.put("a/1", b"x", lease=await gone.lease(1))
    kept = await other.lease(1)
    await other.put("a/2", b"x", lease=kept)
    reader = Reader(other.watch("a/"))
    await until(lambda: len(reader.view) == 2)
    for task in [*gone._tasks, gone._tender._task]:
        task.cancel()
    await until(lambda: reader.view == {"a/2": b"x"})
    assert kept.valid
    # It is counted once all its records are gone, and a watch tells of them one by one.
    counted = "dynamo_runtime_discovery_expired_leases_total"
    await until(lambda: metrics.registry.get_sample_value(counted) == 1)


async def test_one_client_at_a_time_lists_the_leases(api: Any, opened: Opened, until: Any) -> None:
    first, second = await opened(api), await opened(api)

    def looks() -> int:
        return sum("leases?" in path and method == "GET" for method, path in api.requests)

    await until(lambda: looks() > 2)
    holder = next(body["spec"]["holderIdentity"] for key, body in api.objects.items() if "reaper" in key[2])
    identities = {first._reaper._identity, second._reaper._identity}
    assert holder in identities
    # Its successor takes over once it is gone.
    gone = first if holder == first._reaper._identity else second
    await gone.close()
    left = identities - {holder}
    await until(lambda: {b["spec"]["holderIdentity"] for k, b in api.objects.items() if "reaper" in k[2]} == left)


async def test_lease_goes_with_its_pod(api: Any, opened: Opened, until: Any) -> None:
    api.put("configmaps", "serving", {"metadata": {"name": "stands-for-the-pod"}})
    uid = api.objects["configmaps", "serving", "stands-for-the-pod"]["metadata"]["uid"]
    owner, other = await opened(api, pod_name="worker-1", pod_uid=uid), await opened(api)
    lease = await owner.lease(60)
    await owner.put("a/1", b"x", lease=lease)
    reader = Reader(other.watch("a/"))
    await until(lambda: reader.view)
    api.remove("configmaps", "serving", "stands-for-the-pod")
    await until(lambda: not reader.view)


async def test_nobody_loses_anything_while_the_server_is_away(api: Any, opened: Opened, until: Any) -> None:
    owner, other = await opened(api), await opened(api)
    lease = await owner.lease(1)
    await owner.put("a/1", b"x", lease=lease)
    reader = Reader(other.watch("a/"))
    await until(lambda: reader.synced)
    await api.stop()
    await until(lambda: not owner.status().connected and not other.status().connected)
    with pytest.raises(UnavailableError):
        await other.list("a/")
    await until(lambda: other.status().stale_for_s > 1.5)
    assert reader.view == {"a/1": b"x"}
    await api.start()
    await until(lambda: reader.synced == 2 and owner.status().connected)
    await owner.put("a/2", b"y", lease=lease)
    await until(lambda: reader.view == {"a/1": b"x", "a/2": b"y"})
    assert reader.deleted == []


async def test_cluster_made_anew_is_filled_again_and_no_watch_flickers(api: Any, opened: Opened, until: Any) -> None:
    owner, other = await opened(api), await opened(api)
    lease = await owner.lease(2)
    for number in range(10):
        await owner.put(f"a/{number}", b"x", lease=lease)
    await owner.compare_and_set("leader", b"owner", expected=None, lease=lease)
    reader = Reader(other.watch("a/"))
    await until(lambda: reader.synced)
    await api.stop()
    api.wipe()
    await until(lambda: not owner.status().connected and not other.status().connected)
    await api.start()
    await until(lambda: lease.valid and owner.status().connected and reader.synced >= 2)
    await until(lambda: len(api.names("configmaps")) == 10)
    assert reader.deleted == []
    assert await owner.get("leader") is None


async def test_watch_goes_on_where_the_server_ended_it(api: Any, opened: Opened, until: Any) -> None:
    discovery = await opened(api)
    reader = Reader(discovery.watch("a/"))
    await until(lambda: reader.synced and api.watches)
    for number in range(3):
        await discovery.put(f"a/{number}", b"x")
        api.end_watches()
    await until(lambda: len(reader.view) == 3)
    assert reader.synced == 1
    assert len(reader.events) == 4


async def test_bookmark_keeps_a_quiet_watch_from_becoming_too_old(api: Any, opened: Opened, until: Any) -> None:
    discovery = await opened(api)
    reader = Reader(discovery.watch("a/"))
    await until(lambda: reader.synced and api.watches)
    await discovery.put("b/elsewhere", b"x")
    api.bookmark()
    api.compact()
    api.end_watches()
    await discovery.put("a/1", b"x")
    await until(lambda: reader.view)
    assert reader.synced == 1


async def test_version_that_is_too_old_is_made_up_by_diff(api: Any, opened: Opened, until: Any) -> None:
    metrics = Metrics()
    near, far = await opened(api), await opened(api, metrics=metrics)
    for key in ("a/kept", "a/changed", "a/gone"):
        await near.put(key, b"old")
    reader = Reader(far.watch("a/"))
    await until(lambda: reader.synced and api.watches)
    await api.stop()
    records = {body["metadata"].get("annotations", {}).get("dynamo-key"): body for body in api.objects.values()}
    api.remove("configmaps", "serving", records["a/gone"]["metadata"]["name"])
    changed = {**records["a/changed"], "binaryData": {"value": base64.b64encode(b"new").decode()}}
    api.put("configmaps", "serving", changed)
    api.compact()
    await api.start()
    await until(lambda: reader.view == {"a/kept": b"old", "a/changed": b"new"})
    assert reader.deleted == ["a/gone"]
    assert metrics.registry.get_sample_value("dynamo_runtime_discovery_resyncs_total") == 1


def endpoint_slice(**ready: bool) -> dict[str, Any]:
    endpoints = [
        {"targetRef": {"kind": "Pod", "name": pod.replace("_", "-")}, "conditions": {"ready": is_ready}}
        for pod, is_ready in ready.items()
    ]
    labels = {"kubernetes.io/service-name": "workers"}
    return {"metadata": {"name": "workers-x", "labels": labels}, "endpoints": endpoints}


async def test_records_of_pods_that_are_not_ready_are_not_shown(api: Any, opened: Opened, until: Any) -> None:
    api.put("endpointslices", "serving", endpoint_slice(pod_1=True, pod_2=False))
    for pod in ("pod-1", "pod-2"):
        worker = await opened(api, pod_name=pod)
        await worker.put(f"a/{pod}", b"x", lease=await worker.lease())
    outside = await opened(api)
    await outside.put("a/outside", b"x", lease=await outside.lease())
    router = await opened(api, service="workers")
    reader = Reader(router.watch("a/"))
    await until(lambda: set(reader.view) == {"a/pod-1", "a/outside"})
    assert [record.key for record in await router.list("a/")] == ["a/outside", "a/pod-1"]
    api.put("endpointslices", "serving", endpoint_slice(pod_1=False, pod_2=True))
    await until(lambda: set(reader.view) == {"a/pod-2", "a/outside"})
    api.remove("endpointslices", "serving", "workers-x")
    await until(lambda: set(reader.view) == {"a/outside"})


async def test_two_deployments_in_one_namespace_do_not_meet(api: Any, opened: Opened) -> None:
    one, other = await opened(api, scope="blue"), await opened(api, scope="green")
    await one.put("v1/instances/x", b"blue")
    await other.put("v1/instances/x", b"green")
    assert [record.value for record in await one.list("v1/instances/")] == [b"blue"]
    assert [record.value for record in await other.list("")] == [b"green"]


async def test_rotated_token_is_read_and_a_wrong_one_is_refused(api: Any, opened: Opened, tmp_path: Path) -> None:
    api.token = "secret"
    (tmp_path / "token").write_text("secret\n")
    discovery = await opened(api, token_file=str(tmp_path / "token"))
    await discovery.put("a/1", b"x")
    with pytest.raises(UnauthenticatedError, match="token_file"):
        await opened(api, token="wrong")
    api.refuse = 403
    with pytest.raises(PermissionDeniedError, match="configmaps"):
        await discovery.list("a/")
    api.refuse = 500
    with pytest.raises(UnavailableError):
        await discovery.list("a/")
    api.refuse = 0


def kubeconfig(tmp_path: Path, **user: object) -> Path:
    config = {
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "serving"}}],
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:6443/"}}],
        "users": [{"name": "u", "user": user}],
    }
    path = tmp_path / "config"
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_kubeconfig_says_where_and_who(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    path = kubeconfig(tmp_path, tokenFile="token")
    target, _ = k8s_target(f"k8s://?kubeconfig={path}", {}, {"POD_NAME": "pod-1"})
    assert (target.server, target.namespace) == ("http://127.0.0.1:6443", "serving")
    assert target.options.token_file == str(tmp_path / "token")
    assert target.options.pod_name == "pod-1"


def test_certificates_within_a_kubeconfig_are_used(tmp_path: Path, authority: Any) -> None:
    cert, key = authority.issue("worker", to="k8s-client")
    data = {
        "client-certificate-data": base64.b64encode(cert.read_bytes()).decode(),
        "client-key-data": base64.b64encode(key.read_bytes()).decode(),
    }
    target, _ = k8s_target(f"k8s:///other?kubeconfig={kubeconfig(tmp_path, **data)}", {}, {})
    assert target.options.tls_cert == cert.read_text()
    assert target.namespace == "other"
    before = {path.name for path in Path(tempfile.gettempdir()).glob("dynamo-*.pem")}
    target.options.files.client_context()
    assert {path.name for path in Path(tempfile.gettempdir()).glob("dynamo-*.pem")} <= before
    assert "PRIVATE" not in str(_refused(target.options.files))


def _refused(files: TlsFiles) -> ConfigurationError:
    """Return what is said of a certificate whose key is another's."""
    with pytest.raises(ConfigurationError) as caught:
        TlsFiles(files.ca_file, files.key_file, files.key_file).check()
    return caught.value


@pytest.mark.parametrize(
    ("url", "user", "named"),
    [
        ("k8s://", {}, "no pod"),
        ("k8s://host/a/b", {}, "k8s://"),
        ("k8s://host/a?colour=red", {}, "colour"),
        ("k8s://host/a?scope=a/b", {}, "scope"),
        ("k8s://host/a?reap_interval_s=0", {}, "reap_interval_s"),
        ("k8s://?kubeconfig=/nowhere", {}, "/nowhere"),
        ("k8s://?kubeconfig=CONFIG&context=there", {}, "here"),
        ("k8s://?kubeconfig=CONFIG", {"exec": {"command": "login"}}, "token_file"),
        ("k8s://?kubeconfig=CONFIG", {"client-key-data": "%%%"}, "base64"),
        ("k8s://?kubeconfig=CONFIG", {"client-key-data": "bm8ga2V5"}, "holds no PEM"),
    ],
)
def test_wrong_urls_say_what_is_wrong(tmp_path: Path, url: str, user: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        k8s_target(url.replace("CONFIG", str(kubeconfig(tmp_path, **user))), {}, {})
