"""Components: the parts a process hosts, what they are given, and how they say whether they can serve."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import msgspec

from dynamo_core.clock import Clock
from dynamo_core.discovery import Discovery
from dynamo_core.enums import HealthState
from dynamo_core.planes import EventBus, RequestPlane

if TYPE_CHECKING:
    # Settings and metrics pull in pydantic and prometheus-client, which importing a contract need not pay for.
    from dynamo_core.settings import DynamoSettings
    from dynamo_core.telemetry import Metrics


class Health(msgspec.Struct, frozen=True):
    """State of one part with its reason in words."""

    state: HealthState
    reason: str = ""

    @property
    def ready(self) -> bool:
        """Whether it can serve; a degraded part can."""
        return self.state in (HealthState.READY, HealthState.DEGRADED)


class HealthBoard:
    """Health of every part of a process, by name. Parts write their own line, the status server reads all."""

    def __init__(self) -> None:
        self._checks: dict[str, Callable[[], Health]] = {}

    def register(self, name: str, check: Callable[[], Health]) -> None:
        """Add or replace a part. ``check`` is called on each ``/ready`` and must not block."""
        self._checks[name] = check

    def unregister(self, name: str) -> None:
        """Remove a part; unknown names are ignored."""
        self._checks.pop(name, None)

    def report(self) -> dict[str, Health]:
        """Return every part's health; a check that raises is a failed part."""
        return {name: _run_check(check) for name, check in list(self._checks.items())}

    @property
    def ready(self) -> bool:
        """Whether all parts can serve; False while there are none."""
        report = self.report()
        return bool(report) and all(health.ready for health in report.values())


def _run_check(check: Callable[[], Health]) -> Health:
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - a broken check must not hide the other parts
        return Health(HealthState.FAILED, f"its health check failed: {type(error).__name__}: {error}")


class Spawner(Protocol):
    """Starts background tasks in the process's one task group; an error in any of them stops the process."""

    def __call__(self, coroutine: Coroutine[Any, Any, None], /, *, name: str) -> asyncio.Task[None]:
        """Start and return the task."""
        ...


AdminRoute = Callable[[dict[str, Any]], "Coroutine[Any, Any, dict[str, Any]]"]
"""An admin operation: JSON object in, JSON object out; a ``DynamoError`` becomes its HTTP status."""


@dataclass(frozen=True)
class ComponentContext:
    """Everything a component may use of its process. There are no globals beside it.

    Attributes:
        namespace: Namespace of the deployment.
        discovery: Started discovery plane.
        request_plane: Started request plane.
        event_bus: Started event bus.
        metrics: Scope with this component's labels.
        clock: Time.
        spawn: Starts background tasks.
        health: Board to register health on.
        admin_routes: Name to operation; the status server offers them under ``/engine/<name>``.
        seed: Seed for everything random.
        request_stop: Asks the host to drain and stop this process.
    """

    namespace: str
    discovery: Discovery
    request_plane: RequestPlane
    event_bus: EventBus
    metrics: Metrics
    clock: Clock
    spawn: Spawner
    health: HealthBoard = field(default_factory=HealthBoard)
    admin_routes: dict[str, AdminRoute] = field(default_factory=dict[str, AdminRoute])
    seed: int = 0
    request_stop: Callable[[str], None] = lambda reason: None


@runtime_checkable
class Component(Protocol):
    """A part of a process. The host calls, in order: ``start``, (serving), ``drain``, ``stop``.

    ``stop`` also follows a failed ``start``, and may come twice.
    """

    @property
    def name(self) -> str:
        """Name for logs and health."""
        ...

    async def start(self) -> None:
        """Begin to serve; when this returns it is ready or says in its health why not.

        Raises:
            ConfigurationError: if it cannot ever work as configured.
        """
        ...

    async def drain(self, timeout_s: float) -> None:
        """Leave discovery, refuse new work, finish what runs within the time, hand over the rest."""
        ...

    async def stop(self) -> None:
        """Release everything. Idempotent."""
        ...


@runtime_checkable
class ComponentPlugin(Protocol):
    """Entry of ``dynamo_core.components``: how ``dynamo <name>`` builds the component."""

    @property
    def settings_types(self) -> tuple[type[DynamoSettings], ...]:
        """Settings classes whose fields become flags."""
        ...

    @property
    def takes_extra_args(self) -> bool:
        """Whether unknown flags are passed on in ``extra_args`` (to an engine) instead of refused."""
        ...

    def create(
        self, context: ComponentContext, settings: tuple[DynamoSettings, ...], extra_args: list[str]
    ) -> Component:
        """Build the component; no I/O.

        Raises:
            ConfigurationError: if the settings contradict each other.
        """
        ...
