"""The route table, and the application that the HTTP server calls."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from dynamo_core.errors import DynamoError, as_dynamo_error
from dynamo_frontend._errors import error_body, error_headers, http_status, status_body
from dynamo_frontend._http.request import HttpRequest
from dynamo_frontend._http.response import HttpResponse
from dynamo_frontend._request_id import request_id_of

_log = structlog.get_logger(__name__)
JSON = "application/json"
_REFUSAL_CODES = {
    400: "request.invalid",
    408: "request.timeout",
    413: "request.payload_too_large",
    414: "request.target_too_long",
    431: "request.headers_too_large",
}

Handler = Callable[[HttpRequest, HttpResponse], Awaitable[None] | None]
"""Answers a request, at once or as a coroutine."""


@dataclass(frozen=True, slots=True)
class Route:
    """One path.

    Attributes:
        methods: Handler by method; HEAD follows GET.
        prefix: Whether longer paths belong to it too.
        open: Whether it needs no key where keys are asked for.
        error_body: Form of its errors.
    """

    methods: Mapping[str, Handler]
    prefix: bool = False
    open: bool = False
    error_body: Callable[[DynamoError], bytes] = error_body


class Door(Protocol):
    """Decides who may come in."""

    def admit(self, request: HttpRequest) -> object:
        """Note the request's caller, or raise a ``DynamoError``."""
        ...


class Routes:
    """The application: finds the handler, and turns every failure into an answer in the API's form.

    Args:
        routes: Path to route.
        overload_status: Status when all workers are busy.
        door: Asked before every route that is not open; None lets everyone in.
    """

    def __init__(self, routes: Mapping[str, Route], *, overload_status: int = 529, door: Door | None = None) -> None:
        self._door = door
        self._exact = {path: route for path, route in routes.items() if not route.prefix}
        self._prefixes = sorted((path for path, route in routes.items() if route.prefix), key=len, reverse=True)
        self._routes = dict(routes)
        self._overload_status = overload_status

    def handle(self, request: HttpRequest, response: HttpResponse) -> Coroutine[Any, Any, None] | None:
        """Answer, or return the coroutine that does. Never raises."""
        route = self._find(request.path)
        if route is None:
            message = f"Unknown path {request.method} {request.path[:200]}."
            response.send(404, status_body(404, message, code="request.unknown_path"), JSON)
            return None
        handler = route.methods.get("GET" if request.method == "HEAD" else request.method)
        if handler is None:
            self._without_handler(route, request, response)
            return None
        if self._door is not None and not route.open:
            try:
                self._door.admit(request)
            except DynamoError as error:
                self._answer_error(error, request, response, route)
                return None
        return self._guard(handler, request, response, route)

    def refuse(self, status: int, message: str, response: HttpResponse) -> None:
        """Answer a request that broke the protocol or a limit."""
        code = _REFUSAL_CODES.get(status, "request.invalid")
        response.send(status, status_body(status, message, code=code), JSON)

    def _find(self, path: str) -> Route | None:
        route = self._exact.get(path)
        if route is not None:
            return route
        for prefix in self._prefixes:
            if path.startswith(prefix) and len(path) > len(prefix):
                return self._routes[prefix]
        return None

    def _without_handler(self, route: Route, request: HttpRequest, response: HttpResponse) -> None:
        methods = sorted({*route.methods, "OPTIONS", *(("HEAD",) if "GET" in route.methods else ())})
        allow = {"allow": ", ".join(methods)}
        if request.method == "OPTIONS":
            response.send(204, b"", JSON, allow)
            return
        message = f"{request.path} does not take {request.method}; use {allow['allow']}."
        response.send(405, status_body(405, message, code="request.method_not_allowed"), JSON, allow)

    def _guard(
        self, handler: Handler, request: HttpRequest, response: HttpResponse, route: Route
    ) -> Coroutine[Any, Any, None] | None:
        try:
            work = handler(request, response)
        except Exception as error:  # noqa: BLE001 - one defect must not end the connection without an answer
            self._answer_error(as_dynamo_error(error), request, response, route)
            return None
        return self._guarded(work, request, response, route) if work is not None else None

    async def _guarded(self, work: Awaitable[None], request: HttpRequest, response: HttpResponse, route: Route) -> None:
        try:
            await work
        except Exception as error:  # noqa: BLE001 - as above
            self._answer_error(as_dynamo_error(error), request, response, route)

    def _answer_error(self, error: DynamoError, request: HttpRequest, response: HttpResponse, route: Route) -> None:
        status = http_status(error, self._overload_status)
        request_id = request_id_of(request)
        if status >= 500:
            _log.warning(
                "request failed",
                path=request.path,
                request_id=request_id,
                reason=error.reason,
                diagnostic=error.diagnostic,
                exc_info=error.__cause__,
            )
        if response.ended:
            return
        if response.started:
            response.abort()
            return
        shown = request.caller.headers() if request.caller is not None else {}
        headers = {"x-request-id": request_id, **shown, **error_headers(error)}
        response.send(status, route.error_body(error), JSON, headers)
