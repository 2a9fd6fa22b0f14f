"""Planes as components see them: the host keeps note of what they announced and what they serve.

A process that drains must first vanish from discovery, and an operator may bring it back. Neither needs the
component: the host withdraws the announcements that went through here and later puts them back.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from dynamo_core.discovery import (
    INSTANCES_PREFIX,
    MODELS_PREFIX,
    Discovery,
    DiscoveryStatus,
    Lease,
    Record,
    WatchEvent,
)
from dynamo_core.ids import EndpointId
from dynamo_core.planes import (
    DEFAULT_CALL_OPTIONS,
    Call,
    CallOptions,
    RequestHandler,
    RequestPlane,
    ServedEndpoint,
    StreamReceiver,
)

_ANNOUNCED = (INSTANCES_PREFIX, MODELS_PREFIX)
HELD_BACK = 0
"""Revision of an announcement that waits for ``announce``."""


class TrackedDiscovery:
    """Discovery that remembers announcements: instances and model records put under a lease."""

    def __init__(self, inner: Discovery) -> None:
        self._inner = inner
        self._announced: dict[str, tuple[bytes, Lease]] = {}
        self.withdrawn = False

    @property
    def announced(self) -> int:
        """Announcements that peers can see."""
        return 0 if self.withdrawn else len(self._announced)

    async def withdraw(self) -> None:
        """Take every announcement out of discovery; later ones are held back."""
        self.withdrawn = True
        for key in list(self._announced):
            await self._inner.delete(key)

    async def announce(self) -> None:
        """Put withdrawn and held-back announcements (back) into discovery.

        Raises:
            ConflictError: if a lease has ended meanwhile.
        """
        self.withdrawn = False
        for key, (value, lease) in list(self._announced.items()):
            await self._inner.put(key, value, lease=lease)

    async def start(self) -> None:
        """Do nothing: the host starts the real one."""

    async def close(self) -> None:
        """Do nothing: the host closes the real one."""

    async def lease(self, ttl_s: float = 10.0) -> Lease:
        """See ``Discovery.lease``."""
        return await self._inner.lease(ttl_s)

    async def put(self, key: str, value: bytes, *, lease: Lease | None = None) -> int:
        """See ``Discovery.put``; an announcement made while withdrawn returns ``HELD_BACK``."""
        if lease is not None and key.startswith(_ANNOUNCED):
            self._announced[key] = (value, lease)
            if self.withdrawn:
                return HELD_BACK
        return await self._inner.put(key, value, lease=lease)

    async def compare_and_set(
        self, key: str, value: bytes, *, expected: int | None, lease: Lease | None = None
    ) -> int | None:
        """See ``Discovery.compare_and_set``."""
        return await self._inner.compare_and_set(key, value, expected=expected, lease=lease)

    async def get(self, key: str) -> Record | None:
        """See ``Discovery.get``."""
        return await self._inner.get(key)

    async def delete(self, key: str) -> bool:
        """See ``Discovery.delete``."""
        self._announced.pop(key, None)
        return await self._inner.delete(key)

    async def list(self, prefix: str) -> list[Record]:
        """See ``Discovery.list``."""
        return await self._inner.list(prefix)

    def watch(self, prefix: str) -> AsyncIterator[WatchEvent]:
        """See ``Discovery.watch``."""
        return self._inner.watch(prefix)

    def status(self) -> DiscoveryStatus:
        """See ``Discovery.status``."""
        return self._inner.status()


class TrackedRequestPlane:
    """Request plane that remembers the endpoints it serves, to count running calls."""

    def __init__(self, inner: RequestPlane) -> None:
        self._inner = inner
        self._served: list[ServedEndpoint] = []

    @property
    def in_flight(self) -> int:
        """Calls being served over all endpoints."""
        return sum(endpoint.in_flight for endpoint in self._served)

    async def start(self) -> None:
        """Do nothing: the host starts the real one."""

    async def close(self) -> None:
        """Do nothing: the host closes the real one."""

    async def serve(self, endpoint: EndpointId, handler: RequestHandler, *, schema: str = "") -> ServedEndpoint:
        """See ``RequestPlane.serve``."""
        served = await self._inner.serve(endpoint, handler, schema=schema)
        self._served.append(served)
        return served

    async def open(
        self,
        address: str,
        endpoint: EndpointId,
        payload: bytes,
        receiver: StreamReceiver,
        options: CallOptions = DEFAULT_CALL_OPTIONS,
    ) -> Call:
        """See ``RequestPlane.open``."""
        return await self._inner.open(address, endpoint, payload, receiver, options)
