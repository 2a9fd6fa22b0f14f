"""The status server: is it alive, can it serve, what does it measure, and admin operations. Loopback by default."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from dynamo_core.component import AdminRoute, Health
from dynamo_core.errors import (
    ConfigurationError,
    DynamoError,
    InvalidRequestError,
    NotFoundError,
    PayloadTooLargeError,
    as_dynamo_error,
)
from dynamo_runtime._settings import NO_PORT

MAX_BODY_BYTES = 1 << 20


class StatusServer:
    """HTTP server of one process's state.

    Args:
        report: Returns the health of every part.
        registry: Metrics to show.
        routes: Returns admin operations by name; asked on each request, since components add theirs at start.
    """

    def __init__(
        self,
        report: Callable[[], Mapping[str, Health]],
        registry: CollectorRegistry,
        routes: Callable[[], Mapping[str, AdminRoute]],
    ) -> None:
        self._report = report
        self._registry = registry
        self._routes = routes
        self._runner: web.AppRunner | None = None
        self.url = ""

    async def start(self, host: str, port: int) -> None:
        """Listen on a port (0: any); ``NO_PORT`` starts nothing.

        Raises:
            ConfigurationError: if the address cannot be bound.
        """
        if port == NO_PORT:
            return
        runner = web.AppRunner(self._application(), access_log=None, handle_signals=False)
        await runner.setup()
        self._runner = runner
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise ConfigurationError(
                f"status server cannot listen on {host}:{port}: {error.strerror}; give another --status-port, 0 for any"
            ) from error
        bound = runner.addresses[0]
        self.url = f"http://{host}:{bound[1]}"

    async def close(self) -> None:
        """Stop listening. Idempotent."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def _application(self) -> web.Application:
        application = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_json_errors])
        application.router.add_get("/live", self._live)
        application.router.add_get("/ready", self._ready)
        application.router.add_get("/metrics", self._metrics)
        application.router.add_route("GET", "/engine/{name:.+}", self._engine)
        application.router.add_route("POST", "/engine/{name:.+}", self._engine)
        return application

    async def _live(self, request: web.Request) -> web.Response:
        del request
        return web.json_response({"status": "live"})

    async def _ready(self, request: web.Request) -> web.Response:
        del request
        report = self._report()
        ready = bool(report) and all(health.ready for health in report.values())
        parts = {name: {"state": health.state.value, "reason": health.reason} for name, health in report.items()}
        body = {"status": "ready" if ready else "notready", "parts": parts}
        return web.json_response(body, status=200 if ready else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        del request
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _engine(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        routes = self._routes()
        route = routes.get(name)
        if route is None:
            raise NotFoundError(f"admin operation {name!r} is not one of {', '.join(sorted(routes))}")
        return web.json_response(await route(await _arguments(request)))


async def _arguments(request: web.Request) -> dict[str, Any]:
    try:
        text = await request.text()
        body = json.loads(text) if text.strip() else {}
    except web.HTTPRequestEntityTooLarge as error:
        raise PayloadTooLargeError(f"body exceeds {MAX_BODY_BYTES} bytes") from error
    except ValueError as error:
        raise InvalidRequestError(f"body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise InvalidRequestError("body must be a JSON object, or empty")
    return body


@web.middleware
async def _json_errors(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        return _error_response(error.status, "http", error.reason or "", f"{error.status} {error.reason}")
    except Exception as error:  # noqa: BLE001 - the edge answers every failure as JSON
        typed = as_dynamo_error(error)
        return _error_response(typed.http_status, typed.error_class.value, typed.reason, _public(typed))


def _public(error: DynamoError) -> str:
    return f"{error.message} ({error.diagnostic})" if error.diagnostic else error.message


def _error_response(status: int, kind: str, reason: str, message: str) -> web.Response:
    return web.json_response({"error": {"type": kind, "reason": reason, "message": message}}, status=status)
