from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from dynamo_core import plugins
from dynamo_core.clock import SystemClock
from dynamo_core.enums import Tier
from dynamo_core.errors import ConfigurationError, InternalError
from dynamo_core.kv import BlockDescriptor, BlockLayout, KvConnector, TierChange
from dynamo_core.noop.kv import DictBlockStore
from dynamo_core.telemetry import Metrics
from dynamo_kvbm import KvbmConnector, create_connector

LAYOUT = BlockLayout(num_layers=1, block_size=2, kv_heads=1, head_dim=2, dtype="f32")


class DeviceBlocks:
    """Device memory as a list of byte strings."""

    def __init__(self, blocks: int) -> None:
        self.layout = LAYOUT
        self.data = [bytes([i]) * LAYOUT.block_bytes for i in range(blocks)]

    def read_blocks(self, block_ids: Sequence[int]) -> list[bytes]:
        return [self.data[i] for i in block_ids]

    def write_blocks(self, block_ids: Sequence[int], data: Sequence[bytes | memoryview]) -> None:
        for i, piece in zip(block_ids, data, strict=True):
            self.data[i] = bytes(piece)


def chain(*hashes: int) -> list[BlockDescriptor]:
    return [BlockDescriptor(item, parent_hash=hashes[i - 1] if i else None) for i, item in enumerate(hashes)]


def bound(device: DeviceBlocks, **options: object) -> tuple[KvbmConnector, list[TierChange]]:
    connector = create_connector(options=options, clock=SystemClock(), metrics=Metrics())
    changes: list[TierChange] = []
    connector.start(device, changes.append)
    return connector, changes


def test_it_is_a_kv_connector() -> None:
    assert isinstance(bound(DeviceBlocks(1))[0], KvConnector)


def test_evicted_blocks_come_back_to_other_device_blocks_with_the_same_bytes() -> None:
    device = DeviceBlocks(4)
    connector, changes = bound(device, host_blocks=4)
    blocks = chain(11, 12)
    connector.on_register(blocks, [0, 1])
    assert changes == []
    connector.on_evict(blocks, [0, 1])
    assert changes == [TierChange(Tier.HOST, tuple(blocks))]
    assert connector.match([11, 12, 13]).tiers == (Tier.HOST, Tier.HOST)
    assert connector.onboard([11, 12, 13], [2, 3, 0]) == 2
    assert device.data[2:] == device.data[:2]


def test_the_register_policy_copies_at_once_and_only_once() -> None:
    connector, changes = bound(DeviceBlocks(4), host_blocks=4, offload="register")
    connector.on_register(chain(11), [0])
    connector.on_register(chain(11), [0])
    connector.on_evict(chain(11), [0])
    assert [len(change.stored) for change in changes] == [1]


def test_a_full_tier_says_what_it_dropped_and_never_announces_what_it_did_not_keep() -> None:
    connector, changes = bound(DeviceBlocks(4), host_blocks=2)
    connector.on_evict(chain(11, 12), [0, 1])
    connector.on_evict(chain(21, 22, 23), [0, 1, 2])
    present: set[int] = set()
    for change in changes:
        present -= set(change.removed)
        present |= {item.sequence_hash for item in change.stored}
    assert present == {item for item in (11, 12, 21, 22, 23) if connector.manager.contains([item])[0]}
    assert len(present) == 2


