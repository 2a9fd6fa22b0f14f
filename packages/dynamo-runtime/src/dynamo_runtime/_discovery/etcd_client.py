"""etcd over HTTP: the JSON form of its v3 API, which every etcd since 3.4 serves beside gRPC on the same port.

It needs no code generated from protocol buffers and runs on any event loop. 64-bit numbers are strings in it, keys and
values base64. A stream is one JSON object a line.
"""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any, cast

import aiohttp

from dynamo_core.clock import Clock
from dynamo_core.discovery import Record
from dynamo_core.errors import (
    BackendProtocolError,
    ConfigurationError,
    ConflictError,
    DynamoError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from dynamo_runtime._discovery.etcd_options import EtcdTarget
from dynamo_runtime._discovery.http import LOST, HttpConnections
from dynamo_runtime._plane.timers import result_within

INVALID, NOT_FOUND, DENIED, PRECONDITION, OUT_OF_RANGE, UNAVAILABLE, UNAUTHENTICATED = 3, 5, 7, 9, 11, 14, 16
"""Status codes of gRPC that matter here."""

_BAD_TOKEN = "invalid auth token"


class EtcdError(Exception):
    """The server's refusal of a call.

    Args:
        code: gRPC status.
        message: The server's text.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class EtcdClient:
    """Calls to whichever server of a cluster answers.

    Args:
        target: Servers and options.
        clock: Time.
    """

    def __init__(self, target: EtcdTarget, clock: Clock) -> None:
        self._servers = target.servers
        self._options = target.options
        self._clock = clock
        self._turn = 0
        self._token = ""
        self._connections = HttpConnections(clock)

    @property
    def server(self) -> str:
        """Base URL of the server in use."""
        return self._servers[self._turn % len(self._servers)]

    async def close(self) -> None:
        """Drop all connections; streams end as lost. Idempotent."""
        await self._connections.close()

    async def call(self, path: str, body: Mapping[str, Any], *, repeatable: bool = True) -> dict[str, Any]:
        """Send one call, to each server once until one answers.

        Args:
            path: Below ``/v3/``.
            body: The request message.
            repeatable: Whether the call may be sent again when it is not known what became of it.

        Raises:
            EtcdError: the server refuses.
            UnavailableError: if no server answers.
        """
        failure: Exception | None = None
        for _ in self._servers:
            server = self.server
            try:
                return await self._authenticated(path, body)
            except EtcdError as error:
                if error.code != UNAVAILABLE:
                    raise
                failure = error
            except LOST as error:
                failure = error
                # A call that never left may be sent again whatever it does.
                if not repeatable and not isinstance(error, aiohttp.ClientConnectorError):
                    break
            self._pass_over(server)
        raise self._unreachable(failure)

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Send a call and yield its answers until the server ends the stream.

        Raises:
            EtcdError: the server refuses.
            UnavailableError: if the server cannot be reached or is lost.
        """
        server = self.server
        try:
            response = await self._opened(path, body)
            async with contextlib.aclosing(self._connections.lines(response)) as lines:
                async for line in lines:
                    yield _result(_object(line))
        except LOST as error:
            self._pass_over(server)
            raise self._unreachable(error) from error

    def _pass_over(self, server: str) -> None:
        """Go to the next server, unless another call has done so already."""
        if self.server == server:
            self._turn += 1

    async def _opened(self, path: str, body: Mapping[str, Any]) -> aiohttp.ClientResponse:
        try:
            return await self._post(path, body)
        except EtcdError as error:
            if error.code != UNAUTHENTICATED and _BAD_TOKEN not in error.message:
                raise
            self._token = ""
            return await self._post(path, body)

    async def _authenticated(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return await self._once(path, body)
        except EtcdError as error:
            # Tokens end with time and with a restart of the server.
            if not self._token or (error.code != UNAUTHENTICATED and _BAD_TOKEN not in error.message):
                raise
            self._token = ""
            return await self._once(path, body)

    async def _once(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return await result_within(self._clock, self._options.request_timeout_s, self._exchange(path, body))

    async def _exchange(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        async with await self._post(path, body) as response:
            return _result(_object(await response.read()))

    async def _post(self, path: str, body: Mapping[str, Any]) -> aiohttp.ClientResponse:
        headers = {"content-type": "application/json"}
        if self._options.username and path != "auth/authenticate":
            headers["authorization"] = self._token or await self._authenticate()
        secure = self.server.startswith("https:")
        session = self._connections.session(self._options.files.client_context if secure else None)
        answered = session.post(
            f"{self.server}/v3/{path}",
            data=json.dumps(body, separators=(",", ":")),
            headers=headers,
            server_hostname=self._options.tls_server_name or None,
            # Limits are the callers', on their clock; a watch has none.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._options.request_timeout_s),
        )
        response = await answered
        if response.status != 200:
            async with response:
                raise _refusal(response.status, await response.read())
        return response

    async def _authenticate(self) -> str:
        body = {"name": self._options.username, "password": self._options.password}
        answer = await self._exchange("auth/authenticate", body)
        self._token = str(answer.get("token", ""))
        return self._token

    def _unreachable(self, error: Exception | None) -> UnavailableError:
        return UnavailableError(
            f"etcd at {', '.join(self._servers)} cannot be reached: {error or 'no answer'}",
            reason="discovery.unavailable",
            diagnostic=f"{type(error).__name__}: {error}",
        )


def as_discovery_error(error: EtcdError) -> DynamoError:
    """Return the typed form of a refusal that the caller of a discovery plane gets."""
    if error.code == UNAUTHENTICATED or "authentication failed" in error.message or "user name" in error.message:
        return UnauthenticatedError(f"etcd refuses the user: {error.message}; check username and password")
    if error.code == DENIED:
        return PermissionDeniedError(f"etcd denies this: {error.message}; grant the user's role these keys")
    if error.code == NOT_FOUND and "lease" in error.message:
        return ConflictError(f"etcd: {error.message}; create a new lease", reason="discovery.lease_ended")
    if error.code == INVALID:
        return ConfigurationError(f"etcd refuses the call: {error.message}")
    return UnavailableError(f"etcd refuses the call: {error.message}", reason="discovery.unavailable")


def text(key: str | bytes) -> str:
    """Return a key or value in the form that JSON takes."""
    return base64.b64encode(key.encode() if isinstance(key, str) else key).decode("ascii")


def scope(prefix: str) -> dict[str, str]:
    """Return the range of all keys under a prefix."""
    if not prefix:
        return {"key": text(b"\0"), "range_end": text(b"\0")}
    key = prefix.encode()
    # No key holds 0xff, which is not in UTF-8, so the last byte can always be raised.
    return {"key": text(key), "range_end": text(key[:-1] + bytes((key[-1] + 1,)))}


def record(kv: Mapping[str, str]) -> Record:
    """Return the record of a key-value pair.

    Raises:
        BackendProtocolError: if it is none.
    """
    try:
        key = base64.b64decode(kv["key"]).decode()
        return Record(key, base64.b64decode(kv.get("value", "")), int(kv["mod_revision"]))
    except (KeyError, ValueError) as error:
        raise BackendProtocolError(f"etcd holds a key that is no record's: {error}; delete it") from error


def next_key(kv: Mapping[str, str]) -> str:
    """Return the first key that may follow a pair's, in the form that JSON takes."""
    return text(base64.b64decode(kv["key"]) + b"\0")


def revision(answer: Mapping[str, Any]) -> int:
    """Return the store's revision that an answer's header tells."""
    return int(answer.get("header", {}).get("revision", 0))


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError as error:
        raise BackendProtocolError(f"the server is no etcd of version 3.4 or later: {error}") from error
    if not isinstance(found, dict):
        raise BackendProtocolError("the server is no etcd of version 3.4 or later: it answers no JSON object")
    return cast("dict[str, Any]", found)


def _result(found: dict[str, Any]) -> dict[str, Any]:
    if "error" in found:
        raise _error(found["error"] if isinstance(found["error"], dict) else found)
    # Streams wrap each message, single calls do not.
    return cast("dict[str, Any]", found.get("result", found))


def _refusal(status: int, data: bytes) -> EtcdError:
    try:
        return _error(_object(data))
    except BackendProtocolError:
        return EtcdError(UNAVAILABLE, f"HTTP status {status}")


def _error(found: Mapping[str, Any]) -> EtcdError:
    code = found.get("code", found.get("grpc_code", UNAVAILABLE))
    return EtcdError(int(code), str(found.get("message") or found.get("error") or "no reason given"))
