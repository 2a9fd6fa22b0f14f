"""How ``dynamo worker`` and library users build a worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from dynamo_core import plugins
from dynamo_core.component import Component, ComponentContext
from dynamo_core.engine import Engine, EngineFactory
from dynamo_core.errors import ConfigurationError
from dynamo_core.ids import InstanceId
from dynamo_core.settings import DynamoSettings
from dynamo_worker._fleet import WorkerFleet
from dynamo_worker._settings import WorkerSettings
from dynamo_worker._worker import Worker


def create_worker(
    context: ComponentContext,
    settings: WorkerSettings | None = None,
    *,
    engine: Engine | None = None,
    engine_args: Sequence[str] = (),
    instance_id: InstanceId | None = None,
) -> Worker:
    """Build a worker; no I/O.

    Args:
        context: What the process offers.
        settings: Options of the host; defaults if omitted.
        engine: The engine itself; else the plug-in that the settings name is built from ``engine_args``.
        engine_args: Flags of the engine.
        instance_id: Identity; a random one if omitted.

    Raises:
        ConfigurationError: if the engine is not installed, or flags are wrong or contradict each other.
    """
    settings = settings if settings is not None else WorkerSettings()
    if engine is None:
        factory = cast("EngineFactory", plugins.load("engines", settings.engine))
        engine = factory.from_args(list(engine_args))
    elif engine_args:
        raise ConfigurationError(f"engine flags {list(engine_args)} have no effect on an engine that is already built")
    return Worker(context, settings, engine, instance_id=instance_id)


class WorkerPlugin:
    """Entry ``worker`` of ``dynamo_core.components``."""

    settings_types: tuple[type[DynamoSettings], ...] = (WorkerSettings,)
    takes_extra_args = True

    def create(
        self, context: ComponentContext, settings: tuple[DynamoSettings, ...], extra_args: list[str]
    ) -> Component:
        """Build the component from the resolved options; flags they do not know go to the engine."""
        own = cast("WorkerSettings", settings[0])
        if own.num_workers == 1:
            return create_worker(context, own, engine_args=extra_args)
        return WorkerFleet(context, own.num_workers, lambda each: create_worker(each, own, engine_args=extra_args))


plugin = WorkerPlugin()
