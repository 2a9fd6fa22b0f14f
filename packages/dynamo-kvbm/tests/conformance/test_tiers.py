from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from dynamo_core.clock import SystemClock
from dynamo_core.kv import BlockStore, KvConnector
from dynamo_core.telemetry import Metrics
from dynamo_core.testing import BlockStoreConformance, KvConnectorConformance
from dynamo_kvbm import DiskTier, HostTier, KvbmConnector, create_connector
from dynamo_kvbm._codecs import CodecName, make_codec
from dynamo_kvbm._tiers.encoded import EncodedStore
from dynamo_kvbm._tiers.object_store import ObjectTier
from dynamo_kvbm._tiers.shared_host import SharedHostTier


class TestHostTier(BlockStoreConformance):
    def make_store(self, capacity_blocks: int) -> BlockStore:
        return HostTier(capacity_blocks, self.layout.block_bytes)


class TestSharedHostTier(BlockStoreConformance):
    @pytest.fixture(autouse=True)
    def _folders(self, tmp_path: Path) -> None:
        self.folders = (tmp_path / str(i) for i in itertools.count())

    def make_store(self, capacity_blocks: int) -> BlockStore:
        return SharedHostTier(next(self.folders), capacity_blocks, self.layout.block_bytes)


class TestDiskTier(BlockStoreConformance):
    @pytest.fixture(autouse=True)
    def _folders(self, tmp_path: Path) -> None:
        self.folders = (tmp_path / str(i) for i in itertools.count())

    def make_store(self, capacity_blocks: int) -> BlockStore:
        return DiskTier(next(self.folders), capacity_blocks, self.layout.block_bytes)


def connector(**options: object) -> KvbmConnector:
    return create_connector(options=options, clock=SystemClock(), metrics=Metrics())


def settled(connector: KvConnector) -> None:
    assert isinstance(connector, KvbmConnector)
    assert connector.manager.flush(30.0)


class TestConnectorWithHost(KvConnectorConformance):
    def make_connector(self) -> KvConnector:
        return connector(host_blocks=8)


class TestConnectorWithSharedHost(KvConnectorConformance):
    @pytest.fixture(autouse=True)
    def _folders(self, tmp_path: Path) -> None:
        self.folders = (tmp_path / str(i) for i in itertools.count())

    def make_connector(self) -> KvConnector:
        return connector(host_blocks=8, host_dir=str(next(self.folders)), model="m")


class TestConnectorThatOffloadsAtOnce(KvConnectorConformance):
    def make_connector(self) -> KvConnector:
        return connector(host_blocks=8, offload="register")


class TestConnectorWithDisk(KvConnectorConformance):
    """A host of two blocks, so that most of what is onboarded comes from the disk."""

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "disk"

    def make_connector(self) -> KvConnector:
        return connector(host_blocks=2, disk_dir=str(self.folder), disk_blocks=8, model="m", disk_offload="register")

    def settle(self, connector: KvConnector) -> None:
        settled(connector)


class TestObjectTier(BlockStoreConformance):
    def make_store(self, capacity_blocks: int) -> BlockStore:
        return ObjectTier("memory:///", capacity_blocks, fingerprint="m")


class TestCompressedObjectTier(BlockStoreConformance):
    def make_store(self, capacity_blocks: int) -> BlockStore:
        tier = ObjectTier("memory:///", capacity_blocks, fingerprint="m")
        return EncodedStore(tier, make_codec(CodecName.LZ4, self.layout), self.layout.block_bytes)
