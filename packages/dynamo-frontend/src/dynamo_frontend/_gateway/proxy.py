"""Passes requests to engines and their responses back, with another engine in reserve until the first byte."""

from __future__ import annotations

import asyncio
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST

from dynamo_core.errors import DynamoError, InvalidRequestError, NotFoundError, UnavailableError
from dynamo_frontend._errors import error_body
from dynamo_frontend._gateway.charge import Charge
from dynamo_frontend._gateway.connection import UpstreamConnection
from dynamo_frontend._gateway.kv import Booking, KvChooser
from dynamo_frontend._gateway.upstreams import Upstream, Upstreams
from dynamo_frontend._gateway.workers import SharedMetrics
from dynamo_frontend._http.request import HttpRequest
from dynamo_frontend._http.response import HttpResponse
from dynamo_frontend._metrics import GatewayMetrics
from dynamo_frontend._request_id import request_id_of

JSON = "application/json"
_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "host",
        "content-length",
        "expect",
        "x-request-id",
    }
)


class _ModelField(msgspec.Struct):
    """The only field of a body that the gateway reads."""

    model: str


_MODEL = msgspec.json.Decoder(_ModelField)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request goes: an engine, and its booking if a router chose it."""

    upstream: Upstream
    booking: Booking | None = None


class Exchange:
    """One request on its way through an engine."""

    def __init__(
        self,
        request_id: str,
        response: HttpResponse,
        place: Place,
        on_over: Callable[[int], None],
        charge: Charge | None = None,
    ) -> None:
        self._charge = charge
        self.began: asyncio.Future[DynamoError | None] = asyncio.get_running_loop().create_future()
        self._request_id = request_id
        self._response = response
        self._upstream = place.upstream
        self._booking = place.booking
        self._on_over = on_over
        self._status = 0
        self._type = JSON
        self._headers: dict[str, str] = {}
        self._whole: list[bytes] | None = None
        self._over = False
        self.connection: UpstreamConnection | None = None

    def on_head(self, status: int, headers: dict[str, str]) -> None:
        """Begin the response, or gather it if its length is known."""
        self._status = status
        if not self.began.done():
            self.began.set_result(None)
        self._type = headers.get("content-type", JSON)
        self._headers = {
            name: value for name, value in headers.items() if name not in _HOP_BY_HOP and name not in _OWN_HEADERS
        }
        self._headers["x-request-id"] = self._request_id
        self._headers["x-dynamo-upstream"] = self._upstream.pool.authority
        if self._booking is not None:
            self._booking.first_byte()
            self._headers.update(self._booking.response_headers)
        if "content-length" in headers:
            self._whole = []
            return
        self._response.start(status, self._type, self._headers)

    def on_body(self, data: bytes) -> None:
        """Pass a piece on; stop reading if the client does not keep up."""
        if self._charge is not None:
            self._charge.feed(data)
        if self._whole is not None:
            self._whole.append(data)
            return
        self._response.write(data)
        if not self._response.writable and self.connection is not None:
            self.connection.pause()

    def on_end(self) -> None:
        """The engine is done."""
        if not self._finish():
            return
        if self._whole is not None:
            self._response.send(self._status, b"".join(self._whole), self._type, self._headers)
        else:
            self._response.end()

    def on_failure(self, error: DynamoError) -> None:
        """The engine is lost: try another, or tell the client."""
        if self._over:
            return
        began = self._status != 0
        self._finish()
        if not began:
            if not self.began.done():
                self.began.set_result(error)
            return
        if not self._response.started:
            self._response.send(error.http_status, error_body(error), JSON, {"x-request-id": self._request_id})
        elif self._type.startswith("text/event-stream"):
            self._response.write(b"event: error\ndata: " + error_body(error) + b"\n\n")
            self._response.end()
        else:
            self._response.abort()

    def client_left(self) -> None:
        """Drop the engine's connection, which stops its work."""
        self._status = 499
        if self._finish() and self.connection is not None:
            self.connection.abort()

    def client_caught_up(self) -> None:
        """Read on."""
        if self.connection is not None and not self._over:
            self.connection.resume()

    def _finish(self) -> bool:
        if self._over:
            return False
        self._over = True
        self._upstream.in_flight -= 1
        self._on_over(self._status or _NEVER_BEGAN)
        return True


# What is counted where an engine was lost before its first byte: the request may go on at another.
_NEVER_BEGAN = 503
_OWN_HEADERS = frozenset({"content-type", "cache-control", "date", "server"})


