"""A small Kubernetes API server over real HTTP: scale subresources, graphs, pods, versions, conflicts and refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from aiohttp import web

GRAPH_PATH = "/apis/nvidia.com/v1alpha1/namespaces/{namespace}/dynamographdeployments/{name}"


@dataclass
class Workload:
    replicas: int
    selector: str
    version: int = 1


@dataclass
class FakeKubernetes:
    """Holds objects of one namespace, ``default``."""

    workloads: dict[tuple[str, str], Workload] = field(default_factory=dict[tuple[str, str], Workload])
    graphs: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    pods: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    status: int = 200
    """Answer to everything."""
    before_write: Callable[[], None] = lambda: None
    writes: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    _runner: web.AppRunner | None = None
    url: str = ""

    async def start(self) -> None:
        app = web.Application(middlewares=[self._refuse])
        scale = "/apis/apps/v1/namespaces/default/{kind}/{name}/scale"
        app.add_routes(
            [
                web.get(scale, self._read_scale),
                web.patch(scale, self._write_scale),
                web.get(GRAPH_PATH, self._read_graph),
                web.patch(GRAPH_PATH, self._write_graph),
                web.get("/api/v1/namespaces/default/pods", self._list_pods),
            ]
        )
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        port = cast("tuple[str, int]", self._runner.addresses[0])[1]
        self.url = f"http://127.0.0.1:{port}"

    async def stop(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    def add(self, kind: str, name: str, replicas: int) -> Workload:
        self.workloads[kind, name] = Workload(replicas, f"app={name}")
        return self.workloads[kind, name]

    def add_pod(self, labels: dict[str, str], **status: Any) -> dict[str, Any]:
        metadata = {"name": f"pod-{len(self.pods)}", "labels": labels, "creationTimestamp": "2026-01-01T00:00:00Z"}
        self.pods.append({"metadata": metadata, "status": status})
        return self.pods[-1]

    @web.middleware
    async def _refuse(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.status != 200:
            return _failure(self.status)
        return await handler(request)

    async def _read_scale(self, request: web.Request) -> web.Response:
        found = self._workload(request)
        return _failure(404) if found is None else web.json_response(_scale(request.match_info["name"], found))

    async def _write_scale(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.before_write()
        found = self._workload(request)
        if found is None:
            return _failure(404)
        assert request.content_type == "application/merge-patch+json"
        if body["metadata"]["resourceVersion"] != str(found.version):
            return _failure(409)
        self.writes.append(body)
        found.replicas, found.version = body["spec"]["replicas"], found.version + 1
        return web.json_response(_scale(request.match_info["name"], found))

    async def _read_graph(self, request: web.Request) -> web.Response:
        found = self.graphs.get(request.match_info["name"])
        return _failure(404) if found is None else web.json_response(found)

    async def _write_graph(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.before_write()
        found = self.graphs[request.match_info["name"]]
        if body["metadata"]["resourceVersion"] != found["metadata"]["resourceVersion"]:
            return _failure(409)
        self.writes.append(body)
        for service, spec in body["spec"]["services"].items():
            found["spec"]["services"][service].update(spec)
        found["metadata"]["resourceVersion"] = str(int(found["metadata"]["resourceVersion"]) + 1)
        return web.json_response(found)

    async def _list_pods(self, request: web.Request) -> web.Response:
        wanted = dict(part.split("=") for part in request.query["labelSelector"].split(","))
        items = [pod for pod in self.pods if wanted.items() <= pod["metadata"]["labels"].items()]
        return web.json_response({"apiVersion": "v1", "kind": "PodList", "metadata": {}, "items": items})

    def _workload(self, request: web.Request) -> Workload | None:
        return self.workloads.get((request.match_info["kind"], request.match_info["name"]))


def graph(**services: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "nvidia.com/v1alpha1",
        "kind": "DynamoGraphDeployment",
        "metadata": {"name": "g", "namespace": "default", "resourceVersion": "7"},
        "spec": {"services": services},
    }


def condition(kind: str, status: str, **more: str) -> dict[str, str]:
    return {"type": kind, "status": status, **more}


def _scale(name: str, workload: Workload) -> dict[str, Any]:
    return {
        "apiVersion": "autoscaling/v1",
        "kind": "Scale",
        "metadata": {"name": name, "namespace": "default", "resourceVersion": str(workload.version)},
        "spec": {"replicas": workload.replicas},
        "status": {"replicas": workload.replicas, "selector": workload.selector},
    }


def _failure(status: int) -> web.Response:
    return web.json_response({"kind": "Status", "status": "Failure", "code": status}, status=status)
