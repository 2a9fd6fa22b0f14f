"""A worker of ``test_scale_down``: a host with one endpoint, which takes a moment for each request."""

from __future__ import annotations

import os
import sys
from typing import Any

from dynamo_core.component import ComponentContext
from dynamo_core.ids import EndpointId
from dynamo_core.planes import RequestContext, ResponseSink
from dynamo_runtime import HostedComponent, RuntimeSettings, run_components
from dynamo_runtime._endpoints import AnnouncedEndpoint, announce_endpoint


class Worker:
    """Serves ``test.backend.generate``."""

    name = "worker"

    def __init__(self, context: ComponentContext) -> None:
        self._context = context
        self._endpoint: AnnouncedEndpoint | None = None

    async def start(self) -> None:
        context = self._context
        lease = await context.discovery.lease()
        self._endpoint = await announce_endpoint(
            context.discovery, context.request_plane, lease, EndpointId("test", "backend", "generate"), self._answer
        )

    async def drain(self, timeout_s: float) -> None:
        assert self._endpoint is not None
        await self._endpoint.drain(timeout_s)

    async def stop(self) -> None:
        if self._endpoint is not None:
            await self._endpoint.close()

    async def _answer(self, payload: bytes, call: RequestContext, sink: ResponseSink) -> None:
        await self._context.clock.sleep(0.02)
        sink.send(payload + b" %d" % os.getpid())


class Plugin:
    settings_types = ()
    takes_extra_args = False

    def create(self, context: ComponentContext, settings: Any, extra_args: list[str]) -> Worker:
        return Worker(context)


async def ready() -> None:
    print("ready", flush=True)


if __name__ == "__main__":
    folder, url, loop = sys.argv[1:]
    hosted = [HostedComponent("worker", Plugin())]
    planes = {"discovery": f"file://{folder}", "request_plane": url, "event_bus": "mem://", "log_level": "error"}
    sys.exit(run_components(hosted, RuntimeSettings(**planes, uvloop=loop == "uvloop"), on_ready=ready))
