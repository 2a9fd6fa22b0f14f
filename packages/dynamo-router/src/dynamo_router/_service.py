"""``dynamo-router serve``: an HTTP service that selects workers, with no runtime behind it.

Callers register workers, post KV events and ask; one router serves each (model, routing group).
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, ClassVar

import msgspec
from aiohttp import web
from prometheus_client import generate_latest
from pydantic import Field

from dynamo_core.clock import Clock, SystemClock
from dynamo_core.errors import ConfigurationError, DynamoError, InternalError, InvalidRequestError, NotFoundError
from dynamo_core.ids import ReservationId
from dynamo_core.routing import RequestOutcome, RoutingDecision
from dynamo_core.settings import DynamoSettings, resolve_settings
from dynamo_core.telemetry import Metrics
from dynamo_router._listeners import EngineListeners
from dynamo_router._metrics import LISTENERS
from dynamo_router._peers import PeerState, fetch_peer
from dynamo_router._receipts import regret_tokens
from dynamo_router._router import KvRouter
from dynamo_router._service_bodies import (
    EventsBody,
    OutcomeBody,
    ProgressBody,
    SelectBody,
    WorkerBody,
    error_body,
    read_body,
    selection,
)
from dynamo_router._settings import RouterSettings

UPKEEP_S = 1.0
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ServeSettings(DynamoSettings):
    """Where the selection service listens."""

    component: ClassVar[str] = "router_serve"

    host: Annotated[str, Field(description="Address to listen on")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="Port to listen on; 0 for any free one")] = 8092
    max_body_bytes: Annotated[int, Field(ge=1024, description="Largest request body")] = 64 * 1024 * 1024
    max_routers: Annotated[int, Field(ge=1, description="Most (model, routing group) pairs")] = 64
    peers: Annotated[
        list[str],
        Field(description="URLs of services like this one; workers and index of the first to answer are taken"),
    ] = []  # noqa: RUF012 - pydantic copies defaults


class SelectionService:
    """Routers by model and routing group, behind HTTP.

    Args:
        settings: Settings of every router.
        clock: Time.
        max_routers: Most routers.
    """

    def __init__(self, settings: RouterSettings, *, clock: Clock | None = None, max_routers: int = 64) -> None:
        self.metrics = Metrics()
        self._listener_gauge = self.metrics.gauge(LISTENERS, "Engines whose KV events are followed", ["model", "state"])
        self._settings = settings
        self._clock = clock or SystemClock()
        self._max_routers = max_routers
        self._routers: dict[tuple[str, str], KvRouter] = {}
        self._workers: dict[int, WorkerBody] = {}
        self._listeners = EngineListeners()

    def application(self, *, max_body_bytes: int = 64 * 1024 * 1024) -> web.Application:
        """Return the application to serve."""
        app = web.Application(client_max_size=max_body_bytes, middlewares=[_errors])
        app.on_cleanup.append(self._cleanup)
        app.add_routes(
            [
                web.get("/workers", self._list_workers),
                web.post("/workers", self._put_worker),
                web.delete("/workers/{worker_id}", self._delete_worker),
                web.post("/select", self._select),
                web.post("/select_and_reserve", self._select_and_reserve),
                web.post("/reservations/{id}/prefill_complete", self._prefill_complete),
                web.post("/reservations/{id}/progress", self._progress),
                web.delete("/reservations/{id}", self._complete),
                web.post("/events", self._events),
                web.get("/dump", self._dump),
                web.get("/loads", self._loads),
                web.post("/overlap_scores", self._overlap_scores),
                web.get("/v1/decisions", self._decisions),
                web.get("/v1/decisions/{id}", self._decision),
                web.get("/health", self._health),
                web.get("/ready", self._ready),
                web.get("/metrics", self._metrics),
            ]
        )
        return app

    async def _cleanup(self, app: web.Application) -> None:
        await self._listeners.close_all()
        for router in self._routers.values():
            await router.stop()

    async def upkeep(self) -> None:
        """Drop stale bookings and refresh gauges until cancelled."""
        while True:
            for router in self._routers.values():
                router.expire()
                router.refresh_metrics()
            await self._clock.sleep(UPKEEP_S)

    async def adopt(self, state: PeerState) -> None:
        """Take over a peer's workers and indexes; workers that are known already stay as they are.

        Raises:
            InvalidRequestError: if they do not fit together.
        """
        new = [body for body in state.workers if body.worker_id not in self._workers]
        for body in new:
            self._register(body)
        for body in new:
            snapshot = state.indexes.get(f"{body.model_name}:{body.routing_group}")
            # An engine with a replay socket tells its state itself, and numbers of its events begin anew here.
            if snapshot is not None and not body.replay_endpoint:
                mine = [worker for worker in snapshot.workers if worker.worker.instance_id == body.worker_id]
                if body.kv_events_endpoints:
                    mine = [msgspec.structs.replace(worker, last_event_id=None) for worker in mine]
                router = self._routers[body.model_name, body.routing_group]
                router.restore(msgspec.structs.replace(snapshot, workers=tuple(mine)))
            await self._listen(body)

    # -- workers -----------------------------------------------------------------------------------------------------

    async def _list_workers(self, request: web.Request) -> web.Response:
        return _json([self._shown(self._workers[key]) for key in sorted(self._workers)])

    def _shown(self, body: WorkerBody) -> dict[str, Any]:
        listeners = {str(rank): state.value for rank, state in self._listeners.states(body.worker_id).items()}
        return msgspec.to_builtins(body, str_keys=True) | {"listeners": listeners}

    async def _put_worker(self, request: web.Request) -> web.Response:
        body = read_body(WorkerBody, await request.read())
        if body.worker_id in self._workers:
            await self._remove(body.worker_id)
        self._register(body)
        await self._listen(body)
        return _json(self._shown(body), status=201)

    def _register(self, body: WorkerBody) -> None:
        router = self._router_for(body)
        for worker in body.workers():
            router.upsert_worker(worker, body.card())
        self._workers[body.worker_id] = body

    async def _listen(self, body: WorkerBody) -> None:
        router = self._routers[body.model_name, body.routing_group]
        try:
            await self._listeners.open(body.engine(), router.apply_events)
        except InvalidRequestError:
            await self._remove(body.worker_id)
            raise

    async def _delete_worker(self, request: web.Request) -> web.Response:
        text = request.match_info["worker_id"]
        if not text.isdecimal() or int(text) not in self._workers:
            raise NotFoundError(f"no worker {text!r} is registered; GET /workers lists them", param="worker_id")
        await self._remove(int(text))
        return _json({"deleted": int(text)})

    async def _remove(self, worker_id: int) -> None:
        body = self._workers.pop(worker_id)
        await self._listeners.close(worker_id)
        router = self._routers[body.model_name, body.routing_group]
        for worker in body.workers():
            router.remove_worker(worker)

    def _router_for(self, body: WorkerBody) -> KvRouter:
        key = (body.model_name, body.routing_group)
        if key not in self._routers:
            if len(self._routers) >= self._max_routers:
                raise ConfigurationError(f"{self._max_routers} models are routed, the limit; raise --max-routers")
            self._routers[key] = KvRouter(
                block_size=body.block_size,
                settings=self._settings,
                clock=self._clock,
                metrics=self.metrics,
                model="/".join(key),
            )
        return self._routers[key]

    def _router(self, model: str, group: str) -> KvRouter:
        router = self._routers.get((model, group))
        if router is None:
            known = ", ".join(f"{name}/{where}" for name, where in sorted(self._routers)) or "none"
            raise NotFoundError(f"no worker of model {model!r} in group {group!r} (known: {known})", param="model_name")
        return router

    # -- selections --------------------------------------------------------------------------------------------------

    async def _select(self, request: web.Request) -> web.Response:
        return await self._answer(request, reserve=False)

    async def _select_and_reserve(self, request: web.Request) -> web.Response:
        return await self._answer(request, reserve=True)

    async def _answer(self, request: web.Request, *, reserve: bool) -> web.Response:
        body = read_body(SelectBody, await request.read())
        router = self._router(body.model_name, body.routing_group)
        decision = await router.select(body.request(router.block_size, reserve=reserve))
        worker = self._workers.get(decision.worker.instance_id)
        endpoint = worker.endpoint if worker is not None else ""
        return _json(
            selection(decision, body, block_size=router.block_size, endpoint=endpoint),
            headers={"x-dynamo-decision-id": decision.decision_id, "x-dynamo-worker-id": str(decision.worker)},
        )

    async def _prefill_complete(self, request: web.Request) -> web.Response:
        identity, router = self._booked(request)
        router.first_token(ReservationId(identity))
        return _json({"reservation_id": identity})

    async def _progress(self, request: web.Request) -> web.Response:
        identity, router = self._booked(request)
        router.progress(ReservationId(identity), read_body(ProgressBody, await request.read()).output_tokens)
        return _json({"reservation_id": identity})

    async def _complete(self, request: web.Request) -> web.Response:
        identity, router = self._booked(request)
        body = read_body(OutcomeBody, await request.read())
        router.complete(ReservationId(identity), body.outcome(identity))
        return _json({"reservation_id": identity})

    def _booked(self, request: web.Request) -> tuple[str, KvRouter]:
        identity = request.match_info["id"]
        for router in self._routers.values():
            if router.made(identity):
                return identity, router
        raise NotFoundError(f"reservation {identity!r} was not made here", param="id")

    # -- index, loads, receipts --------------------------------------------------------------------------------------

    async def _events(self, request: web.Request) -> web.Response:
        body = read_body(EventsBody, await request.read())
        router = self._router(body.model_name, body.routing_group)
        batch = body.batch(router.block_size)
        router.apply_events(batch)
        stream = router.indexer.stream(batch.worker)
        return _json({"last_event_id": stream.last_id, "state": stream.state.value, "detail": stream.detail})

    async def _dump(self, request: web.Request) -> web.Response:
        return _json({f"{model}:{group}": router.snapshot() for (model, group), router in self._routers.items()})

    async def _loads(self, request: web.Request) -> web.Response:
        return _json(
            [
                {"model_name": model, "routing_group": group, "queued": msgspec.to_builtins(router.queued())}
                | {"workers": [msgspec.to_builtins(load) for load in router.loads()]}
                for (model, group), router in sorted(self._routers.items())
            ]
        )

    async def _overlap_scores(self, request: web.Request) -> web.Response:
        body = read_body(SelectBody, await request.read())
        router = self._router(body.model_name, body.routing_group)
        found = router.overlaps(body.request(router.block_size, reserve=False))
        scores = [
            {"worker_id": worker.instance_id, "dp_rank": worker.dp_rank, "tier_blocks": blocks, "cached_tokens": tokens}
            for worker, blocks, tokens in found
        ]
        return _json({"block_size": router.block_size, "scores": scores})

    async def _decisions(self, request: web.Request) -> web.Response:
        text = request.query.get("limit", "100")
        limit = int(text) if text.isdecimal() else 100
        kept = [entry for router in self._routers.values() for entry in router.decisions(limit)]
        kept.sort(key=lambda entry: entry[0].decided_at_s, reverse=True)
        return _json([_receipt(decision, outcome) for decision, outcome in kept[:limit]])

    async def _decision(self, request: web.Request) -> web.Response:
        identity = request.match_info["id"]
        for router in self._routers.values():
            found = router.decision(identity)
            if found is not None:
                return _json(_receipt(*found))
        raise NotFoundError(f"decision {identity!r} is unknown or no longer kept", param="id")

    async def _health(self, request: web.Request) -> web.Response:
        return _json({"status": "ok"})

    async def _ready(self, request: web.Request) -> web.Response:
        if not self._workers:
            return _json({"status": "no worker is registered"}, status=503)
        modes = {
            f"{model}/{group}/{worker}": mode.value
            for (model, group), router in self._routers.items()
            for worker, mode in router.index_modes().items()
        }
        return _json({"status": "ready", "index_modes": modes})

    async def _metrics(self, request: web.Request) -> web.Response:
        for key, router in self._routers.items():
            router.refresh_metrics()
            workers = {worker.instance_id for worker in router.workers()}
            for state, count in self._listeners.counts(workers).items():
                self._listener_gauge.labels(model="/".join(key), state=state.value).set(count)
        return web.Response(body=generate_latest(self.metrics.registry), content_type="text/plain")


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        message = f"{request.method} {request.path}: {error.reason}"
        return _json({"error": {"message": message, "type": "http", "code": str(error.status)}}, status=error.status)
    except DynamoError as error:
        status = error.http_status if not isinstance(error, InternalError) else 500
        return _json(error_body(error), status=status)


def _receipt(decision: RoutingDecision, outcome: RequestOutcome | None) -> dict[str, Any]:
    return {"decision": decision, "outcome": outcome, "regret_tokens": regret_tokens(decision, outcome)}


def _json(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value), status=status, content_type="application/json", headers=headers
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
    asyncio.run(_serve(settings, routing, write))
    return 0


async def _serve(settings: ServeSettings, routing: RouterSettings, write: Callable[[str], None]) -> None:
    service = SelectionService(routing, max_routers=settings.max_routers)
    state = await fetch_peer(settings.peers)
    if state is not None:
        await service.adopt(state)
    runner = web.AppRunner(service.application(max_body_bytes=settings.max_body_bytes), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, settings.host, settings.port)
    try:
        await site.start()
    except OSError as error:
        await runner.cleanup()
        raise ConfigurationError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}; choose another --port"
        ) from error
    host, port = runner.addresses[0][:2]
    write(f"dynamo-router selects on http://{host}:{port}")
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    upkeep = asyncio.create_task(service.upkeep())
    await stopped.wait()
    upkeep.cancel()
    await asyncio.gather(upkeep, return_exceptions=True)
    await runner.cleanup()
