"""The runtime used alone: a small RPC and service-discovery library."""

from __future__ import annotations

from contextlib import AsyncExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self

from dynamo_core.cards import EndpointTypes
from dynamo_core.clock import Clock, SystemClock
from dynamo_core.discovery import Instance, Lease
from dynamo_core.ids import EndpointId
from dynamo_core.planes import DEFAULT_CALL_OPTIONS, CallOptions, RequestHandler
from dynamo_runtime._endpoints import (
    RAW,
    AnnouncedEndpoint,
    announce_endpoint,
    call_any,
    find_instances,
    require_instances,
)
from dynamo_runtime._settings import RuntimeSettings
from dynamo_runtime._substrate import build_planes

if TYPE_CHECKING:
    from dynamo_core.telemetry import Metrics


class Runtime:
    """Started planes with endpoints by name. An async context manager.

    Args:
        settings: Which planes; ``RuntimeSettings()`` reaches every process of this user on this machine.
        clock: Time.
        metrics: Scope in which the planes register their metrics; None keeps them private.

    Attributes:
        discovery: Discovery plane.
        request_plane: Request plane.
        event_bus: Event bus.

    Raises:
        ConfigurationError: if no installed plug-in serves a URL's scheme.
    """

    def __init__(
        self,
        settings: RuntimeSettings | None = None,
        *,
        clock: Clock | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._planes = build_planes(settings or RuntimeSettings(), clock or SystemClock(), metrics)
        self.discovery = self._planes.discovery
        self.request_plane = self._planes.request_plane
        self.event_bus = self._planes.event_bus
        self._stack = AsyncExitStack()
        self._lease: Lease | None = None
        self._turn = 0

    async def __aenter__(self) -> Self:
        """Start the planes.

        Raises:
            UnavailableError: if a plane's backend cannot be reached.
        """
        try:
            await self._planes.start(self._stack)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close everything that was served and the planes."""
        await self._stack.__aexit__(kind, error, trace)

    async def serve(
        self, endpoint: str | EndpointId, handler: RequestHandler, *, types: EndpointTypes = RAW
    ) -> AnnouncedEndpoint:
        """Serve an endpoint, ``namespace.component.endpoint``, under this runtime's lease.

        Cancellation leaves the endpoint unserved.
        """
        if self._lease is None:
            self._lease = await self.discovery.lease()
        announced = await announce_endpoint(
            self.discovery, self.request_plane, self._lease, _endpoint(endpoint), handler, types=types
        )
        self._stack.push_async_callback(announced.close)
        return announced

    async def instances(self, endpoint: str | EndpointId) -> list[Instance]:
        """Return who serves an endpoint."""
        return await find_instances(self.discovery, _endpoint(endpoint))

    async def call(
        self, endpoint: str | EndpointId, payload: bytes, options: CallOptions = DEFAULT_CALL_OPTIONS
    ) -> bytes:
        """Call an endpoint's instances in turn and return the answer's only item.

        An instance that cannot be reached, drains or is overloaded is passed over for the next; a call that was lost
        on its way is not made again. Cancelling kills the call.

        Raises:
            UnavailableError: if no instance can be reached.
            CapacityExhaustedError: if all that can be reached are overloaded.
            DynamoError: what the handler raised.
        """
        instances = await require_instances(self.discovery, _endpoint(endpoint))
        self._turn += 1
        turn = self._turn % len(instances)
        return await call_any(self.request_plane, instances[turn:] + instances[:turn], payload, options)


def _endpoint(endpoint: str | EndpointId) -> EndpointId:
    return endpoint if isinstance(endpoint, EndpointId) else EndpointId.parse(endpoint)
