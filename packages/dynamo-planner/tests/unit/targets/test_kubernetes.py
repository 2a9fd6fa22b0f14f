"""The Kubernetes target against an API server that speaks real HTTP."""

from __future__ import annotations

import asyncio
import base64
import importlib
import importlib.util
import ssl
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from dynamo_core import plugins
from dynamo_core.errors import (
    ConfigurationError,
    ConflictError,
    DynamoError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    UnavailableError,
)
from dynamo_core.planning import PoolState, ScalingTarget
from dynamo_core.testing import FakeClock, ScalingTargetConformance
from dynamo_planner._targets.kubernetes import KubernetesOptions, KubernetesTarget
from dynamo_planner._targets.pods import pool_of

# The fake is a file beside this one, which pytest's import mode does not put on the path.
_spec = importlib.util.spec_from_file_location("fake_kubernetes", Path(__file__).with_name("fake_kubernetes.py"))
assert _spec is not None
assert _spec.loader is not None
fakes: Any = importlib.util.module_from_spec(_spec)
sys.modules["fake_kubernetes"] = fakes
_spec.loader.exec_module(fakes)

READY = {"conditions": [fakes.condition("Ready", "True", lastTransitionTime="2026-01-01T00:00:40Z")]}
UNSCHEDULABLE = {
    "phase": "Pending",
    "conditions": [fakes.condition("PodScheduled", "False", reason="Unschedulable", message="0/4 nodes have a GPU")],
}


@pytest.fixture
async def server() -> AsyncIterator[Any]:
    fake = fakes.FakeKubernetes()
    await fake.start()
    yield fake
    await fake.stop()


async def connected(server: Any, **options: Any) -> KubernetesTarget:
    target = KubernetesTarget(KubernetesOptions(api_url=server.url, **options))
    await target.start()
    return target


class _Owned(KubernetesTarget):
    """Stops its API server when it is closed."""

    server: Any = None

    async def close(self) -> None:
        await super().close()
        if self.server is not None:
            await self.server.stop()
            self.server = None


class TestKubernetes(ScalingTargetConformance):
    async def make_target(self, replicas: Mapping[str, int]) -> ScalingTarget:
        server = fakes.FakeKubernetes()
        await server.start()
        for role, count in replicas.items():
            server.add("deployments", role, count)
        target = _Owned(KubernetesOptions(api_url=server.url, roles={role: f"deployment/{role}" for role in replicas}))
        target.server = server
        return target


async def test_a_stateful_set_is_scaled_through_its_subresource(server: Any) -> None:
    workload = server.add("statefulsets", "vllm", 2)
    target = await connected(server, roles={"worker": "statefulset/vllm"})
    await target.scale({"worker": 5})
    await target.scale({"worker": 5})
    assert workload.replicas == 5
    assert server.writes == [{"metadata": {"resourceVersion": "1"}, "spec": {"replicas": 5}}]
    await target.close()


async def test_pools_come_from_the_pods(server: Any) -> None:
    server.add("deployments", "vllm", 6)
    labels = {"app": "vllm"}
    server.add_pod(labels, **READY)
    server.add_pod(labels, **READY)
    server.add_pod(labels, **UNSCHEDULABLE)
    server.add_pod(labels, containerStatuses=[_waiting("CrashLoopBackOff")])
    server.add_pod(labels, **READY)["metadata"]["deletionTimestamp"] = "2026-01-01T01:00:00Z"
    server.add_pod({"app": "other"}, **READY)
    target = await connected(server, roles={"worker": "deployment/vllm"})
    pools = await target.state()
    # Six are asked for: two serve, one crashes, one finds no node, and two have no pod yet.
    assert pools == {"worker": PoolState(ready=2, starting=3, draining=1, desired=6, failed=1, startup_s=40.0)}
    await target.close()


def test_what_keeps_pods_from_getting_ready_is_told() -> None:
    pods = [
        {"metadata": {}, "status": UNSCHEDULABLE},
        {"metadata": {}, "status": UNSCHEDULABLE},
        {"metadata": {}, "status": {"containerStatuses": [_waiting("ImagePullBackOff")]}},
        {"metadata": {}, "status": {"phase": "Failed", "reason": "Evicted"}},
    ]
    state, trouble = pool_of(pods, 4)
    assert trouble == "1 x Evicted; 1 x ImagePullBackOff; 2 x Unschedulable: 0/4 nodes have a GPU"
    assert (state.starting, state.failed, state.startup_s) == (2, 2, None)


def _waiting(reason: str) -> dict[str, Any]:
    container = {"name": "c", "image": "i", "imageID": "", "ready": False, "restartCount": 9}
    return {**container, "state": {"waiting": {"reason": reason}}}


