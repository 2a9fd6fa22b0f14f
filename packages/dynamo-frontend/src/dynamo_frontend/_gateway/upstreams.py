"""The engines behind a gateway: which are up, what they serve, which is taken next."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Collection
from typing import Any

import msgspec
import structlog

from dynamo_core.clock import Clock
from dynamo_core.errors import BackendProtocolError, DynamoError, NotFoundError, UnavailableError
from dynamo_frontend._gateway.connection import UpstreamPool

_log = structlog.get_logger(__name__)
_PROBE_TIMEOUT_S = 5.0
_MAX_LISTING_BYTES = 4 << 20


async def _nothing() -> None:
    """Follow nothing."""


class Upstream:
    """One engine."""

    def __init__(self, url: str, tls: ssl.SSLContext, api_key: str = "") -> None:
        self.url = url.rstrip("/")
        self.pool = UpstreamPool(url, tls)
        self._api_key = api_key
        self.models: dict[str, dict[str, Any]] = {}
        self.up = False
        self.in_flight = 0
        self.served = 0

    def request(self, method: str, path: str, headers: dict[str, str], body: bytes) -> bytes:
        """Return the bytes of a request to this engine."""
        if self._api_key:
            headers = {**headers, "authorization": f"Bearer {self._api_key}"}
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        target = self.pool.prefix + path
        head = (
            f"{method} {target} HTTP/1.1\r\nhost: {self.pool.authority}\r\n{lines}content-length: {len(body)}\r\n\r\n"
        )
        return head.encode("latin-1", "replace") + body


class Upstreams:
    """All engines of a gateway.

    A request goes to the engine with the fewest requests in flight among those that serve its model; the one that has
    served least recently breaks ties. An engine that cannot be reached is left out until it answers a probe again.
    """

    def __init__(self, urls: Collection[str], clock: Clock, tls: ssl.SSLContext, *, api_key: str = "") -> None:
        self.members = [Upstream(url, tls, api_key) for url in urls]
        self._clock = clock
        self._turn = 0

    def choose(self, model: str, excluded: Collection[Upstream] = ()) -> Upstream:
        """Return the engine for a request and count it in.

        Raises:
            NotFoundError: if no engine serves the model.
            UnavailableError: if those that do are down or excluded.
        """
        chosen = min(self.serving(model, excluded), key=lambda member: (member.in_flight, member.served))
        self.take(chosen)
        return chosen

    def take(self, upstream: Upstream) -> None:
        """Count a request in."""
        upstream.in_flight += 1
        self._turn += 1
        upstream.served = self._turn

    def serving(self, model: str, excluded: Collection[Upstream] = ()) -> list[Upstream]:
        """Return the engines that can take a request for a model; there is at least one.

        Raises:
            NotFoundError: if no engine serves the model.
            UnavailableError: if those that do are down or excluded.
        """
        serving = [member for member in self.members if model in member.models]
        if not serving:
            known = ", ".join(sorted(self.models())) or "none"
            raise NotFoundError(
                f"The model '{model}' does not exist; models served here: {known}.",
                reason="model_not_found",
                param="model",
            )
        usable = [member for member in serving if member.up and member not in excluded]
        if not usable:
            raise UnavailableError(
                f"No engine that serves '{model}' can be reached; try again soon.",
                reason="backend.unavailable",
                retry_after_s=1.0,
            )
        return usable

    def models(self) -> dict[str, dict[str, Any]]:
        """Return the models that can answer, by name."""
        return {name: shown for member in self.members if member.up for name, shown in member.models.items()}

    def states(self) -> list[tuple[str, bool, int]]:
        """Return each engine's URL, whether it is up, and its requests in flight."""
        return [(member.url, member.up, member.in_flight) for member in self.members]

    def mark_down(self, upstream: Upstream, reason: str) -> None:
        """Leave an engine out until it answers a probe."""
        if upstream.up:
            upstream.up = False
            _log.warning("engine left out", upstream=upstream.url, reason=reason)

    async def probe(self) -> None:
        """Ask every engine for its models, once."""
        await asyncio.gather(*(self._probe(member) for member in self.members))

    async def watch(self, interval_s: float, followed: Callable[[], Awaitable[None]] = _nothing) -> None:
        """Probe until cancelled; ``followed`` is called after each round."""
        while True:
            await self._clock.sleep(interval_s)
            await self.probe()
            await followed()

    def close(self) -> None:
        """Close idle connections."""
        for member in self.members:
            member.pool.close()

    async def _probe(self, upstream: Upstream) -> None:
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                models = await _list_models(upstream)
        except (DynamoError, TimeoutError) as error:
            self.mark_down(upstream, str(error) or "no answer in time")
            return
        if not upstream.up:
            _log.info("engine is up", upstream=upstream.url, models=sorted(models))
        upstream.models = models
        upstream.up = True


class _Collector:
    """Receives a small response."""

    def __init__(self) -> None:
        self.body = bytearray()
        self.status = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_head(self, status: int, headers: dict[str, str]) -> None:
        self.status = status

    def on_body(self, data: bytes) -> None:
        self.body += data
        if len(self.body) > _MAX_LISTING_BYTES:
            self.on_failure(BackendProtocolError("the engine's model list is too long"))

    def on_end(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def on_failure(self, error: DynamoError) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class _Listing(msgspec.Struct):
    data: list[dict[str, Any]]


async def ask(upstream: Upstream, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    """Return status and body of a small exchange with an engine. Cancelling it drops the connection.

    Raises:
        DynamoError: if the engine cannot be reached or breaks off.
    """
    connection = await upstream.pool.acquire()
    collector = _Collector()
    headers = {"accept": "application/json", **({"content-type": "application/json"} if body else {})}
    connection.send(upstream.request(method, path, headers, body), collector)
    try:
        await collector.done
    except asyncio.CancelledError:
        connection.abort()
        raise
    return collector.status, bytes(collector.body)


async def _list_models(upstream: Upstream) -> dict[str, dict[str, Any]]:
    status, body = await ask(upstream, "GET", "/v1/models")
    if status != 200:
        raise BackendProtocolError(f"/v1/models answered {status}")
    try:
        listing = msgspec.json.decode(body, type=_Listing)
    except msgspec.MsgspecError as error:
        raise BackendProtocolError(f"/v1/models is not a model list: {error}") from error
    return {str(item["id"]): item for item in listing.data if "id" in item}
