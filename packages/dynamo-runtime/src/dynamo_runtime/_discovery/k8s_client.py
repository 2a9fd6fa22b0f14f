"""The Kubernetes API as far as discovery needs it: objects of three kinds, lists in pages, watches."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any, cast

import aiohttp

from dynamo_core.clock import Clock
from dynamo_core.errors import (
    BackendProtocolError,
    ConfigurationError,
    ConflictError,
    DynamoError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from dynamo_runtime._discovery.http import LOST, HttpConnections
from dynamo_runtime._discovery.k8s_options import K8sTarget
from dynamo_runtime._plane.timers import result_within

CONFIG_MAPS, LEASES, SLICES = "api/v1", "apis/coordination.k8s.io/v1", "apis/discovery.k8s.io/v1"
"""Groups of the three kinds, each of which has one kind that matters here."""

MERGE_PATCH = "application/merge-patch+json"
PAGE_OBJECTS = 500
WATCH_TIMEOUT_S = 300
"""Time after which a server is asked to end a watch, which then goes on where it was."""

_PLURALS = {CONFIG_MAPS: "configmaps", LEASES: "leases", SLICES: "endpointslices"}
_TOKEN_AGE_S = 60.0
_LIST_ATTEMPTS = 5


class K8sError(Exception):
    """The server's refusal of a call.

    Args:
        code: HTTP status.
        reason: The server's word for it: ``AlreadyExists``, ``Conflict``, ``Expired``.
        message: The server's text.
    """

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message


class K8sClient:
    """Calls to an API server.

    Args:
        target: Server, namespace and options.
        clock: Time.
    """

    def __init__(self, target: K8sTarget, clock: Clock) -> None:
        self._target = target
        self._options = target.options
        self._clock = clock
        self._connections = HttpConnections(clock)
        self._token = target.options.token
        self._token_read_at_s: float | None = None

    @property
    def server(self) -> str:
        """Base URL of the server."""
        return self._target.server

    async def close(self) -> None:
        """Drop all connections; streams end as lost. Idempotent."""
        await self._connections.close()

    async def create(self, kind: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Create an object. Raises ``K8sError`` 409 if it is there."""
        return await self._call("POST", self._path(kind), body=body)

    async def replace(self, kind: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Replace an object; a ``resourceVersion`` in it must be the present one."""
        return await self._call("PUT", self._path(kind, body["metadata"]["name"]), body=body)

    async def patch(self, kind: str, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Merge into an object."""
        return await self._call("PATCH", self._path(kind, name), body=body, content_type=MERGE_PATCH)

    async def get(self, kind: str, name: str) -> dict[str, Any] | None:
        """Return an object, or None."""
        try:
            return await self._call("GET", self._path(kind, name))
        except K8sError as error:
            if error.code == 404:
                return None
            raise

    async def delete(self, kind: str, name: str, *, version: str = "") -> bool:
        """Delete an object, with a ``version`` only at that one; return whether it was there."""
        body: dict[str, Any] = {"kind": "DeleteOptions", "apiVersion": "v1"}
        if version:
            body["preconditions"] = {"resourceVersion": version}
        try:
            await self._call("DELETE", self._path(kind, name), body=body)
        except K8sError as error:
            if error.code == 404:
                return False
            raise
        return True

    async def delete_all(self, kind: str, selector: str) -> None:
        """Delete all objects that have the labels."""
        await self._call("DELETE", self._path(kind), params={"labelSelector": selector})

    async def list(self, kind: str, selector: str) -> tuple[list[dict[str, Any]], int]:
        """Return the objects that have the labels as they were at one version, and that version.

        Raises:
            K8sError: the server refuses.
            UnavailableError: if it cannot be reached.
        """
        for _ in range(_LIST_ATTEMPTS):
            try:
                return await self._pages(kind, selector)
            except K8sError as error:
                # The version of the first page may be compacted before the last one is read.
                if error.code != 410:
                    raise
        raise UnavailableError("objects change faster than they can be listed", reason="discovery.unavailable")

    async def watch(self, kind: str, selector: str, version: int) -> AsyncGenerator[dict[str, Any], None]:
        """Yield events after a version, bookmarks among them, until the server ends the watch.

        Raises:
            K8sError: 410 if the version is too old; otherwise why the server refuses.
            UnavailableError: if it is lost.
        """
        params = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "labelSelector": selector,
            "resourceVersion": str(version),
            "timeoutSeconds": str(WATCH_TIMEOUT_S),
        }
        try:
            response = await self._send("GET", self._path(kind), params=params)
            async with contextlib.aclosing(self._connections.lines(response)) as lines:
                async for line in lines:
                    event = _object(line)
                    if event.get("type") == "ERROR":
                        raise _refusal(int(event["object"].get("code", 500)), event["object"])
                    yield event
        except LOST as error:
            raise self._unreachable(error) from error

    async def _pages(self, kind: str, selector: str) -> tuple[list[dict[str, Any]], int]:
        found: list[dict[str, Any]] = []
        params = {"labelSelector": selector, "limit": str(PAGE_OBJECTS)}
        while True:
            page = await self._call("GET", self._path(kind), params=params)
            found += page.get("items") or []
            if not page["metadata"].get("continue"):
                return found, int(page["metadata"]["resourceVersion"])
            params["continue"] = page["metadata"]["continue"]

    def _path(self, kind: str, name: str = "") -> str:
        path = f"{kind}/namespaces/{self._target.namespace}/{_PLURALS[kind]}"
        return f"{path}/{name}" if name else path

    async def _call(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        try:
            return await result_within(
                self._clock, self._options.request_timeout_s, self._exchange(method, path, **more)
            )
        except LOST as error:
            raise self._unreachable(error) from error

    async def _exchange(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        async with await self._send(method, path, **more) as response:
            return _object(await response.read())

    async def _send(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
    ) -> aiohttp.ClientResponse:
        headers = {"content-type": content_type, "accept": "application/json"}
        if token := self._present_token():
            headers["authorization"] = f"Bearer {token}"
        secure = self.server.startswith("https:")
        session = self._connections.session(self._options.files.client_context if secure else None)
        response = await session.request(
            method,
            f"{self.server}/{path}",
            params=params,
            data=None if body is None else json.dumps(body, separators=(",", ":")),
            headers=headers,
            server_hostname=self._options.tls_server_name or None,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._options.request_timeout_s),
        )
        if response.status >= 300:
            async with response:
                raise _refused(response.status, await response.read())
        return response

    def _present_token(self) -> str:
        options, now_s = self._options, self._clock.monotonic()
        aged = self._token_read_at_s is None or now_s - self._token_read_at_s >= _TOKEN_AGE_S
        if options.token_file and aged:
            # The kubelet rotates it; what was read last does until it can be read again.
            with contextlib.suppress(OSError):
                self._token = Path(options.token_file).read_text(encoding="utf-8").strip()
                self._token_read_at_s = now_s
        return self._token

    def _unreachable(self, error: Exception) -> UnavailableError:
        return UnavailableError(
            f"the Kubernetes API at {self.server} cannot be reached: {error}",
            reason="discovery.unavailable",
            diagnostic=f"{type(error).__name__}: {error}",
        )


def as_discovery_error(error: K8sError) -> DynamoError:
    """Return the typed form of a refusal that the caller of a discovery plane gets."""
    if error.code == 401:
        return UnauthenticatedError(f"Kubernetes refuses the token: {error.message}; give another token_file")
    if error.code == 403:
        return PermissionDeniedError(
            f"Kubernetes denies this: {error.message}; "
            "grant the service account configmaps, leases and endpointslices in this namespace"
        )
    if error.code == 404:
        return NotFoundError(f"Kubernetes does not know this: {error.message}; create the namespace")
    if error.code == 409:
        return ConflictError(f"Kubernetes: {error.message}")
    return ConfigurationError(f"Kubernetes refuses the call: {error.message}")


def _refused(status: int, data: bytes) -> Exception:
    try:
        return _refusal(status, _object(data))
    except BackendProtocolError:
        return UnavailableError(f"the Kubernetes API answers HTTP {status}", reason="discovery.unavailable")


def _refusal(status: int, found: Mapping[str, Any]) -> Exception:
    message = str(found.get("message") or f"HTTP {status}")
    if status == 429 or status >= 500:
        return UnavailableError(f"the Kubernetes API is overloaded: {message}", reason="discovery.unavailable")
    return K8sError(status, str(found.get("reason", "")), message)


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError as error:
        raise BackendProtocolError(f"the server is no Kubernetes API: {error}") from error
    if not isinstance(found, dict):
        raise BackendProtocolError("the server is no Kubernetes API: it answers no JSON object")
    return cast("dict[str, Any]", found)