async def test_the_services_of_a_graph_are_found_and_scaled(server: Any) -> None:
    server.graphs["g"] = fakes.graph(
        Frontend={"componentType": "frontend", "replicas": 1},
        Prefill={"componentType": "worker", "subComponentType": "prefill", "replicas": 2},
        Decode={"componentType": "worker", "subComponentType": "decode"},
    )
    labels = {"nvidia.com/dynamo-graph-deployment-name": "g", "nvidia.com/dynamo-component": "Prefill"}
    server.add_pod(labels, **READY)
    target = await connected(server, graph="g")
    pools = await target.state()
    assert {role: (pool.ready, pool.desired) for role, pool in pools.items()} == {"prefill": (1, 2), "decode": (0, 1)}
    await target.scale({"prefill": 3, "decode": 4})
    services = server.graphs["g"]["spec"]["services"]
    assert (services["Prefill"]["replicas"], services["Decode"]["replicas"]) == (3, 4)
    assert services["Frontend"]["replicas"] == 1
    del services["Decode"]
    with pytest.raises(NotFoundError, match="no service 'Decode'"):
        await target.state()
    await target.close()


async def test_a_writer_that_lost_reads_again_and_gives_up_in_the_end(server: Any) -> None:
    workload = server.add("deployments", "vllm", 1)
    target = await connected(server, roles={"worker": "deployment/vllm"})
    lost = iter([True, True])

    def once_more() -> None:
        workload.version += next(lost, False)

    server.before_write = once_more
    await target.scale({"worker": 3})
    assert (workload.replicas, workload.version) == (3, 4)

    def always() -> None:
        workload.version += 1

    server.before_write = always
    with pytest.raises(ConflictError, match="4 times in a row"):
        await target.scale({"worker": 2})
    assert workload.replicas == 3
    await target.close()


@pytest.mark.parametrize(
    ("status", "error", "told"),
    [
        (401, PermissionDeniedError, "renew its token"),
        (403, PermissionDeniedError, "allow get and patch"),
        (404, NotFoundError, "check namespace"),
        (422, InvalidRequestError, "refuses"),
        (429, UnavailableError, "failed"),
        (500, UnavailableError, "failed"),
    ],
)
async def test_refusals_keep_their_meaning(server: Any, status: int, error: type[DynamoError], told: str) -> None:
    server.add("deployments", "vllm", 1)
    target = await connected(server, roles={"worker": "deployment/vllm"}, timeout_s=5)
    server.status = status
    with pytest.raises(error, match=told):
        await target.state()
    await target.close()


