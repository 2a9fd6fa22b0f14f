"""``dynamo-router serve`` and ``dynamo-router index``: the services as processes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field

from dynamo_core.errors import ConfigurationError
from dynamo_core.settings import DynamoSettings, resolve_settings
from dynamo_router._http import serve_until_stopped
from dynamo_router._index_service import IndexService
from dynamo_router._peers import fetch_peer
from dynamo_router._replica_bus import ReplicaBus
from dynamo_router._router import KvRouter
from dynamo_router._service import SelectionService
from dynamo_router._settings import RouterSettings
from dynamo_router._split import read_split_options


class ServeSettings(DynamoSettings):
    """Where the selection service listens."""

    component: ClassVar[str] = "router_serve"

    host: Annotated[str, Field(description="Address to listen on")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="Port to listen on; 0 for any free one")] = 8092
    max_body_bytes: Annotated[int, Field(ge=1024, description="Largest request body")] = 64 * 1024 * 1024
    max_routers: Annotated[int, Field(ge=1, description="Most (model, routing group) pairs")] = 64
    split: Annotated[
        dict[str, Any],
        Field(description='When a decode worker computes the prompt itself: {"policy": "isl_bounding", ...}'),
    ] = {}  # noqa: RUF012 - pydantic copies defaults
    peers: Annotated[
        list[str],
        Field(description="URLs of services like this one; workers and index of the first to answer are taken"),
    ] = []  # noqa: RUF012 - pydantic copies defaults
    replica_sync_bind: Annotated[
        str, Field(description="ZMQ address to publish bookings on, tcp://HOST:PORT; empty keeps them to this service")
    ] = ""
    replica_sync_peers: Annotated[
        list[str], Field(description="ZMQ addresses that other services publish their bookings on")
    ] = []  # noqa: RUF012 - pydantic copies defaults


class IndexSettings(DynamoSettings):
    """Where the index service listens, and how much it keeps."""

    component: ClassVar[str] = "router_index"

    host: Annotated[str, Field(description="Address to listen on")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="Port to listen on; 0 for any free one")] = 8090
    max_body_bytes: Annotated[int, Field(ge=1024, description="Largest request body")] = 64 * 1024 * 1024
    max_index_blocks: Annotated[int, Field(ge=1, description="Most (worker, tier, block) entries of one model")] = (
        8_000_000
    )


def serve(argv: Sequence[str], write: Callable[[str], None]) -> int:
    """Run the command until SIGINT or SIGTERM.

    Raises:
        ConfigurationError: for a bad flag, policy or address.
    """
    resolved = resolve_settings("dynamo-router serve", (ServeSettings, RouterSettings), argv)
    settings, routing = resolved.get(ServeSettings), resolved.get(RouterSettings)
    # Fails early for a bad policy or option; the log is the real routers' to open.
    KvRouter(block_size=1, settings=routing.model_copy(update={"receipts_dir": ""}))
    read_split_options(settings.split)
    asyncio.run(_serve(settings, routing, write))
    return 0


async def _serve(settings: ServeSettings, routing: RouterSettings, write: Callable[[str], None]) -> None:
    service = SelectionService(routing, max_routers=settings.max_routers, split=read_split_options(settings.split))
    state = await fetch_peer(settings.peers)
    if state is not None:
        await service.adopt(state)
    bus = await _join(service, settings, write)
    application = service.application(max_body_bytes=settings.max_body_bytes)
    upkeep = asyncio.create_task(service.upkeep())
    try:
        await serve_until_stopped(
            application, settings.host, settings.port, lambda url: write(f"dynamo-router selects on {url}")
        )
    finally:
        upkeep.cancel()
        await asyncio.gather(upkeep, return_exceptions=True)
        if bus is not None:
            await bus.close()


async def _join(service: SelectionService, settings: ServeSettings, write: Callable[[str], None]) -> ReplicaBus | None:
    """Share bookings with other services, if that is asked for."""
    if not settings.replica_sync_bind:
        if settings.replica_sync_peers:
            raise ConfigurationError(
                "replica_sync_peers are named but not replica_sync_bind; give it too, or the peers hear nothing"
            )
        return None
    bus = ReplicaBus(
        settings.replica_sync_bind, settings.replica_sync_peers, on_message=service.hear, on_lost=service.missed
    )
    await bus.start()
    service.share(bus.publish)
    write(f"dynamo-router shares bookings on {bus.address}")
    return bus


def serve_index(argv: Sequence[str], write: Callable[[str], None]) -> int:
    """Run the index service until SIGINT or SIGTERM.

    Raises:
        ConfigurationError: for a bad flag or address.
    """
    settings = resolve_settings("dynamo-router index", (IndexSettings,), argv).get(IndexSettings)
    service = IndexService(RouterSettings(policy="kv", max_index_blocks=settings.max_index_blocks, receipts="off"))
    application = service.application(max_body_bytes=settings.max_body_bytes)

    def announce(url: str) -> None:
        write(f"dynamo-router indexes on {url}")

    asyncio.run(serve_until_stopped(application, settings.host, settings.port, announce))
    return 0
