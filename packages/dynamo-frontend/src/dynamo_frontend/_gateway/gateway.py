"""The gateway as a whole: engines, handlers, server."""

from __future__ import annotations

import asyncio
import contextlib

import structlog

from dynamo_core.clock import Clock
from dynamo_core.errors import ConfigurationError
from dynamo_core.telemetry import Metrics
from dynamo_frontend._gateway.proxy import GatewayApi
from dynamo_frontend._gateway.upstreams import Upstreams
from dynamo_frontend._metrics import GatewayMetrics
from dynamo_frontend._routes import Route, Routes
from dynamo_frontend._server import HttpServer
from dynamo_frontend._settings import GatewaySettings

_log = structlog.get_logger(__name__)


class Gateway:
    """Serves the models of stock OpenAI-compatible engines under one address.

    Args:
        settings: Options.
        metrics: Where to count.
        clock: Time.

    Raises:
        ConfigurationError: if no engine is named, or one by something that is no URL.
    """

    def __init__(self, settings: GatewaySettings, metrics: Metrics, clock: Clock) -> None:
        if not settings.upstream:
            raise ConfigurationError("no engine is named; give at least one --upstream http://host:port")
        self._settings = settings
        self._upstreams = Upstreams(settings.upstream, clock)
        api = GatewayApi(self._upstreams, GatewayMetrics(metrics), retry_limit=settings.retry_limit)
        routes = {
            "/v1/models": Route({"GET": api.models}),
            "/v1/models/": Route({"GET": api.model}, prefix=True),
            "/v1/": Route({"POST": api.forward}, prefix=True),
            "/health": Route({"GET": api.ready}),
            "/live": Route({"GET": api.live}),
            "/ready": Route({"GET": api.ready}),
            "/metrics": Route({"GET": api.metrics}),
        }
        self.server = HttpServer(Routes(routes), clock, settings.http_limits())
        self._watch: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Where it listens; valid once started."""
        return f"http://{self._settings.http_host}:{self.server.port}"

    async def start(self) -> None:
        """Listen, and probe the engines once. Engines that are down now may come later.

        Raises:
            ConfigurationError: if the port cannot be had.
        """
        settings = self._settings
        await self.server.start(settings.http_host, settings.http_port, backlog=settings.http_backlog)
        await self._upstreams.probe()
        watch = self._upstreams.watch(settings.probe_interval_s)
        self._watch = asyncio.get_running_loop().create_task(watch, name="gateway-probes")
        _log.info("gateway listens", url=self.url, upstreams=[member.url for member in self._upstreams.members])

    async def stop(self) -> None:
        """Accept nothing new, let running replies finish within the drain time, release everything. Idempotent."""
        await self.server.drain(self._settings.drain_timeout_s)
        await self.server.stop()
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
            self._watch = None
        self._upstreams.close()
