"""``dynamo router``: routers of a process of its own, behind endpoints on the request plane.

``{namespace}.router.select`` takes a ``RoutingRequest`` and answers with a ``RoutingDecision``;
``{namespace}.router.report`` takes ``RouterReport`` values about its reservations and answers with nothing. One router
serves each model that workers of the target endpoint publish.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, ClassVar

import msgspec
import structlog
from pydantic import Field

from dynamo_core.cards import ModelCard
from dynamo_core.component import Component, ComponentContext, ComponentPlugin, Health
from dynamo_core.discovery import MODELS_PREFIX, Instance, Lease, ModelRecord, endpoint_prefix
from dynamo_core.enums import HealthState
from dynamo_core.errors import ConfigurationError, DynamoError, NotFoundError
from dynamo_core.ids import EndpointId, ReservationId, new_instance_id
from dynamo_core.planes import RequestContext, ResponseSink, ServedEndpoint
from dynamo_core.routing import RequestOutcome, RouterScope
from dynamo_core.settings import DynamoSettings
from dynamo_core.wire import INSTANCE, MODEL_RECORD, ROUTING_DECISION, ROUTING_REQUEST, Codec
from dynamo_router._hosted import HostedRouter, create_router
from dynamo_router._pipeline import load_policy
from dynamo_router._settings import RouterSettings
from dynamo_router._watch import PrefixWatch

_log = structlog.get_logger(__name__)
_ROUTER_COMPONENT = "router"


class RouterServiceSettings(DynamoSettings):
    """What the standalone router routes to."""

    component: ClassVar[str] = "router"

    target: Annotated[
        str, Field(description="Endpoint to route to; empty for NAMESPACE.backend.generate of this namespace")
    ] = ""


class RouterReport(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of a reservation so far.

    Attributes:
        model: Model whose router made it.
        reservation: Which.
        first_token: The prompt is computed.
        output_tokens: Tokens generated so far; None to say nothing.
        outcome: How it ended; None while it runs.
    """

    model: str
    reservation: str
    first_token: bool = False
    output_tokens: int | None = None
    outcome: RequestOutcome | None = None


ROUTER_REPORT = Codec(RouterReport, "dynamo.router_report.v1")


class RouterComponent:
    """Serves a router for each model of one endpoint."""

    name = "router"

    def __init__(self, context: ComponentContext, settings: RouterSettings, target: EndpointId) -> None:
        self._context = context
        self._settings = settings
        self._target = target
        self._routers: dict[str, HostedRouter] = {}
        self._cards: dict[str, ModelRecord] = {}
        self._served: list[ServedEndpoint] = []
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._lease: Lease | None = None
        self._draining = False

    async def start(self) -> None:
        """Watch for models and serve the endpoints."""
        self._context.health.register(self.name, self.health)
        watch = PrefixWatch(
            self._context.discovery,
            MODELS_PREFIX + endpoint_prefix(self._target),
            on_put=self._on_record,
            on_delete=self._on_record_gone,
            on_synced=self._changed.set,
            clock=self._context.clock,
        )
        self._tasks = [
            self._context.spawn(watch.run(), name="router-models"),
            self._context.spawn(self._follow_models(), name="router-per-model"),
        ]
        self._lease = await self._context.discovery.lease()
        for endpoint, handler in (("select", self._on_select), ("report", self._on_report)):
            address = EndpointId(self._context.namespace, _ROUTER_COMPONENT, endpoint)
            served = await self._context.request_plane.serve(address, handler)
            self._served.append(served)
            instance = Instance(address, new_instance_id(), served.address)
            await self._context.discovery.put(instance.key, INSTANCE.encode(instance), lease=self._lease)

    async def drain(self, timeout_s: float) -> None:
        """Leave discovery and finish running calls."""
        self._draining = True
        await self._leave()
        await asyncio.gather(*(served.drain(timeout_s) for served in self._served))

    async def stop(self) -> None:
        """Release everything. Idempotent."""
        await self._leave()
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        served, self._served = self._served, []
        for endpoint in served:
            await endpoint.close()
        routers, self._routers = self._routers, {}
        for router in routers.values():
            await router.stop()
        self._context.health.unregister(self.name)

    def health(self) -> Health:
        """Return whether any model can be routed."""
        if self._draining:
            return Health(HealthState.DRAINING)
        if not self._routers:
            return Health(HealthState.DEGRADED, f"no worker of {self._target} has published a model")
        return Health(HealthState.READY)

    async def _leave(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            await lease.revoke()

    # -- models ------------------------------------------------------------------------------------------------------

    def _on_record(self, key: str, value: bytes) -> None:
        try:
            self._cards[key] = MODEL_RECORD.decode(value)
        except DynamoError as error:
            _log.warning("discovery_record_unreadable", key=key, error=error.message)
        self._changed.set()

    def _on_record_gone(self, key: str) -> None:
        self._cards.pop(key, None)
        self._changed.set()

    async def _follow_models(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            wanted = {record.card.name: record.card for record in self._cards.values()}
            for name in [name for name in self._routers if name not in wanted]:
                await self._routers.pop(name).stop()
            for name, card in wanted.items():
                if name not in self._routers:
                    await self._add_router(name, card)

    async def _add_router(self, name: str, card: ModelCard) -> None:
        options = self._settings.model_dump(exclude_defaults=True)
        try:
            router = create_router(self._context, RouterScope(self._target, card, self._settings.policy, options))
        except ConfigurationError as error:
            _log.warning("model_not_routed", model=name, error=error.message)
            return
        await router.start()
        self._routers[name] = router

    # -- endpoints ---------------------------------------------------------------------------------------------------

    async def _on_select(self, payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        request = ROUTING_REQUEST.decode(payload)
        decision = await self._router(request.model).select(request)
        sink.send(ROUTING_DECISION.encode(decision))

    async def _on_report(self, payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        report = ROUTER_REPORT.decode(payload)
        router, reservation = self._router(report.model), ReservationId(report.reservation)
        if report.first_token:
            router.first_token(reservation)
        if report.output_tokens is not None:
            router.progress(reservation, report.output_tokens)
        if report.outcome is not None:
            router.complete(reservation, report.outcome)
        sink.send(b"")

    def _router(self, model: str) -> HostedRouter:
        router = self._routers.get(model)
        if router is None:
            known = ", ".join(sorted(self._routers)) or "none"
            raise NotFoundError(f"no worker serves model {model!r} (routed: {known})", param="model")
        return router


class RouterPlugin:
    """Entry ``router`` of ``dynamo_core.components``."""

    settings_types: tuple[type[DynamoSettings], ...] = (RouterSettings, RouterServiceSettings)
    takes_extra_args = False

    def create(
        self, context: ComponentContext, settings: tuple[DynamoSettings, ...], extra_args: list[str]
    ) -> Component:
        """Build the component; no I/O.

        Raises:
            ConfigurationError: for an unknown policy or option, or a target that is no endpoint.
        """
        router, service = settings
        assert isinstance(router, RouterSettings)
        assert isinstance(service, RouterServiceSettings)
        load_policy(router.policy, router.policy_options)
        return RouterComponent(context, router, _target(service.target, context.namespace))


def _target(text: str, namespace: str) -> EndpointId:
    if not text:
        return EndpointId(namespace, "backend", "generate")
    try:
        return EndpointId.parse(text)
    except DynamoError as error:
        raise ConfigurationError(f"option --target: {error.message}") from error


plugin: ComponentPlugin = RouterPlugin()
