"""A Kubernetes API server for tests: objects in memory behind the real HTTP protocol.

Lists in pages at one version, watches with bookmarks and a limited history (410 Gone), optimistic concurrency, writes
that change nothing and keep their version, merge patches, preconditions, deletion of what an owner leaves, tokens.
"""

from __future__ import annotations

import asyncio
import copy
import json
import uuid
from collections import deque
from typing import Any

from aiohttp import web

PREFIXES = {
    "configmaps": "/api/v1",
    "leases": "/apis/coordination.k8s.io/v1",
    "endpointslices": "/apis/discovery.k8s.io/v1",
}
Key = tuple[str, str, str]


class ApiServer:
    """The server.

    Attributes:
        port: Where it listens, also after a restart.
        token: What callers must show; empty takes anyone.
        history: Changes that a watch may be behind.
        objects: Objects by kind, namespace and name.
        refuse: Status that every call gets; 0 serves.
        watches: Watches that are open.
    """

    def __init__(self, *, token: str = "", history: int = 1000, page: int = 0) -> None:
        self.port = 0
        self.token = token
        self.refuse = 0
        self.page = page
        self.objects: dict[Key, dict[str, Any]] = {}
        self.version = 100
        self.watches: set[asyncio.Queue[dict[str, Any] | None]] = set()
        self.requests: list[tuple[str, str]] = []
        self._events: deque[tuple[int, str, dict[str, Any]]] = deque(maxlen=history)
        self._oldest = self.version
        self._runner: web.AppRunner | None = None

    @property
    def host_port(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen."""
        application = web.Application(middlewares=[self._guard])
        for kind, prefix in PREFIXES.items():
            path = f"{prefix}/namespaces/{{namespace}}/{{kind:{kind}}}"
            application.router.add_get(path, self._list)
            application.router.add_post(path, self._create)
            application.router.add_delete(path, self._delete_all)
            application.router.add_get(path + "/{name}", self._get)
            application.router.add_put(path + "/{name}", self._replace)
            application.router.add_patch(path + "/{name}", self._patch)
            application.router.add_delete(path + "/{name}", self._delete)
        self._runner = web.AppRunner(application, shutdown_timeout=0.1, handle_signals=False)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Stop listening and end all watches; objects stay."""
        self.end_watches()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def end_watches(self) -> None:
        """End all watches as after their time."""
        for queue in self.watches:
            queue.put_nowait(None)

    def bookmark(self) -> None:
        """Tell all watches the present version."""
        for queue in self.watches:
            metadata = {"resourceVersion": str(self.version)}
            queue.put_nowait({"type": "BOOKMARK", "object": {"metadata": metadata}})

    def compact(self) -> None:
        """Forget all history."""
        self._events.clear()
        self._oldest = self.version

    def wipe(self) -> None:
        """Forget everything, as a cluster that was made anew."""
        self.objects.clear()
        self.version = 100
        self.compact()

    def names(self, kind: str) -> list[str]:
        """Return the names of a kind's objects."""
        return sorted(name for each, _, name in self.objects if each == kind)

    def put(self, kind: str, namespace: str, body: dict[str, Any]) -> None:
        """Write an object from outside."""
        key = (kind, namespace, body["metadata"]["name"])
        known = key in self.objects
        self._store(key, body, "MODIFIED" if known else "ADDED")

    def remove(self, kind: str, namespace: str, name: str) -> None:
        """Delete an object from outside, and what it owned."""
        self._remove((kind, namespace, name))

    # Handlers.

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.requests.append((request.method, request.path_qs))
        if self.refuse:
            return failure(self.refuse, "Refused", "refused by the test")
        if self.token and request.headers.get("authorization") != f"Bearer {self.token}":
            return failure(401, "Unauthorized", "Unauthorized")
        return await handler(request)

    async def _list(self, request: web.Request) -> web.StreamResponse:
        if request.query.get("watch") == "true":
            return await self._watch(request)
        found = [
            body
            for key, body in sorted(self.objects.items(), key=lambda item: item[0])
            if key[:2] == scope_of(request) and selected(body, request.query.get("labelSelector", ""))
        ]
        start, present = 0, self.version
        if token := request.query.get("continue"):
            start, present = (int(part) for part in token.split("."))
            if present < self._oldest:
                return failure(410, "Expired", "The provided continue parameter is too old")
        limit = self.page or int(request.query.get("limit", "0")) or len(found)
        metadata = {"resourceVersion": str(present)}
        if start + limit < len(found):
            metadata["continue"] = f"{start + limit}.{present}"
        return web.json_response({"kind": "List", "metadata": metadata, "items": found[start : start + limit]})

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "application/json"})
        await response.prepare(request)
        start = int(request.query["resourceVersion"])
        if start < self._oldest:
            status = status_body(410, "Expired", f"too old resource version: {start} ({self._oldest})")
            await response.write(json.dumps({"type": "ERROR", "object": status}).encode() + b"\n")
            return response
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        for number, kind, event in self._events:
            if number > start:
                self._offer(queue, kind, event, request)
        self.watches.add(queue)
        queue.__dict__["wants"] = request
        try:
            while (event := await queue.get()) is not None:
                await response.write(json.dumps(event).encode() + b"\n")
        finally:
            self.watches.discard(queue)
        return response

    async def _create(self, request: web.Request) -> web.Response:
        body = await request.json()
        key = (*scope_of(request), body["metadata"]["name"])
        if key in self.objects:
            return failure(409, "AlreadyExists", f"{key[0]} {key[2]} already exists")
        return web.json_response(self._store(key, body, "ADDED"), status=201)

    async def _get(self, request: web.Request) -> web.Response:
        found = self.objects.get(key_of(request))
        return web.json_response(found) if found is not None else missing(request)

    async def _replace(self, request: web.Request) -> web.Response:
        return self._change(request, await request.json())

    async def _patch(self, request: web.Request) -> web.Response:
        assert request.content_type == "application/merge-patch+json"
        known = self.objects.get(key_of(request))
        if known is None:
            return missing(request)
        return self._change(request, merged(known, await request.json()))

    async def _delete(self, request: web.Request) -> web.Response:
        key = key_of(request)
        known = self.objects.get(key)
        if known is None:
            return missing(request)
        options = await request.json() if request.can_read_body else {}
        wanted = options.get("preconditions", {}).get("resourceVersion")
        if wanted and wanted != known["metadata"]["resourceVersion"]:
            return failure(409, "Conflict", "the object has been modified")
        self._remove(key)
        return web.json_response(status_body(200, "", ""))

    async def _delete_all(self, request: web.Request) -> web.Response:
        for key, body in list(self.objects.items()):
            if key[:2] == scope_of(request) and selected(body, request.query.get("labelSelector", "")):
                self._remove(key)
        return web.json_response({"kind": "List", "items": []})

    # Objects.

    def _change(self, request: web.Request, body: dict[str, Any]) -> web.Response:
        key = key_of(request)
        known = self.objects.get(key)
        if known is None:
            return missing(request)
        wanted = body["metadata"].get("resourceVersion")
        if wanted and wanted != known["metadata"]["resourceVersion"]:
            return failure(
                409, "Conflict", "the object has been modified; please apply your changes to the latest version"
            )
        body["metadata"] |= {name: known["metadata"][name] for name in ("uid", "resourceVersion", "namespace")}
        if body == known:
            return web.json_response(known)
        return web.json_response(self._store(key, body, "MODIFIED"))

    def _store(self, key: Key, body: dict[str, Any], change: str) -> dict[str, Any]:
        self.version += 1
        known = self.objects.get(key, {"metadata": {}})["metadata"]
        body = copy.deepcopy(body)
        body["metadata"] |= {
            "uid": known.get("uid") or str(uuid.uuid4()),
            "namespace": key[1],
            "resourceVersion": str(self.version),
        }
        self.objects[key] = body
        self._tell(key, change, body)
        return body

    def _remove(self, key: Key) -> None:
        body = self.objects.pop(key, None)
        if body is None:
            return
        self.version += 1
        body = copy.deepcopy(body)
        body["metadata"]["resourceVersion"] = str(self.version)
        self._tell(key, "DELETED", body)
        for other, found in list(self.objects.items()):
            owners = found["metadata"].get("ownerReferences", [])
            if any(owner["uid"] == body["metadata"]["uid"] for owner in owners):
                self._remove(other)

    def _tell(self, key: Key, change: str, body: dict[str, Any]) -> None:
        event = {"type": change, "object": body}
        if len(self._events) == self._events.maxlen:
            self._oldest = self._events[0][0]
        self._events.append((self.version, key[0], event))
        for queue in self.watches:
            self._offer(queue, key[0], event, queue.__dict__["wants"])

    def _offer(self, queue: Any, kind: str, event: dict[str, Any], request: web.Request) -> None:
        wanted = scope_of(request) == (kind, event["object"]["metadata"]["namespace"])
        if wanted and selected(event["object"], request.query.get("labelSelector", "")):
            queue.put_nowait(event)


def scope_of(request: web.Request) -> tuple[str, str]:
    return request.match_info["kind"], request.match_info["namespace"]


def key_of(request: web.Request) -> Key:
    return (*scope_of(request), request.match_info["name"])


def selected(body: dict[str, Any], selector: str) -> bool:
    labels = body["metadata"].get("labels", {})
    return all(
        labels.get(name) == value for name, _, value in (part.partition("=") for part in selector.split(",") if part)
    )


def merged(known: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    found = copy.deepcopy(known)
    for name, value in patch.items():
        if value is None:
            found.pop(name, None)
        elif isinstance(value, dict) and isinstance(found.get(name), dict):
            found[name] = merged(found[name], value)
        else:
            found[name] = value
    return found


def status_body(code: int, reason: str, message: str) -> dict[str, Any]:
    return {"kind": "Status", "code": code, "reason": reason, "message": message}


def failure(code: int, reason: str, message: str) -> web.Response:
    return web.json_response(status_body(code, reason, message), status=code)


def missing(request: web.Request) -> web.Response:
    return failure(404, "NotFound", f"{request.match_info['kind']} {request.match_info['name']} not found")
