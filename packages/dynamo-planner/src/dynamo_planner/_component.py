"""The planner as a component of a process."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from dynamo_core import plugins
from dynamo_core.component import Component, ComponentContext
from dynamo_core.planning import Planner, ScalingTarget
from dynamo_core.settings import DynamoSettings
from dynamo_planner._build import create_planner
from dynamo_planner._loop import PlannerLoop
from dynamo_planner._metrics import PlannerMetrics
from dynamo_planner._settings import PlannerSettings
from dynamo_planner._sources.bus import BusSource

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
        self,
        context: ComponentContext,
        settings: PlannerSettings,
        target: ScalingTarget,
        planner: Planner,
    ) -> None:
        self._context = context
        self._target = target
        self._source = BusSource(context.event_bus, context.namespace, context.clock, settings.stale_after_s)
        self._loop = PlannerLoop(
            settings,
            planner,
            self._source,
            target,
            clock=context.clock,
            metrics=PlannerMetrics(context.metrics),
        )
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Connect to the target and begin to tick."""
        await self._target.start()
        self._context.health.register(self.name, self._loop.health)
        self._context.admin_routes["decisions"] = self._decisions
        self._tasks = [
            self._context.spawn(self._source.run(), name="planner-traffic"),
            self._context.spawn(self._loop.run(), name="planner-loop"),
        ]

    async def drain(self, timeout_s: float) -> None:
        """Stop deciding; replicas stay as they are."""
        for task in self._tasks:
            task.cancel()

    async def stop(self) -> None:
        """Stop deciding and disconnect. Idempotent."""
        await self.drain(0)
        self._tasks = []
        await self._source.close()
        await self._target.close()

    async def _decisions(self, arguments: dict[str, Any]) -> dict[str, Any]:
        shown = list(self._loop.decisions)[-SHOWN_DECISIONS:]
        return {"decisions": [msgspec.to_builtins(decision) for decision in shown]}


class PlannerPlugin:
    """How ``dynamo planner`` builds the component."""

    settings_types: tuple[type[DynamoSettings], ...] = (PlannerSettings,)
    takes_extra_args = False

    def create(
        self, context: ComponentContext, settings: tuple[DynamoSettings, ...], extra_args: list[str]
    ) -> Component:
        """Load the named target and forecaster and build the component.

        Raises:
            ConfigurationError: if either is not installed.
        """
        (options,) = settings
        assert isinstance(options, PlannerSettings)
        target = plugins.load("scaling_targets", options.target)(context, options.target_options)
        return PlannerComponent(context, options, target, create_planner(options))


PLUGIN = PlannerPlugin()
"""The entry ``planner`` of ``dynamo_core.components``."""
