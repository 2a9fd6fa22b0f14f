"""Loads the block manager that an engine offloads to, if one is configured."""

from __future__ import annotations

from typing import cast

from dynamo_core import plugins
from dynamo_core.component import ComponentContext
from dynamo_core.kv import KvConnectorFactory
from dynamo_worker._settings import WorkerSettings
from dynamo_worker._tier_events import PublishingConnector


def load_connector(settings: WorkerSettings, context: ComponentContext) -> PublishingConnector | None:
    """Return the configured block manager, wrapped so that its tier changes are published; None without one.

    Raises:
        ConfigurationError: if it is not installed, or refuses its options.
    """
    if not settings.kv_connector:
        return None
    factory = cast("KvConnectorFactory", plugins.load("kv_connectors", settings.kv_connector))
    connector = factory(options=settings.kv_connector_options, clock=context.clock, metrics=context.metrics)
    return PublishingConnector(connector)