async def test_a_server_that_is_gone_is_unavailable(server: Any) -> None:
    gone = fakes.FakeKubernetes()
    await gone.start()
    target = await connected(gone, roles={"worker": "deployment/vllm"})
    await gone.stop()
    with pytest.raises(UnavailableError, match="cannot be reached"):
        await target.state()
    await target.close()
    await target.close()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "needs roles or graph"),
        ({"rolls": {}}, "rolls"),
        ({"roles": {"worker": 3}}, "roles"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        plugins.load("scaling_targets", "kubernetes")(cast("Any", None), options)


@pytest.mark.parametrize(
    ("services", "told"),
    [
        ({"Frontend": {"componentType": "frontend"}}, "no service with a subComponentType"),
        ({"A": {"componentType": "worker"}, "B": {"componentType": "worker"}}, "two services"),
    ],
)
async def test_a_graph_without_clear_roles_is_refused(server: Any, services: dict[str, Any], told: str) -> None:
    server.graphs["g"] = fakes.graph(**services)
    with pytest.raises(ConfigurationError, match=told):
        await connected(server, graph="g")


async def test_a_role_of_another_kind_and_missing_credentials_are_refused(server: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="deployment/NAME"):
        await connected(server, roles={"worker": "daemonset/x"})
    target = KubernetesTarget(KubernetesOptions(roles={"worker": "deployment/x"}, kubeconfig=str(tmp_path / "none")))
    with pytest.raises(ConfigurationError, match="no Kubernetes credentials"):
        await target.start()


async def seen(target: KubernetesTarget, ready: int) -> PoolState:
    """Look until so many pods are ready: the watch's news take a moment."""
    async with asyncio.timeout(30):
        while True:
            pool = (await target.state())["worker"]
            if pool.ready == ready:
                return pool
            await asyncio.sleep(0.01)


async def test_pods_are_listed_once_and_then_watched(server: Any) -> None:
    server.add("deployments", "vllm", 2)
    labels = {"app": "vllm"}
    first = server.add_pod(labels, **READY)
    target = await connected(server, roles={"worker": "deployment/vllm"})
    assert (await target.state())["worker"].ready == 1
    await server.watched(1)
    second = server.add_pod(labels, **UNSCHEDULABLE)
    server.add_pod({"app": "other"}, **READY)
    server.change_pod(second, **READY)
    assert (await seen(target, 2)).starting == 0
    server.remove_pod(first)
    assert (await seen(target, 1)).starting == 1
    assert (server.lists, server.watches) == (1, 1)
    await target.close()
    assert not target._watches


async def test_a_watch_that_ends_goes_on_where_it_was(server: Any) -> None:
    server.add("deployments", "vllm", 1)
    target = await connected(server, roles={"worker": "deployment/vllm"})
    await target.state()
    await server.watched(1)
    pod = server.add_pod({"app": "vllm"}, **READY)
    await seen(target, 1)
    server.bookmark()
    server.end_watches()
    await server.watched(2)
    server.remove_pod(pod)
    await seen(target, 0)
    assert server.lists == 1
    await target.close()


async def test_a_version_that_is_gone_makes_for_a_new_list(server: Any) -> None:
    server.add("deployments", "vllm", 1)
    target = await connected(server, roles={"worker": "deployment/vllm"})
    await target.state()
    await server.watched(1)
    server.add_pod({"app": "vllm"}, **READY)
    await seen(target, 1)
    server.watch_status = 500
    server.end_watches()
    server.pods.clear()
    await seen(target, 0)
    assert server.lists >= 2
    server.watch_status = 200
    watches = server.watches
    server.add_pod({"app": "vllm"}, **READY)
    await seen(target, 1)
    await server.watched(watches + 1)
    server.compact()
    server.version += 5
    server.compact()
    server.end_watches()
    server.pods.clear()
    await seen(target, 0)
    await target.close()


async def test_a_watch_that_missed_a_change_is_repaired_in_time(server: Any) -> None:
    clock = FakeClock()
    server.add("deployments", "vllm", 1)
    options = KubernetesOptions(api_url=server.url, roles={"worker": "deployment/vllm"}, resync_s=600)
    target = KubernetesTarget(options, clock)
    await target.start()
    assert (await target.state())["worker"].ready == 0
    # A change that no watch tells of.
    server.pods.append({"metadata": {"name": "x", "labels": {"app": "vllm"}}, "status": READY})
    await clock.advance(599)
    assert (await target.state())["worker"].ready == 0
    await clock.advance(2)
    assert (await target.state())["worker"].ready == 1
    assert server.lists == 2
    await target.close()


async def test_an_account_that_may_not_watch_lists_every_time(server: Any) -> None:
    server.watch_status = 403
    server.add("deployments", "vllm", 1)
    target = await connected(server, roles={"worker": "deployment/vllm"})
    for count in (0, 1, 2):
        await seen(target, count)
        server.add_pod({"app": "vllm"}, **READY)
    assert server.watches == 0
    assert server.lists >= 3
    await target.close()


async def test_what_is_no_event_ends_the_watch_and_is_listed_anew(server: Any) -> None:
    server.add("deployments", "vllm", 1)
    target = await connected(server, roles={"worker": "deployment/vllm"})
    await target.state()
    await server.watched(1)
    (queue,) = server.open
    server.pods.append({"metadata": {"name": "x", "labels": {"app": "vllm"}}, "status": READY})
    queue.put_nowait((1, "ODD", {"metadata": {"labels": {"app": "vllm"}}}))
    await seen(target, 1)
    assert server.lists == 2
    await target.close()


def kubeconfig(url: str, secret: str) -> str:
    data = base64.b64encode(secret.encode()).decode()
    return f"""\
apiVersion: v1
kind: Config
current-context: here
contexts: [{{name: here, context: {{cluster: here, user: me}}}}]
clusters: [{{name: here, cluster: {{server: "{url}", certificate-authority-data: "{data}"}}}}]
users: [{{name: me, user: {{token: t}}}}]
"""


async def test_certificates_of_a_kubeconfig_leave_no_file(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = Path(ssl.get_default_verify_paths().cafile or "")
    if not certificate.is_file():
        certificate = Path(importlib.import_module("certifi").where())
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    file = tmp_path / "config"
    file.write_text(kubeconfig(server.url, certificate.read_text()))
    server.add("deployments", "vllm", 3)
    for _ in range(2):
        target = KubernetesTarget(KubernetesOptions(kubeconfig=str(file), roles={"worker": "deployment/vllm"}))
        await target.start()
        assert (await target.state())["worker"].desired == 3
        assert list(folder.iterdir()) == []
        await target.close()
