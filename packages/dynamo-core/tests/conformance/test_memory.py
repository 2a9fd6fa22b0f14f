"""The in-process planes pass the suites."""

from typing import ClassVar

from dynamo_core.discovery import Lease
from dynamo_core.memory import MemoryDiscovery, MemoryEventBus, MemoryRequestPlane
from dynamo_core.testing import DiscoveryConformance, RequestPlaneConformance, SnapshotBusConformance


class TestMemoryDiscovery(DiscoveryConformance):
    _first: MemoryDiscovery | None = None

    async def make_discovery(self) -> MemoryDiscovery:
        if self._first is None:
            self._first = MemoryDiscovery()
            return self._first
        return self._first.peer()

    async def lose_lease(self, discovery: MemoryDiscovery, lease: Lease) -> None:
        discovery.lapse(lease)


class TestMemoryRequestPlane(RequestPlaneConformance):
    max_payload_bytes: ClassVar[int] = 2 << 20
    _first: MemoryRequestPlane | None = None

    async def make_plane(self) -> MemoryRequestPlane:
        if self._first is None:
            self._first = MemoryRequestPlane(max_payload_bytes=self.max_payload_bytes)
            return self._first
        return self._first.peer()

    def unreachable_address(self) -> str:
        return "mem://nobody"


class TestMemoryEventBus(SnapshotBusConformance):
    _first: MemoryEventBus | None = None

    async def make_bus(self) -> MemoryEventBus:
        if self._first is None:
            self._first = MemoryEventBus()
            return self._first
        return self._first.peer()
