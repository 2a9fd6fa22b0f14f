"""A small Kubernetes API server over real HTTP: scale subresources, graphs, versions, conflicts and refusals.

Pods are listed at a version and watched from one, with bookmarks, a bounded history (410 Gone) and watches that end.
"""

from __future__ import annotations

import asyncio
import json
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
    lists: int = 0
    """Lists of pods."""
    watches: int = 0
    """Watches of pods that were opened."""
    watch_status: int = 200
    """Answer to a watch."""
    version: int = 100
    compacted: int = 0
    """Versions before this one are gone."""
    events: list[tuple[int, str, dict[str, Any]]] = field(default_factory=list[tuple[int, str, dict[str, Any]]])
    open: set[asyncio.Queue[tuple[int, str, dict[str, Any]] | None]] = field(
        default_factory=set[asyncio.Queue[tuple[int, str, dict[str, Any]] | None]]
    )
    watching: asyncio.Event = field(default_factory=asyncio.Event)
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
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        port = cast("tuple[str, int]", self._runner.addresses[0])[1]
        self.url = f"http://127.0.0.1:{port}"

    async def stop(self) -> None:
        self.end_watches()
        assert self._runner is not None
        await self._runner.cleanup()

    def add(self, kind: str, name: str, replicas: int) -> Workload:
        self.workloads[kind, name] = Workload(replicas, f"app={name}")
        return self.workloads[kind, name]

    def add_pod(self, labels: dict[str, str], **status: Any) -> dict[str, Any]:
        metadata = {"name": f"pod-{len(self.pods)}", "labels": labels, "creationTimestamp": "2026-01-01T00:00:00Z"}
        self.pods.append({"metadata": metadata, "status": status})
        self._changed("ADDED", self.pods[-1])
        return self.pods[-1]

    def change_pod(self, pod: dict[str, Any], **status: Any) -> None:
        pod["status"] = status
        self._changed("MODIFIED", pod)

    def remove_pod(self, pod: dict[str, Any]) -> None:
        self.pods.remove(pod)
        self._changed("DELETED", pod)

    def bookmark(self) -> None:
        self.version += 1
        self._told("BOOKMARK", {"kind": "Pod", "metadata": {"resourceVersion": str(self.version)}})

    def end_watches(self) -> None:
        for queue in self.open:
            queue.put_nowait(None)

    def compact(self) -> None:
        self.compacted, self.events = self.version, []

    async def watched(self, count: int) -> None:
        """Wait until so many watches were opened."""
        async with asyncio.timeout(30):
            while self.watches < count:
                self.watching.clear()
                await self.watching.wait()

    def _changed(self, kind: str, pod: dict[str, Any]) -> None:
        self.version += 1
        pod["metadata"]["resourceVersion"] = str(self.version)
        self.events.append((self.version, kind, json.loads(json.dumps(pod))))
        self._told(kind, self.events[-1][2])

    def _told(self, kind: str, found: dict[str, Any]) -> None:
        for queue in self.open:
            queue.put_nowait((self.version, kind, found))

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

    async def _list_pods(self, request: web.Request) -> web.StreamResponse:
        wanted = dict(part.split("=") for part in request.query["labelSelector"].split(","))
        if request.query.get("watch", "").lower() == "true":
            return await self._watch_pods(request, wanted)
        self.lists += 1
        items = [pod for pod in self.pods if wanted.items() <= pod["metadata"]["labels"].items()]
        metadata = {"resourceVersion": str(self.version)}
        return web.json_response({"apiVersion": "v1", "kind": "PodList", "metadata": metadata, "items": items})

    async def _watch_pods(self, request: web.Request, wanted: dict[str, str]) -> web.StreamResponse:
        if self.watch_status != 200:
            return _failure(self.watch_status)
        response = web.StreamResponse(headers={"content-type": "application/json"})
        await response.prepare(request)
        since = int(request.query["resourceVersion"])
        self.watches += 1
        if since < self.compacted:
            gone = {"kind": "Status", "status": "Failure", "reason": "Expired", "code": 410}
            await response.write(json.dumps({"type": "ERROR", "object": gone}).encode() + b"\n")
            return response
        queue: asyncio.Queue[tuple[int, str, dict[str, Any]] | None] = asyncio.Queue()
        for event in self.events:
            if event[0] > since:
                queue.put_nowait(event)
        self.open.add(queue)
        self.watching.set()
        try:
            while (event := await queue.get()) is not None:
                _, kind, found = event
                if kind == "BOOKMARK" or wanted.items() <= found["metadata"]["labels"].items():
                    line = json.dumps({"type": kind, "object": found}).encode() + b"\n"
                    # In two writes, as a line may come in any pieces.
                    await response.write(line[:40])
                    await response.write(line[40:])
        finally:
            self.open.discard(queue)
        return response

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
