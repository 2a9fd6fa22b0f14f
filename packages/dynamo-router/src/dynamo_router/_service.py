"""An HTTP service that selects workers, with no runtime behind it.

Callers register workers, post KV events and ask; one router serves each pool of workers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import web
from prometheus_client import generate_latest

from dynamo_core.clock import Clock, SystemClock
from dynamo_core.errors import NotFoundError
from dynamo_core.ids import ReservationId
from dynamo_core.routing import RequestOutcome, RoutingDecision
from dynamo_core.telemetry import Metrics
from dynamo_router._http import errors_as_json, json_answer
from dynamo_router._metrics import LISTENERS
from dynamo_router._peers import PeerState
from dynamo_router._pools import Pools
from dynamo_router._receipts import regret_tokens
from dynamo_router._router import KvRouter
from dynamo_router._service_bodies import (
    EventsBody,
    LoadBody,
    OutcomeBody,
    OutputBlockBody,
    ProgressBody,
    ReservationBody,
    SelectBody,
    WorkerBody,
    changed_worker,
    read_body,
    selection,
)
from dynamo_router._settings import RouterSettings
from dynamo_router._split import SplitOptions, select_split

UPKEEP_S = 1.0


class SelectionService:
    """Routers by model and routing group, behind HTTP.

    Args:
        settings: Settings of every router.
        clock: Time.
        max_routers: Most routers.
        split: When a decode worker computes the prompt itself.
    """

    def __init__(
        self,
        settings: RouterSettings,
        *,
        clock: Clock | None = None,
        max_routers: int = 64,
        split: SplitOptions | None = None,
    ) -> None:
        self.metrics = Metrics()
        self._listener_gauge = self.metrics.gauge(LISTENERS, "Engines whose KV events are followed", ["state"])
        self._clock = clock or SystemClock()
        self._split_options = split or SplitOptions()
        self._pools = Pools(settings, clock=self._clock, metrics=self.metrics, max_routers=max_routers)

    def application(self, *, max_body_bytes: int = 64 * 1024 * 1024) -> web.Application:
        """Return the application to serve."""
        app = web.Application(client_max_size=max_body_bytes, middlewares=[errors_as_json])
        app.on_cleanup.append(self._cleanup)
        app.add_routes(
            [
                web.get("/workers", self._list_workers),
                web.post("/workers", self._put_worker),
                web.patch("/workers/{worker_id}", self._patch_worker),
                web.delete("/workers/{worker_id}", self._delete_worker),
                web.post("/workers/{worker_id}/load", self._report_load),
                web.post("/select", self._select),
                web.post("/select_and_reserve", self._select_and_reserve),
                web.post("/select_split", self._select_split),
                web.post("/select_split_and_reserve", self._select_split_and_reserve),
                web.post("/reservations", self._reserve),
                web.post("/reservations/{id}/output_block", self._output_block),
                web.post("/reservations/{id}/prefill_complete", self._prefill_complete),
                web.post("/reservations/{id}/progress", self._progress),
                web.delete("/reservations/{id}", self._complete),
                web.post("/events", self._events),
                web.get("/dump", self._dump),
                web.get("/loads", self._loads),
                web.post("/potential_loads", self._potential_loads),
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
        await self._pools.close()

    async def upkeep(self) -> None:
        """Drop stale bookings and refresh gauges until cancelled."""
        while True:
            for router in self._pools.routers.values():
                router.expire()
                router.beat()
                router.refresh_metrics()
            await self._clock.sleep(UPKEEP_S)

    def share(self, send: Callable[[bytes], object]) -> None:
        """Tell other services what is booked here, through a function; what they say goes into ``hear``."""
        self._pools.share(send)

    def hear(self, publisher: int, payload: bytes) -> None:
        """Take what another service, by its number, said."""
        self._pools.hear(publisher, payload)

    def missed(self, publisher: int) -> None:
        """Note that messages of another service were lost."""
        self._pools.missed(publisher)

    async def adopt(self, state: PeerState) -> None:
        """Take over a peer's workers and indexes; workers that are known already stay as they are.

        Raises:
            InvalidRequestError: if they do not fit together.
        """
        await self._pools.adopt(state)

    # -- workers -----------------------------------------------------------------------------------------------------

    async def _list_workers(self, request: web.Request) -> web.Response:
        return json_answer([self._shown(body) for body in self._pools.everyone()])

    def _shown(self, body: WorkerBody) -> dict[str, Any]:
        states = self._pools.listeners.states(body.worker_id)
        listeners = {str(rank): state.value for rank, state in states.items()}
        return msgspec.to_builtins(body, str_keys=True) | {"listeners": listeners}

    async def _put_worker(self, request: web.Request) -> web.Response:
        body = read_body(WorkerBody, await request.read())
        await self._pools.put(body)
        return json_answer(self._shown(body), status=201)

    async def _patch_worker(self, request: web.Request) -> web.Response:
        body = changed_worker(self._named(request), await request.read())
        await self._pools.change(body)
        return json_answer(self._shown(body))

    async def _delete_worker(self, request: web.Request) -> web.Response:
        body = self._named(request)
        await self._pools.remove(body.worker_id)
        return json_answer({"deleted": body.worker_id})

    async def _report_load(self, request: web.Request) -> web.Response:
        worker = self._named(request)
        body = read_body(LoadBody, await request.read())
        self._pools.router_of(worker).report_load(body.worker(worker), body.reported(self._clock.time()))
        return json_answer({"worker_id": worker.worker_id})

    def _named(self, request: web.Request) -> WorkerBody:
        text = request.match_info["worker_id"]
        if not text.isdecimal():
            raise NotFoundError(f"no worker {text!r} is registered; GET /workers lists them", param="worker_id")
        return self._pools.worker(int(text))

    # -- selections --------------------------------------------------------------------------------------------------

    async def _select(self, request: web.Request) -> web.Response:
        return await self._answer(request, reserve=False)

    async def _select_and_reserve(self, request: web.Request) -> web.Response:
        return await self._answer(request, reserve=True)

    async def _answer(self, request: web.Request, *, reserve: bool) -> web.Response:
        body = read_body(SelectBody, await request.read())
        router = self._pools.router(body.model_name, body.routing_group, prefill=body.for_prefill)
        decision = await router.select(body.request(router.block_size, reserve=reserve), deadline_s=body.deadline_s)
        return self._selected(decision, body, router)

    def _selected(
        self, decision: RoutingDecision, body: SelectBody, router: KvRouter, *, status: int = 200
    ) -> web.Response:
        headers = {"x-dynamo-decision-id": decision.decision_id, "x-dynamo-worker-id": str(decision.worker)}
        return json_answer(self._shown_selection(decision, body, router), status=status, headers=headers)

    def _shown_selection(self, decision: RoutingDecision, body: SelectBody, router: KvRouter) -> dict[str, Any]:
        worker = self._pools.workers.get(decision.worker.instance_id)
        endpoint = worker.endpoint if worker is not None else ""
        return selection(decision, body, block_size=router.block_size, endpoint=endpoint)

    async def _select_split(self, request: web.Request) -> web.Response:
        return await self._split(request, reserve=False)

    async def _select_split_and_reserve(self, request: web.Request) -> web.Response:
        return await self._split(request, reserve=True)

    async def _split(self, request: web.Request, *, reserve: bool) -> web.Response:
        body = read_body(SelectBody, await request.read())
        decode = self._pools.router(body.model_name, body.routing_group)
        prefill = self._pools.router(body.model_name, body.routing_group, prefill=True)
        asked = body.request(decode.block_size, reserve=reserve)
        found = await select_split(prefill, decode, asked, self._split_options)
        first = None if found.prefill is None else self._shown_selection(found.prefill, body, prefill)
        return json_answer(
            {"prefill": first, "decode": self._shown_selection(found.decode, body, decode), "reason": found.reason}
        )

    async def _reserve(self, request: web.Request) -> web.Response:
        body = read_body(ReservationBody, await request.read())
        router = self._pools.router_of(self._pools.worker(body.worker_id))
        decision = await router.select(body.request(router.block_size, reserve=True))
        return self._selected(decision, body, router, status=201)

    async def _output_block(self, request: web.Request) -> web.Response:
        identity, router = self._booked(request)
        body = read_body(OutputBlockBody, await request.read())
        tokens = router.grow(ReservationId(identity), body.blocks)
        return json_answer({"reservation_id": identity, "output_tokens": tokens})

    async def _prefill_complete(self, request: web.Request) -> web.Response:
        identity, router = self._booked(request)
        router.first_token(ReservationId(identity))
        return json_answer({"reservation_id": identity})

    async def _progress(self, request: web.Request) -> web.Response:
        identity, router = self._booked(request)
        router.progress(ReservationId(identity), read_body(ProgressBody, await request.read()).output_tokens)
        return json_answer({"reservation_id": identity})

    async def _complete(self, request: web.Request) -> web.Response:
        identity, router = self._booked(request)
        body = read_body(OutcomeBody, await request.read())
        router.complete(ReservationId(identity), body.outcome(identity))
        return json_answer({"reservation_id": identity})

    def _booked(self, request: web.Request) -> tuple[str, KvRouter]:
        identity = request.match_info["id"]
        for router in self._pools.routers.values():
            if router.made(identity):
                return identity, router
        raise NotFoundError(f"reservation {identity!r} was not made here", param="id")

    # -- index, loads, receipts --------------------------------------------------------------------------------------

    async def _events(self, request: web.Request) -> web.Response:
        body = read_body(EventsBody, await request.read())
        known = self._pools.workers.get(body.worker_id)
        if known is None:
            router = self._pools.router(body.model_name, body.routing_group)
        else:
            router = self._pools.router_of(known)
        batch = body.batch(router.block_size)
        router.apply_events(batch)
        stream = router.indexer.stream(batch.worker)
        return json_answer({"last_event_id": stream.last_id, "state": stream.state.value, "detail": stream.detail})

    async def _dump(self, request: web.Request) -> web.Response:
        return json_answer({key.dump_name: router.snapshot() for key, router in self._pools.routers.items()})

    async def _loads(self, request: web.Request) -> web.Response:
        return json_answer(
            [
                {"model_name": key.model, "routing_group": key.group, "prefill": key.prefill}
                | {"queued": msgspec.to_builtins(router.queued())}
                | {"workers": [msgspec.to_builtins(load) for load in router.loads()]}
                for key, router in sorted(self._pools.routers.items())
            ]
        )

    async def _potential_loads(self, request: web.Request) -> web.Response:
        body = read_body(SelectBody, await request.read())
        router = self._pools.router(body.model_name, body.routing_group, prefill=body.for_prefill)
        found = router.potential_loads(body.request(router.block_size, reserve=False))
        return json_answer(
            [
                {
                    "worker_id": load.worker.instance_id,
                    "dp_rank": load.worker.dp_rank,
                    "potential_prefill_tokens": load.projected.prefill_tokens,
                    "potential_decode_blocks": load.projected.decode_blocks,
                    "active_requests": load.projected.active_requests - 1,
                }
                for load in found
            ]
        )

    async def _overlap_scores(self, request: web.Request) -> web.Response:
        body = read_body(SelectBody, await request.read())
        router = self._pools.router(body.model_name, body.routing_group, prefill=body.for_prefill)
        scores = [
            {
                "worker_id": score.worker.instance_id,
                "dp_rank": score.worker.dp_rank,
                "tier_blocks": score.tier_blocks,
                "cached_tokens": score.cached_tokens,
            }
            for score in router.overlap_scores(body.request(router.block_size, reserve=False))
        ]
        return json_answer({"block_size": router.block_size, "scores": scores})

    async def _decisions(self, request: web.Request) -> web.Response:
        text = request.query.get("limit", "100")
        limit = int(text) if text.isdecimal() else 100
        kept = [entry for router in self._pools.routers.values() for entry in router.decisions(limit)]
        kept.sort(key=lambda entry: entry[0].decided_at_s, reverse=True)
        return json_answer([_receipt(decision, outcome) for decision, outcome in kept[:limit]])

    async def _decision(self, request: web.Request) -> web.Response:
        identity = request.match_info["id"]
        for router in self._pools.routers.values():
            found = router.decision(identity)
            if found is not None:
                return json_answer(_receipt(*found))
        raise NotFoundError(f"decision {identity!r} is unknown or no longer kept", param="id")

    async def _health(self, request: web.Request) -> web.Response:
        return json_answer({"status": "ok"})

    async def _ready(self, request: web.Request) -> web.Response:
        if not len(self._pools):
            return json_answer({"status": "no worker is registered"}, status=503)
        modes = {
            f"{key}/{worker}": mode.value
            for key, router in self._pools.routers.items()
            for worker, mode in router.index_modes().items()
        }
        return json_answer({"status": "ready", "index_modes": modes})

    async def _metrics(self, request: web.Request) -> web.Response:
        for router in self._pools.routers.values():
            router.refresh_metrics()
        for state, count in self._pools.listeners.counts().items():
            self._listener_gauge.labels(state=state.value).set(count)
        return web.Response(body=generate_latest(self.metrics.registry), content_type="text/plain")


def _receipt(decision: RoutingDecision, outcome: RequestOutcome | None) -> dict[str, Any]:
    return {"decision": decision, "outcome": outcome, "regret_tokens": regret_tokens(decision, outcome)}