def test_clear_announces_the_removal() -> None:
    connector, changes = bound(DeviceBlocks(4), host_blocks=4)
    connector.on_evict(chain(11), [0])
    connector.clear()
    assert changes[-1] == TierChange(Tier.HOST, removed=(11,))
    assert connector.match([11]).blocks == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host_blocs": 4}, "host_blocs"),
        ({"host_blocks": -1}, "host_blocks"),
        ({"offload": "sometimes"}, "offload"),
        ({"eviction": "clairvoyant"}, "clairvoyant.*installed: arc, hinted, lineage, lru"),
        ({"host_blocks": 0, "host_bytes": 0}, "leave the connector out"),
        ({"store_options": {"a": 1}}, "store_options needs store"),
        ({"disk_dir": "d"}, "disk_dir needs model"),
        ({"disk_blocks": 4}, "disk_blocks needs disk_dir"),
        ({"disk_dir": "d", "model": "m", "disk_bytes": 0}, "disk_blocks and disk_bytes"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        create_connector(options=options, clock=SystemClock(), metrics=Metrics())


def test_a_host_smaller_than_one_block_is_refused_at_start() -> None:
    with pytest.raises(ConfigurationError, match="holds no block of 32 bytes"):
        bound(DeviceBlocks(1), host_bytes=31)


def test_use_before_start_is_a_defect() -> None:
    connector = create_connector(options={}, clock=SystemClock(), metrics=Metrics())
    connector.close()
    with pytest.raises(InternalError, match="not bound"):
        connector.match([1])


def test_metrics_count_blocks_by_tier() -> None:
    metrics = Metrics(labels={"dynamo_component": "worker"})
    connector = create_connector(options={"host_blocks": 1}, clock=SystemClock(), metrics=metrics)
    connector.start(DeviceBlocks(2), lambda change: None)
    connector.on_evict(chain(1), [0])
    connector.on_evict(chain(2), [1])
    value = metrics.registry.get_sample_value
    labels = {"dynamo_component": "worker", "tier": "host_pinned"}
    assert value("dynamo_kvbm_offloaded_blocks_total", labels) == 2
    assert value("dynamo_kvbm_evicted_blocks_total", labels) == 1
    assert value("dynamo_kvbm_used_blocks", labels) == 1


def test_the_second_touch_policy_copies_what_was_computed_again() -> None:
    connector, changes = bound(DeviceBlocks(4), host_blocks=4, offload="second-touch")
    connector.on_register(chain(11), [0])
    connector.on_evict(chain(11), [0])
    assert changes == []
    connector.on_register(chain(11), [0])
    assert [len(change.stored) for change in changes] == [1]


def test_a_disk_tier_survives_the_connector_and_keeps_to_its_model(tmp_path: Path) -> None:
    options: dict[str, object] = {"host_blocks": 1, "disk_dir": str(tmp_path), "disk_blocks": 4, "model": "m@1"}
    device = DeviceBlocks(4)
    connector, _ = bound(device, **options)
    connector.on_evict(chain(11, 12), [0, 1])
    connector.on_evict(chain(21), [2])
    connector.close()
    again, changes = bound(device, **options)
    assert [change.tier for change in changes] == [Tier.DISK]
    assert again.onboard([11], [3]) == 1
    assert device.data[3] == device.data[0]
    again.close()
    with pytest.raises(ConfigurationError, match="m@1"):
        bound(device, **options | {"model": "m@2"})
    bound(device, **options)[0].close()


class RemoteStore(DictBlockStore):
    """A tier of somebody else's package."""

    def __init__(self, *, layout: BlockLayout, fingerprint: str, capacity_blocks: int) -> None:
        super().__init__(capacity_blocks, tier=Tier.EXTERNAL)
        self.made_for = (layout, fingerprint)


def installed(monkeypatch: pytest.MonkeyPatch, factory: object) -> None:
    load = plugins.load
    monkeypatch.setattr(plugins, "load", lambda kind, name: factory if kind == "kv_tiers" else load(kind, name))


def test_a_tier_of_another_package_gets_what_the_host_evicts(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, RemoteStore)
    device = DeviceBlocks(6)
    connector, changes = bound(device, host_blocks=1, store="remote", store_options={"capacity_blocks": 8}, model="m@1")
    store = connector.manager.stores[-1]
    assert isinstance(store, RemoteStore)
    assert store.made_for[0] == LAYOUT
    assert "m@1" in store.made_for[1]
    connector.on_evict(chain(11), [0])
    connector.on_evict(chain(12), [1])
    assert connector.manager.flush(30.0)
    assert connector.match([11]).tiers == (Tier.EXTERNAL,)
    assert connector.onboard([11], [5]) == 1
    assert device.data[5] == device.data[0]
    assert Tier.EXTERNAL in {change.tier for change in changes}
    connector.close()


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        (RemoteStore, {"capacity": 8}, "refuses store_options.*capacity"),
        (lambda layout, fingerprint: object(), {}, "made a object, which is no"),
    ],
)
def test_a_tier_that_cannot_be_made_is_named(
    monkeypatch: pytest.MonkeyPatch, factory: object, options: dict[str, object], message: str
) -> None:
    installed(monkeypatch, factory)
    with pytest.raises(ConfigurationError, match=message):
        bound(DeviceBlocks(1), host_blocks=1, store="remote", store_options=options)
