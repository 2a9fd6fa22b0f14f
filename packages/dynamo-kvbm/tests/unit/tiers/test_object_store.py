from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from dynamo_core.clock import SystemClock
from dynamo_core.enums import Tier
from dynamo_core.errors import ConfigurationError
from dynamo_core.kv import BlockDescriptor, TierChange
from dynamo_core.telemetry import Metrics
from dynamo_core.testing import DeviceBlocks, FakeClock, KvConnectorConformance
from dynamo_kvbm import BlockManager, HostTier, TierConfig, create_connector
from dynamo_kvbm._tiers.object_store import ObjectTier

BUCKET = "kv-blocks"


class Server:
    """An S3 server with one empty bucket."""

    def __init__(self, endpoint: str) -> None:
        self.config = {
            "endpoint": endpoint,
            "region": "us-east-1",
            "access_key_id": "test",
            "secret_access_key": "test",
        }
        self.client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        self.client.create_bucket(Bucket=BUCKET)

    def tier(self, capacity: int = 64, fingerprint: str = "m@1", clock: FakeClock | None = None) -> ObjectTier:
        return ObjectTier(f"s3://{BUCKET}/x", capacity, fingerprint=fingerprint, config=self.config, clock=clock)

    def names(self) -> list[str]:
        return [item["Key"] for item in self.client.list_objects_v2(Bucket=BUCKET).get("Contents", [])]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def server(endpoint: str) -> Iterator[Server]:
    server = Server(endpoint)
    yield server
    for key in server.names():
        server.client.delete_object(Bucket=BUCKET, Key=key)
    server.client.delete_bucket(Bucket=BUCKET)


def content(item: int, size: int = 4096) -> bytes:
    return random.Random(item).randbytes(size)


def chain(*hashes: int) -> list[BlockDescriptor]:
    return [BlockDescriptor(item, item ^ 7, hashes[i - 1] if i else None, i) for i, item in enumerate(hashes)]


def put(tier: ObjectTier, *hashes: int) -> list[int]:
    return tier.put(chain(*hashes), [content(item) for item in hashes])


def test_blocks_come_back_whole_and_of_any_size(server: Server) -> None:
    tier = server.tier()
    assert tier.tier is Tier.EXTERNAL
    assert put(tier, 1, 2**64 - 1) == []
    tier.put([BlockDescriptor(5)], [content(5, 100_000)])
    assert tier.get([2**64 - 1, 9, 1, 5]) == [content(2**64 - 1), None, content(1), content(5, 100_000)]
    assert tier.describe([1, 9]) == chain(1)
    tier.close()
    tier.close()


def test_another_worker_finds_them_and_what_they_are(server: Server) -> None:
    put(server.tier(), 1, 2)
    other = server.tier()
    assert other.contains([1, 2, 3]) == [True, True, False]
    assert sorted(other.held(), key=lambda block: block.position) == chain(1, 2)
    assert other.get([1, 2]) == [content(1), content(2)]


def test_objects_named_as_release_0_1_did_are_found_and_described_once_read(server: Server) -> None:
    put(server.tier(), 1, 2)
    key = next(name for name in server.names() if "/0000000000000002-" in name)
    body = server.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    server.client.delete_object(Bucket=BUCKET, Key=key)
    server.client.put_object(Bucket=BUCKET, Key=key.partition("-")[0], Body=body)
    tier = server.tier()
    assert (tier.contains([2]), tier.describe([2])) == ([True], [])
    assert tier.get([2]) == [content(2)]
    assert (tier.describe([2]), tier.drain_changes()) == (chain(1, 2)[1:], [2])
    tier.remove([2])
    assert len(server.names()) == 1


def test_a_restarted_worker_announces_what_the_store_holds_and_what_others_add(server: Server) -> None:
    put(server.tier(), 1, 2)
    tier = server.tier(clock=(clock := FakeClock()))
    changes: list[TierChange] = []
    host = HostTier(4, 4096)
    manager = BlockManager(
        host, [TierConfig(tier)], block_bytes=4096, on_change=changes.append, metrics=Metrics(), clock=clock
    )
    assert changes == [TierChange(Tier.EXTERNAL, tuple(chain(1, 2)))]
    put(server.tier(), 1, 2, 3)
    server.client.delete_object(Bucket=BUCKET, Key=next(n for n in server.names() if "/0000000000000001-" in n))
    tier.refresh()
    manager.match([1])
    assert changes[1:] == [TierChange(Tier.EXTERNAL, tuple(chain(1, 2, 3)[2:]), (1,))]
    manager.close()


