"""The planner as a component of a process."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from dynamo_core import plugins
from dynamo_core.component import Component, ComponentContext
from dynamo_core.ids import EndpointId
from dynamo_core.planning import ScalingTarget
from dynamo_core.settings import DynamoSettings
from dynamo_planner._build import create_planner
from dynamo_planner._election import Election
from dynamo_planner._loop import PlannerLoop
from dynamo_planner._metrics import PlannerMetrics
from dynamo_planner._operate import OperationApi
from dynamo_planner._record import DecisionLog
from dynamo_planner._settings import PlannerSettings
from dynamo_planner._sources import Source
from dynamo_planner._sources.bus import BusSource
from dynamo_planner._sources.prometheus import PrometheusSource
from dynamo_planner._state import SlaPlanner

SHOWN_DECISIONS = 100


class PlannerComponent:
    """Runs the planner loop over a scaling target.

    Args:
        context: The process.
        settings: Options.
        target: What is scaled.
        planner: Decides.
    """

    name = "planner"

    def __init__(
        self, context: ComponentContext, settings: PlannerSettings, target: ScalingTarget, planner: SlaPlanner
    ) -> None:
        self._context = context
        self._target = target
        self._source = _source(context, settings)
        metrics = PlannerMetrics(context.metrics)
        self._election = None
        if settings.leader_election:
            self._election = Election(context.discovery, context.namespace, f"seed-{context.seed}")
        log = settings.decision_log
        self._loop = PlannerLoop(
            settings,
            planner,
            self._source,
            target,
            clock=context.clock,
            metrics=metrics,
            election=self._election,
            log=None if log is None else DecisionLog(log, settings.decision_log_bytes),
        )
        self.api: OperationApi | None = None
        if settings.api_port is not None:
            self.api = OperationApi(self._loop, metrics, context.clock, host=settings.api_host, port=settings.api_port)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Connect to the target and begin to tick.

        Raises:
            ConfigurationError: if the operation API cannot listen.
        """
        await self._target.start()
        if self.api is not None:
            await self.api.start()
        self._context.health.register(self.name, self._loop.health)
        self._context.admin_routes["decisions"] = self._decisions
        self._tasks = [
            self._context.spawn(self._source.run(), name="planner-source"),
            self._context.spawn(self._loop.run(), name="planner-loop"),
        ]

    async def drain(self, timeout_s: float) -> None:
        """Stop deciding and let another planner lead; replicas stay as they are."""
        for task in self._tasks:
            task.cancel()
        if self._election is not None:
            await self._election.resign()

    async def stop(self) -> None:
        """Stop deciding and disconnect. Idempotent."""
        await self.drain(0)
        self._tasks = []
        if self.api is not None:
            await self.api.close()
        await self._source.close()
        await self._target.close()

    async def _decisions(self, arguments: dict[str, Any]) -> dict[str, Any]:
        shown = list(self._loop.decisions)[-SHOWN_DECISIONS:]
        return {"decisions": [msgspec.to_builtins(decision) for decision in shown]}


def _source(context: ComponentContext, settings: PlannerSettings) -> Source:
    if settings.source == "prometheus":
        token = settings.prometheus_token
        return PrometheusSource(
            settings.prometheus_url,
            context.clock,
            window_s=settings.interval_s,
            prefix=settings.prometheus_prefix,
            model=settings.prometheus_model,
            token="" if token is None else token.get_secret_value(),
            timeout_s=settings.prometheus_timeout_s,
        )
    backend = settings.role if settings.mode == "agg" else settings.decode_role
    endpoints = {
        EndpointId(context.namespace, "backend", "generate"): backend,
        EndpointId(context.namespace, "prefill", "generate"): settings.prefill_role,
    }
    return BusSource(context.event_bus, context.namespace, context.clock, settings.stale_after_s, endpoints)


class PlannerPlugin:
    """How ``dynamo planner`` builds the component."""

    settings_types: tuple[type[DynamoSettings], ...] = (PlannerSettings,)
    takes_extra_args = False

    def create(
        self, context: ComponentContext, settings: tuple[DynamoSettings, ...], extra_args: list[str]
    ) -> Component:
        """Load the named target and forecaster and build the component.

        Raises:
            ConfigurationError: if either is not installed, or a profile, a trace or the log cannot be used.
        """
        (options,) = settings
        assert isinstance(options, PlannerSettings)
        target = plugins.load("scaling_targets", options.target)(context, options.target_options)
        return PlannerComponent(context, options, target, create_planner(options))


PLUGIN = PlannerPlugin()
"""The entry ``planner`` of ``dynamo_core.components``."""