class GatewayApi:
    """The gateway's handlers.

    Args:
        upstreams: The engines.
        metrics: Counts.
        retry_limit: Engines tried after the first.
        shared: Metrics of the other processes that share the port; None if there are none.
        kv: Chooses by what engines' caches hold; None to choose by requests in flight alone.
    """

    def __init__(
        self,
        upstreams: Upstreams,
        metrics: GatewayMetrics,
        *,
        retry_limit: int,
        shared: SharedMetrics | None = None,
        kv: KvChooser | None = None,
    ) -> None:
        self._kv = kv
        self._shared = shared
        metrics.follow(upstreams.states)
        self._upstreams = upstreams
        self._metrics = metrics
        self._retry_limit = retry_limit

    async def forward(self, request: HttpRequest, response: HttpResponse) -> None:
        """Pass a request on to an engine that serves its model.

        Until the first byte of a response, a lost engine is replaced by another: nothing has reached the client.
        """
        model = _model_of(request.body)
        request_id = request_id_of(request)
        charge = Charge.of(request)
        tried: list[Upstream] = []
        try:
            while True:
                place = await self._place(request, request_id, model, tried)
                error = await self._attempt(request, response, request_id, place, charge)
                if error is None:
                    return
                tried.append(place.upstream)
                if len(tried) > self._retry_limit or len(tried) >= len(self._upstreams.members):
                    raise error
        except DynamoError:
            if charge is not None:
                charge.settle(answered=False)
            raise

    async def _place(self, request: HttpRequest, request_id: str, model: str, tried: list[Upstream]) -> Place:
        """Return the engine for a request, counted in."""
        booking = None
        if self._kv is not None:
            booking = await self._kv.choose(request, request_id, model, tried)
        if booking is not None:
            return Place(booking.upstream, booking)
        return Place(self._upstreams.choose(model, tried))

    def models(self, request: HttpRequest, response: HttpResponse) -> None:
        """``GET /v1/models`` over all engines."""
        data = [shown for _, shown in sorted(self._upstreams.models().items())]
        _send(response, 200, {"object": "list", "data": data})

    def model(self, request: HttpRequest, response: HttpResponse) -> None:
        """``GET /v1/models/{id}``."""
        name = request.path.removeprefix("/v1/models/")
        shown = self._upstreams.models().get(name)
        if shown is None:
            raise NotFoundError(f"The model '{name}' does not exist.", reason="model_not_found", param="model")
        _send(response, 200, shown)

    def live(self, request: HttpRequest, response: HttpResponse) -> None:
        """``GET /live``."""
        _send(response, 200, {"status": "live"})

    def ready(self, request: HttpRequest, response: HttpResponse) -> None:
        """``GET /ready`` and ``/health``: whether any engine can answer, and the state of each."""
        states = {member.url: "up" if member.up else "down" for member in self._upstreams.members}
        ready = any(member.up for member in self._upstreams.members)
        body: dict[str, Any] = {
            "status": "ready" if ready else "not_ready",
            "upstreams": states,
            "models": sorted(self._upstreams.models()),
        }
        if self._kv is not None:
            parts = self._kv.health.report().items()
            body["routing"] = {name: f"{part.state.value} {part.reason}".strip() for name, part in parts}
            if self._kv.problem:
                body["routing"]["prompts"] = self._kv.problem
        _send(response, 200 if ready else 503, body)

    async def metrics(self, request: HttpRequest, response: HttpResponse) -> None:
        """``GET /metrics``, of all workers that share the port."""
        text = self._metrics.text()
        if self._shared is not None:
            text = await self._shared.gather(text)
        response.send(200, text, CONTENT_TYPE_LATEST)

    async def _attempt(
        self,
        request: HttpRequest,
        response: HttpResponse,
        request_id: str,
        place: Place,
        charge: Charge | None,
    ) -> DynamoError | None:
        """Return None once a response has begun, or why it did not."""
        upstream, booking = place.upstream, place.booking

        def on_over(status: int) -> None:
            self._metrics.ended(upstream.url, status)
            if booking is not None:
                booking.end(status)
            if charge is not None and status != _NEVER_BEGAN:
                charge.settle(answered=status < 400)

        exchange = Exchange(request_id, response, place, on_over, charge)
        # From here on the exchange owns the count in flight, also if the client leaves while it waits.
        response.on_disconnect(exchange.client_left)
        response.on_drain(exchange.client_caught_up)
        try:
            connection = await upstream.pool.acquire()
        except UnavailableError as error:
            self._upstreams.mark_down(upstream, error.message)
            exchange.on_failure(error)
            return error
        if response.disconnected:
            upstream.pool.release(connection)
            return None
        exchange.connection = connection
        # Decoding may have freed a line break; what goes on the wire again is encoded again.
        quoted = urllib.parse.quote(request.path, safe="/:@!$&'()*+,;=~-._")
        path = f"{quoted}?{request.query}" if request.query else quoted
        headers = {name: value for name, value in request.headers.items() if name not in _HOP_BY_HOP}
        headers["x-request-id"] = request_id
        if booking is not None:
            headers.update(booking.request_headers)
        connection.send(upstream.request(request.method, path, headers, request.body), exchange)
        return await exchange.began


def _model_of(body: bytes) -> str:
    try:
        return _MODEL.decode(body).model
    except msgspec.ValidationError:
        raise InvalidRequestError("Field 'model' is missing or no text. Add it.", param="model") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(
            f"The body is not valid JSON: {error}. Send one JSON object in UTF-8.", reason="request.invalid"
        ) from None


def _send(response: HttpResponse, status: int, body: dict[str, Any]) -> None:
    response.send(status, msgspec.json.encode(body), JSON)
