"""``dynamo-router index``: an HTTP service that only answers who holds which prefix.

It follows the KV events of registered engines and scores prompts; choosing and booking stay with the caller.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import msgspec
from aiohttp import web
from prometheus_client import generate_latest

from dynamo_core.cards import ModelCard
from dynamo_core.enums import Tier
from dynamo_core.errors import InvalidRequestError, NotFoundError
from dynamo_core.ids import WorkerId
from dynamo_core.requests import RoutingHints
from dynamo_core.routing import RoutingRequest
from dynamo_core.telemetry import Metrics
from dynamo_core.tokens import pack_hashes, pack_tokens
from dynamo_router._engine_events import EngineEventSource
from dynamo_router._http import errors_as_json, json_answer
from dynamo_router._router import KvRouter
from dynamo_router._service_bodies import Body, EventsBody, read_body
from dynamo_router._settings import RouterSettings

MAX_POOLS = 64
_U64 = (1 << 64) - 1


class RegisterBody(Body, frozen=True):
    """One dp rank of an engine.

    Attributes:
        endpoint: Where it publishes KV events over ZMQ; empty if they are posted to ``/events``.
        replay_endpoint: Its replay socket; empty if it has none.
    """

    instance_id: int
    block_size: Annotated[int, msgspec.Meta(ge=1)]
    endpoint: str = ""
    replay_endpoint: str = ""
    model_name: str = "default"
    routing_group: str = "default"
    dp_rank: int = 0


class UnregisterBody(Body, frozen=True):
    """An instance, or with ``dp_rank`` one rank of it."""

    instance_id: int
    model_name: str = "default"
    routing_group: str = "default"
    dp_rank: int | None = None


class QueryBody(Body, frozen=True):
    """A prompt as tokens."""

    token_ids: list[int]
    model_name: str = "default"
    routing_group: str = "default"
    lora_name: str = ""
    cache_salt: str = ""


class HashQueryBody(Body, frozen=True):
    """A prompt as content hashes of its blocks, signed or not, in which adapter and salt are mixed already."""

    block_hashes: list[int]
    model_name: str = "default"
    routing_group: str = "default"


class IndexService:
    """Indexes by model and routing group, behind HTTP.

    Args:
        settings: Limits of each index.
    """

    def __init__(self, settings: RouterSettings) -> None:
        self.metrics = Metrics()
        self._settings = settings
        self._routers: dict[tuple[str, str], KvRouter] = {}
        self._sources: dict[tuple[str, str, WorkerId], EngineEventSource | None] = {}

    def application(self, *, max_body_bytes: int = 64 * 1024 * 1024) -> web.Application:
        """Return the application to serve."""
        app = web.Application(client_max_size=max_body_bytes, middlewares=[errors_as_json])
        app.on_cleanup.append(self._cleanup)
        posts: dict[str, Callable[[bytes], Awaitable[Any]]] = {
            "/register": self._register,
            "/unregister": self._unregister,
            "/events": self._events,
            "/query": self._query,
            "/query_by_hash": self._query_by_hash,
        }
        gets: dict[str, Callable[[], Any]] = {
            "/workers": self._workers,
            "/dump": lambda: {":".join(key): router.snapshot() for key, router in self._routers.items()},
            "/health": lambda: {"status": "ok"},
        }
        app.add_routes([web.post(path, _posted(answer)) for path, answer in posts.items()])
        app.add_routes([web.get(path, _got(answer)) for path, answer in gets.items()])
        app.add_routes([web.get("/ready", self._ready), web.get("/metrics", self._show_metrics)])
        return app

    # -- engines -----------------------------------------------------------------------------------------------------

    async def _register(self, payload: bytes) -> Any:
        body = read_body(RegisterBody, payload)
        key, worker = (body.model_name, body.routing_group), WorkerId(body.instance_id, body.dp_rank)
        if key not in self._routers and len(self._routers) >= MAX_POOLS:
            raise InvalidRequestError(f"{MAX_POOLS} models are indexed, the limit; unregister some", param="model_name")
        router = self._routers.get(key) or self._made(key, body.block_size)
        await self._drop(key, worker)
        router.upsert_worker(worker, ModelCard(body.model_name, kv_block_size=body.block_size))
        source = None
        if body.endpoint:
            source = EngineEventSource(router.apply_events, worker, body.endpoint, replay_endpoint=body.replay_endpoint)
            try:
                await source.start()
            except InvalidRequestError:
                router.remove_worker(worker)
                raise
        self._routers[key] = router
        self._sources[*key, worker] = source
        return {"registered": body.instance_id, "dp_rank": body.dp_rank}

    async def _unregister(self, payload: bytes) -> Any:
        body = read_body(UnregisterBody, payload)
        key = (body.model_name, body.routing_group)
        gone = [
            worker
            for (*of, worker) in self._sources
            if tuple(of) == key and worker.instance_id == body.instance_id and body.dp_rank in (None, worker.dp_rank)
        ]
        if not gone:
            raise NotFoundError(
                f"instance {body.instance_id} is not registered for {'/'.join(key)}; GET /workers lists those that are",
                param="instance_id",
            )
        for worker in gone:
            await self._drop(key, worker)
        return {"unregistered": body.instance_id, "dp_ranks": [worker.dp_rank for worker in gone]}

    async def _events(self, payload: bytes) -> Any:
        body = read_body(EventsBody, payload)
        router = self._router(body.model_name, body.routing_group)
        batch = body.batch(router.block_size)
        router.apply_events(batch)
        stream = router.indexer.stream(batch.worker)
        return {"last_event_id": stream.last_id, "state": stream.state.value, "detail": stream.detail}

    def _made(self, key: tuple[str, str], block_size: int) -> KvRouter:
        return KvRouter(block_size=block_size, settings=self._settings, metrics=self.metrics, model="/".join(key))

    async def _drop(self, key: tuple[str, str], worker: WorkerId) -> None:
        source = self._sources.pop((*key, worker), None)
        if source is not None:
            await source.close()
        if key in self._routers:
            self._routers[key].remove_worker(worker)

    # -- answers -----------------------------------------------------------------------------------------------------

    async def _query(self, payload: bytes) -> Any:
        body = read_body(QueryBody, payload)
        router = self._router(body.model_name, body.routing_group)
        hints = RoutingHints(lora=body.lora_name, cache_salt=body.cache_salt)
        return _scores(router, RoutingRequest("", token_ids=pack_tokens(body.token_ids), hints=hints))

    async def _query_by_hash(self, payload: bytes) -> Any:
        body = read_body(HashQueryBody, payload)
        router = self._router(body.model_name, body.routing_group)
        hashes = pack_hashes([value & _U64 for value in body.block_hashes])
        return _scores(router, RoutingRequest("", block_size=router.block_size, local_hashes=hashes))

    def _workers(self) -> Any:
        return [
            {
                "instance_id": worker.instance_id,
                "dp_rank": worker.dp_rank,
                "model_name": model,
                "routing_group": group,
                "listener": "none" if source is None else source.state.value,
                "stream": self._routers[model, group].indexer.stream(worker).state.value,
                "blocks": self._routers[model, group].indexer.index.blocks_of(worker),
            }
            for (model, group, worker), source in sorted(self._sources.items(), key=lambda entry: entry[0])
        ]

    async def _ready(self, request: web.Request) -> web.Response:
        if not self._sources:
            return json_answer({"status": "no engine is registered"}, status=503)
        return json_answer({"status": "ready", "engines": len(self._sources)})

    async def _show_metrics(self, request: web.Request) -> web.Response:
        for router in self._routers.values():
            router.refresh_metrics()
        return web.Response(body=generate_latest(self.metrics.registry), content_type="text/plain")

    def _router(self, model: str, group: str) -> KvRouter:
        router = self._routers.get((model, group))
        if router is None:
            known = ", ".join(sorted(map("/".join, self._routers))) or "none"
            raise NotFoundError(
                f"model {model!r} in group {group!r} is not indexed (known: {known})", param="model_name"
            )
        return router

    async def _cleanup(self, app: web.Application) -> None:
        for *key, worker in list(self._sources):
            await self._drop((key[0], key[1]), worker)


def _scores(router: KvRouter, request: RoutingRequest) -> dict[str, Any]:
    """Return matched tokens by instance and rank; tiers count from the nearest on, so each includes those before."""
    scores: dict[str, dict[str, int]] = {}
    instances: list[dict[str, int]] = []
    for worker, tiers, _ in router.overlap_scores(request):
        device, host, disk, outside = (
            tiers[tier.value] * router.block_size for tier in (Tier.DEVICE, Tier.HOST, Tier.DISK, Tier.EXTERNAL)
        )
        matched = device + host + disk + outside
        scores.setdefault(str(worker.instance_id), {})[str(worker.dp_rank)] = matched
        instances.append(
            {
                "instance_id": worker.instance_id,
                "dp_rank": worker.dp_rank,
                "gpu": device,
                "cpu": device + host,
                "disk": device + host + disk,
                "longest_matched": matched,
            }
        )
    return {"block_size": router.block_size, "scores": scores, "instances": instances}


def _posted(answer: Callable[[bytes], Awaitable[Any]]) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(request: web.Request) -> web.Response:
        return json_answer(await answer(await request.read()))

    return handle


def _got(answer: Callable[[], Any]) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(request: web.Request) -> web.Response:
        return json_answer(answer())

    return handle
