"""etcd discovery keeps the contract, with a real server."""

from __future__ import annotations

from typing import Any

import pytest

from dynamo_core import plugins
from dynamo_core.clock import SystemClock
from dynamo_core.discovery import Discovery
from dynamo_core.testing import DiscoveryConformance


class EtcdSuite:
    @pytest.fixture(autouse=True)
    def _empty_store(self, shared_etcd: Any) -> None:
        shared_etcd.control("del", "", "--prefix")
        self._host_port = shared_etcd.host_port

    async def make_discovery(self) -> Discovery:
        factory = plugins.load("discoveries", "etcd")
        return factory(f"etcd://{self._host_port}", clock=SystemClock(), options={})


class TestEtcd(EtcdSuite, DiscoveryConformance):
    pass
