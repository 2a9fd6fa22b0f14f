"""The gateway as a whole: engines, handlers, server."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import structlog

from dynamo_core.clock import Clock
from dynamo_core.errors import ConfigurationError
from dynamo_core.telemetry import Metrics
from dynamo_frontend._access.access import open_door
from dynamo_frontend._decisions_api import DECISIONS_PREFIX, DecisionsApi
from dynamo_frontend._gateway.kv import kv_chooser
from dynamo_frontend._gateway.proxy import GatewayApi
from dynamo_frontend._gateway.upstreams import Upstreams
from dynamo_frontend._gateway.workers import SharedMetrics
from dynamo_frontend._http.tls import client_context
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
        self._access = open_door(settings, clock, metrics, share=1 / settings.workers)
        secured = client_context(settings.upstream_ca_path)
        key = settings.upstream_api_key.get_secret_value()
        self._upstreams = Upstreams(settings.upstream, clock, secured, api_key=key)
        self._metrics = GatewayMetrics(metrics)
        self._shared = _shared_metrics(settings)
        self._kv = kv_chooser(settings, self._upstreams, metrics, self._metrics, clock)
        api = GatewayApi(
            self._upstreams, self._metrics, retry_limit=settings.retry_limit, shared=self._shared, kv=self._kv
        )
        decisions = DecisionsApi(lambda: () if self._kv is None else self._kv.routers)
        routes = {
            "/v1/models": Route({"GET": api.models}),
            "/v1/models/": Route({"GET": api.model}, prefix=True),
            "/v1/": Route({"POST": api.forward}, prefix=True),
            DECISIONS_PREFIX: Route({"GET": decisions.decision}, prefix=True),
            "/health": Route({"GET": api.ready}, open=True),
            "/live": Route({"GET": api.live}, open=True),
            "/ready": Route({"GET": api.ready}, open=True),
            "/metrics": Route({"GET": api.metrics}, open=True),
        }
        self.server = HttpServer(Routes(routes, door=self._access), clock, settings.http_limits())
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def url(self) -> str:
        """Where it listens; valid once started."""
        return f"{self.server.scheme}://{self._settings.http_host}:{self.server.port}"

    async def start(self) -> None:
        """Listen, and probe the engines once. Engines that are down now may come later.

        Raises:
            ConfigurationError: if the port cannot be had, a file cannot be read, or the router is not installed.
        """
        settings = self._settings
        if self._access is not None:
            self._access.load()
        if self._kv is not None:
            await self._kv.start()
        tls = settings.server_tls()
        shared = self._shared is not None
        await self.server.start(
            settings.http_host, settings.http_port, backlog=settings.http_backlog, reuse_port=shared, tls=tls
        )
        if self._shared is not None:
            await self._shared.start(self._metrics.text)
        await self._upstreams.probe()
        if self._kv is None:
            self._spawn(self._upstreams.watch(settings.probe_interval_s), "gateway-probes")
        else:
            await self._kv.follow()
            self._spawn(self._upstreams.watch(settings.probe_interval_s, self._kv.follow), "gateway-probes")
        if self._access is not None:
            self._spawn(self._access.watch(), "gateway-keys")
        _log.info("gateway listens", url=self.url, upstreams=[member.url for member in self._upstreams.members])

    async def stop(self) -> None:
        """Accept nothing new, let running replies finish within the drain time, release everything. Idempotent."""
        await self.server.drain(self._settings.drain_timeout_s)
        await self.server.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        if self._shared is not None:
            self._shared.close()
        if self._kv is not None:
            await self._kv.stop()
        self._upstreams.close()

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(work, name=name))


def _shared_metrics(settings: GatewaySettings) -> SharedMetrics | None:
    if settings.worker_index < 0:
        return None
    return SharedMetrics(Path(settings.worker_folder), settings.worker_index)
