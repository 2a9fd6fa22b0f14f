"""Admin operations that every process offers: take it out of service, bring it back, say how it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dynamo_core.component import AdminRoute, Health, HealthBoard
from dynamo_core.discovery import Discovery
from dynamo_core.enums import HealthState
from dynamo_core.errors import ConflictError
from dynamo_runtime._tracked import TrackedDiscovery, TrackedRequestPlane


class ProcessState:
    """Where a process stands, and the built-in admin operations on it."""

    def __init__(self, discovery: TrackedDiscovery, request_plane: TrackedRequestPlane) -> None:
        self._discovery = discovery
        self._plane = request_plane
        self.health = Health(HealthState.STARTING, "components are starting")
        self.stopping = False

    @property
    def name(self) -> str:
        """``starting``, ``serving``, ``draining``, ``drained`` or ``stopping``."""
        if self.stopping:
            return "stopping"
        if self._discovery.withdrawn:
            return "draining" if self._plane.in_flight else "drained"
        return "serving" if self.health.ready else "starting"

    def started(self) -> None:
        """All components have started."""
        self.health = Health(HealthState.READY)

    async def leave(self, reason: str) -> None:
        """Vanish from discovery, so that no new work arrives; running work goes on."""
        self.health = Health(HealthState.DRAINING, reason)
        await self._discovery.withdraw()

    async def drain(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Admin operation: leave discovery and stay alive."""
        del arguments
        if not self.stopping:
            await self.leave("drained by an operator; POST /engine/resume brings it back")
        return self.describe()

    async def resume(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Admin operation: undo a drain.

        Raises:
            ConflictError: if the process is on its way out.
        """
        del arguments
        if self.stopping:
            raise ConflictError("the process is stopping and cannot resume; start another one")
        if self._discovery.withdrawn:
            await self._discovery.announce()
            self.started()
        return self.describe()

    async def status(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Admin operation: describe."""
        del arguments
        return self.describe()

    def describe(self) -> dict[str, Any]:
        """Return the state as JSON data."""
        return {
            "state": self.name,
            "inflight_requests": self._plane.in_flight,
            "discovery_registered": self._discovery.announced > 0,
            "safe_to_delete": self._discovery.withdrawn and self._plane.in_flight == 0,
        }

    def routes(self) -> dict[str, AdminRoute]:
        """Return the built-in operations by name."""
        return {"drain": self.drain, "resume": self.resume, "status": self.status}


def discovery_health(discovery: Discovery) -> Health:
    """Return the discovery plane's health: a lost backend degrades a process, which serves from its last view."""
    status = discovery.status()
    if status.connected:
        return Health(HealthState.READY, status.detail)
    return Health(
        HealthState.DEGRADED, f"discovery unreachable, last view is {status.stale_for_s:.1f} s old: {status.detail}"
    )


def combined_report(
    process: Callable[[], Health], discovery: Discovery, boards: Sequence[tuple[str, HealthBoard]]
) -> dict[str, Health]:
    """Return the health of all parts of a process; with several components, parts are named ``component/part``."""
    report = {"process": process(), "discovery": discovery_health(discovery)}
    for label, board in boards:
        for part, health in board.report().items():
            report[part if len(boards) == 1 else f"{label}/{part}"] = health
    return report
