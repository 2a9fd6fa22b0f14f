"""``dynamo broker``: the event broker as a component."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from dynamo_core.component import Component, ComponentContext, ComponentPlugin, Health
from dynamo_core.enums import HealthState
from dynamo_core.settings import DynamoSettings
from dynamo_runtime._bus._metrics import BrokerMetrics
from dynamo_runtime._bus.broker import ZmqBroker
from dynamo_runtime._settings import BrokerSettings


class BrokerComponent:
    """The event broker of a deployment.

    Args:
        context: Of the process.
        settings: Where it listens.
    """

    name = "broker"

    def __init__(self, context: ComponentContext, settings: BrokerSettings) -> None:
        self._context = context
        self._settings = settings
        self._broker = ZmqBroker(BrokerMetrics(context.metrics), max_event_bytes=settings.max_event_bytes)

    async def start(self) -> None:
        """Listen.

        Raises:
            ConfigurationError: if the ports cannot be bound.
        """
        self._broker.start(self._settings.host, self._settings.port)
        place = f"publishers at {self._settings.host}:{self._broker.port}, subscribers at the port after it"
        self._context.health.register("broker", lambda: Health(HealthState.READY, place))

    async def drain(self, timeout_s: float) -> None:
        """Do nothing: it holds nothing that could be handed over."""

    async def stop(self) -> None:
        """Stop listening. Idempotent."""
        await self._broker.close()


class BrokerPlugin:
    """Component plug-in of ``dynamo broker``."""

    settings_types: tuple[type[DynamoSettings], ...] = (BrokerSettings,)
    takes_extra_args = False

    def create(
        self, context: ComponentContext, settings: tuple[DynamoSettings, ...], extra_args: list[str]
    ) -> BrokerComponent:
        """See ``ComponentPlugin.create``."""
        del extra_args
        return BrokerComponent(context, cast("BrokerSettings", settings[0]))


plugin = BrokerPlugin()

if TYPE_CHECKING:
    _COMPONENT: type[Component] = BrokerComponent
    _PLUGIN: ComponentPlugin = plugin