async def test_what_others_write_later_is_found_by_the_next_listing(server: Server) -> None:
    clock = FakeClock()
    tier = server.tier(clock=clock)
    put(server.tier(), 1)
    put(tier, 2)
    assert tier.contains([1]) == [False]
    await clock.advance(61.0)
    put(tier, 3)
    assert tier.contains([1, 2, 3]) == [True, True, True]


def test_blocks_of_another_model_are_never_seen(server: Server) -> None:
    put(server.tier(), 1)
    other = server.tier(fingerprint="m@2")
    assert other.contains([1]) == [False]


def test_a_full_tier_deletes_leaves(server: Server) -> None:
    tier = server.tier(capacity=2)
    put(tier, 1, 2)
    assert put(tier, 3) == [2]
    assert len(server.names()) == 2
    assert tier.contains([1, 2, 3]) == [True, False, True]


@pytest.mark.parametrize("damage", ["flip", "cut", "swap", "empty", "delete"])
def test_damaged_objects_are_misses(server: Server, damage: str) -> None:
    tier = server.tier()
    put(tier, 1, 2)
    one, two = sorted(server.names())
    body = server.client.get_object(Bucket=BUCKET, Key=one)["Body"].read()
    other = server.client.get_object(Bucket=BUCKET, Key=two)["Body"].read()
    changed = {"flip": body[:-1] + bytes([body[-1] ^ 1]), "cut": body[:-1], "swap": other, "empty": b""}
    if damage == "delete":
        server.client.delete_object(Bucket=BUCKET, Key=one)
    else:
        server.client.put_object(Bucket=BUCKET, Key=one, Body=changed[damage])
    assert tier.get([1, 2]) == [None, content(2)]
    assert tier.contains([1, 2]) == [False, True]


def test_a_store_that_goes_away_loses_blocks_and_nothing_else(server: Server) -> None:
    tier = server.tier()
    put(tier, 1)
    key = server.names()[0]
    server.client.delete_object(Bucket=BUCKET, Key=key)
    server.client.delete_bucket(Bucket=BUCKET)
    put(tier, 2)
    assert (tier.contains([2]), tier.failed_writes) == ([False], 1)
    assert tier.get([1]) == [None]
    server.client.create_bucket(Bucket=BUCKET)


def test_what_is_no_store_is_refused(server: Server) -> None:
    with pytest.raises(ConfigurationError, match="cannot be listed"):
        ObjectTier("s3://nothing/x", 4, fingerprint="m", config=server.config)
    with pytest.raises(ConfigurationError, match="cannot be opened"):
        ObjectTier("gopher://nothing", 4, fingerprint="m")
    with pytest.raises(ConfigurationError, match="at least 1"):
        ObjectTier("memory:///", 0, fingerprint="m")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'dynamo-kvbm\[object\]'"):
        ObjectTier("memory:///", 4, fingerprint="m")


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_a_cascade_of_three_tiers_behind_an_engine(tmp_path: Path, codec: str) -> None:
    """Blocks sink from host to disk to the object store, and another engine onboards them from there."""
    layout = KvConnectorConformance.layout
    (tmp_path / "objects").mkdir()
    options: dict[str, object] = {
        "host_blocks": 1,
        "disk_blocks": 2,
        "disk_dir": str(tmp_path / "disk"),
        "object_url": f"file://{tmp_path}/objects",
        "object_codec": codec,
        "model": "m@1",
    }
    device = DeviceBlocks(layout)
    device.write_blocks(range(8), [content(item, layout.block_bytes) for item in range(8)])
    first = create_connector(options=options, clock=SystemClock(), metrics=Metrics())
    first.start(device, lambda change: None)
    for item in range(8):
        first.on_evict([BlockDescriptor(100 + item)], [item])
        assert first.manager.flush(30.0)
    first.close()
    (tmp_path / "other").mkdir()
    second = create_connector(
        options=options | {"disk_dir": str(tmp_path / "other")}, clock=SystemClock(), metrics=Metrics()
    )
    second.start(device, lambda change: None)
    assert second.match([100]).tiers == (Tier.EXTERNAL,)
    assert second.onboard([100], [20]) == 1
    assert device.blocks[20] == device.blocks[0]
    assert second.match([100]).tiers == (Tier.HOST,)
    second.close()
