"""The supervisor as a component: health of its roles, and endpoints through which others scale it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynamo_core.component import ComponentContext, Health
from dynamo_core.enums import HealthState
from dynamo_core.planes import RequestContext, ResponseSink
from dynamo_core.settings import DynamoSettings
from dynamo_runtime._endpoints import AnnouncedEndpoint, announce_endpoint
from dynamo_runtime._settings import SupervisorSettings
from dynamo_runtime._supervisor.child import WriteLine, write_line
from dynamo_runtime._supervisor.messages import (
    ScaleRequest,
    SupervisorState,
    decode_message,
    encode_like,
    scale_endpoint,
    state_endpoint,
)
from dynamo_runtime._supervisor.spec import ProcessSpec
from dynamo_runtime._supervisor.supervisor import Supervisor


class SupervisorComponent:
    """Component around a supervisor.

    Args:
        context: Of the process.
        specs: Roles to keep.
        settings: Limits and restarts.
        write: Takes the children's output lines.
    """

    name = "supervisor"

    def __init__(
        self,
        context: ComponentContext,
        specs: Sequence[ProcessSpec],
        settings: SupervisorSettings,
        write: WriteLine = write_line,
    ) -> None:
        self._context = context
        self._roles = [spec.role for spec in specs]
        self._endpoints: list[AnnouncedEndpoint] = []
        self.supervisor = Supervisor(
            specs, settings, clock=context.clock, spawn=context.spawn, metrics=context.metrics, write=write
        )

    async def start(self) -> None:
        """Start the replicas and serve ``scale`` and ``state``."""
        context = self._context
        for role in self._roles:
            context.health.register(role, lambda role=role: self._health(role))
        context.admin_routes["replicas"] = self._replicas
        await self.supervisor.start()
        lease = await context.discovery.lease()
        for endpoint, handler in (
            (scale_endpoint(context.namespace), self._scale),
            (state_endpoint(context.namespace), self._state),
        ):
            served = await announce_endpoint(context.discovery, context.request_plane, lease, endpoint, handler)
            self._endpoints.append(served)

    async def drain(self, timeout_s: float) -> None:
        """Refuse to scale, then drain every role, last first."""
        for endpoint in self._endpoints:
            await endpoint.drain(0.0)
        await self.supervisor.drain(timeout_s)

    async def stop(self) -> None:
        """Kill what still runs and close the endpoints."""
        await self.supervisor.stop()
        while self._endpoints:
            await self._endpoints.pop().close()

    def _health(self, role: str) -> Health:
        pool = self.supervisor.pools()[role]
        counts = f"{pool.ready} of {pool.desired} ready"
        if pool.ready >= pool.desired:
            return Health(HealthState.READY, counts)
        if pool.failed and not pool.ready + pool.starting:
            return Health(HealthState.FAILED, f"{counts}, {pool.failed} failed")
        if self.supervisor.settled(role) and pool.ready:
            return Health(HealthState.DEGRADED, counts)
        return Health(HealthState.STARTING, counts)

    async def _scale(self, payload: bytes, call: RequestContext, sink: ResponseSink) -> None:
        del call
        request = decode_message(payload, ScaleRequest)
        await self.supervisor.scale(request.replicas, decision_id=request.decision_id)
        sink.send(encode_like(payload, SupervisorState(self.supervisor.pools())))

    async def _state(self, payload: bytes, call: RequestContext, sink: ResponseSink) -> None:
        del call
        sink.send(encode_like(payload, SupervisorState(self.supervisor.pools())))

    async def _replicas(self, arguments: dict[str, Any]) -> dict[str, Any]:
        del arguments
        return {
            replica.name: {"state": replica.phase.value, "pid": replica.pid, "status_url": replica.status_url}
            for replicas in self.supervisor.replicas.values()
            for replica in replicas
        }


class SupervisorPlugin:
    """Component plug-in for a fixed set of roles; made by ``dynamo serve`` and ``dynamo up``."""

    settings_types: tuple[type[DynamoSettings], ...] = (SupervisorSettings,)
    takes_extra_args = False

    def __init__(self, specs: Sequence[ProcessSpec], write: WriteLine = write_line) -> None:
        self._specs = list(specs)
        self._write = write
        self.component: SupervisorComponent | None = None

    def create(
        self, context: ComponentContext, settings: tuple[DynamoSettings, ...], extra_args: list[str]
    ) -> SupervisorComponent:
        """See ``ComponentPlugin.create``."""
        del extra_args
        chosen = next((item for item in settings if isinstance(item, SupervisorSettings)), None)
        self.component = SupervisorComponent(context, self._specs, chosen or SupervisorSettings(), self._write)
        return self.component
