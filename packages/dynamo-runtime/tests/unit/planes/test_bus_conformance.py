"""The event buses keep the contract: ZeroMQ, and NATS with a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from dynamo_core import plugins
from dynamo_core.clock import SystemClock
from dynamo_core.memory import MemoryDiscovery
from dynamo_core.planes import EventBus
from dynamo_core.testing import SnapshotBusConformance
from dynamo_runtime._bus.broker import ZmqBroker
from dynamo_runtime._discovery.file import FileDiscovery


class ZmqSuite:
    overflow_events = 3000
    ring_events = 64

    @pytest_asyncio.fixture(autouse=True)
    async def _discovery(self, tmp_path: Path) -> AsyncIterator[None]:
        self._store = FileDiscovery(tmp_path, clock=SystemClock())
        await self._store.start()
        yield
        await self._store.close()

    async def make_bus(self) -> EventBus:
        factory = plugins.load("event_buses", "zmq")
        options = {"buffer_events": 1000, "ring_events": 256}
        return factory("zmq://127.0.0.1:0", discovery=self._store, clock=SystemClock(), options=options)


class BrokerSuite(ZmqSuite):
    @pytest_asyncio.fixture(autouse=True)
    async def _broker(self) -> AsyncIterator[None]:
        broker = ZmqBroker()
        broker.start("127.0.0.1", 0)
        self._place = f"127.0.0.1:{broker.port}"
        yield
        await broker.close()

    async def make_bus(self) -> EventBus:
        factory = plugins.load("event_buses", "zmq")
        options = {"buffer_events": 1000, "ring_events": 256}
        url = f"zmq://127.0.0.1:0?broker={self._place}"
        return factory(url, discovery=self._store, clock=SystemClock(), options=options)


class NatsSuite:
    overflow_events = 3000
    ring_events = 64

    @pytest.fixture(autouse=True)
    def _server(self, shared_nats: Any) -> None:
        self._host_port = shared_nats.host_port

    async def make_bus(self) -> EventBus:
        factory = plugins.load("event_buses", "nats")
        options = {"buffer_events": 1000, "ring_events": 256}
        return factory(f"nats://{self._host_port}", discovery=MemoryDiscovery(), clock=SystemClock(), options=options)


class TestZmq(ZmqSuite, SnapshotBusConformance):
    pass


class TestBroker(BrokerSuite, SnapshotBusConformance):
    pass


class TestNats(NatsSuite, SnapshotBusConformance):
    pass
