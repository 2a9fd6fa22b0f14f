from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dynamo_core import plugins
from dynamo_core.errors import ConfigurationError
from dynamo_core.kv import BlockDescriptor, BlockHints, BlockLayout, SupportsBlockHints, SupportsPrefetch
from dynamo_core.telemetry import Metrics
from dynamo_core.testing import DeviceBlocks, FakeClock
from dynamo_kvbm import HostTier, KvbmConnector, create_connector
from dynamo_kvbm._eviction import hints as hints_module
from dynamo_kvbm._eviction.hinted import HintedOrder

LAYOUT = BlockLayout(num_layers=1, block_size=2, kv_heads=1, head_dim=2)


def chain(*hashes: int) -> list[BlockDescriptor]:
    return [BlockDescriptor(item, 0, hashes[i - 1] if i else None, i) for i, item in enumerate(hashes)]


class Stage:
    """A connector with a host of four blocks and a device of ten."""

    def __init__(self, eviction: str, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
        load = plugins.load

        def with_clock(kind: str, name: str) -> Any:
            order = load(kind, name)
            return (lambda capacity: HintedOrder(capacity, clock=clock)) if order is HintedOrder else order

        monkeypatch.setattr(plugins, "load", with_clock)
        options = {"host_blocks": 4, "eviction": eviction}
        self.connector: KvbmConnector = create_connector(options=options, clock=clock, metrics=Metrics())
        self.device = DeviceBlocks(LAYOUT)
        self.device.blocks = {i: bytes([i]) * LAYOUT.block_bytes for i in range(10)}
        self.connector.start(self.device, lambda change: None)

    def evict(self, *hashes: int) -> None:
        self.connector.on_evict(chain(*hashes), range(len(hashes)))

    def held(self, *hashes: int) -> list[int]:
        there = self.connector.manager.nearest.contains(hashes)
        return [item for item, present in zip(hashes, there, strict=True) if present]


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, FakeClock], Stage]:
    return lambda eviction, clock: Stage(eviction, clock, monkeypatch)


def test_it_supports_what_core_names(stage: Callable[[str, FakeClock], Stage]) -> None:
    connector = stage("lru", FakeClock()).connector
    assert isinstance(connector, SupportsBlockHints)
    assert isinstance(connector, SupportsPrefetch)


@pytest.mark.parametrize("hinted_first", [True, False])
def test_an_ended_session_goes_before_one_that_comes_back(
    stage: Callable[[str, FakeClock], Stage], hinted_first: bool
) -> None:
    ours = stage("hinted", FakeClock())
    hints = [([1, 2], BlockHints(next_turn_s=30.0)), ([3, 4], BlockHints(session_ended=True))]
    for hashes, hint in hints:
        if hinted_first:
            ours.connector.hint(hashes, hint)
        ours.evict(*hashes)
        if not hinted_first:
            ours.connector.hint(hashes, hint)
    ours.evict(5, 6)
    assert ours.held(1, 2, 3, 4, 5, 6) == [1, 2, 5, 6]


def test_a_priority_holds_whether_it_comes_before_or_after_the_blocks(
    stage: Callable[[str, FakeClock], Stage],
) -> None:
    ours = stage("priority", FakeClock())
    ours.connector.hint([1], BlockHints(priority=5))
    ours.evict(1)
    ours.evict(2)
    ours.evict(3)
    ours.connector.hint([2], BlockHints(priority=5))
    ours.evict(4)
    ours.evict(5, 6)
    assert ours.held(1, 2, 3, 4) == [1, 2]


async def test_retained_blocks_stay_for_their_time_in_any_order(stage: Callable[[str, FakeClock], Stage]) -> None:
    clock = FakeClock()
    ours = stage("lru", clock)
    ours.connector.hint([1, 2], BlockHints(retain_s=10.0))
    ours.evict(1, 2)
    ours.evict(3, 4)
    ours.evict(5, 6, 7)
    assert ours.held(1, 2) == [1, 2]
    await clock.advance(11.0)
    ours.evict(8, 9, 10)
    assert ours.held(2) == []
    assert isinstance(ours.connector.manager.nearest, HostTier)
    ours.connector.manager.nearest.check_integrity()


async def test_no_more_than_half_is_retained_and_a_new_time_replaces_the_old(
    stage: Callable[[str, FakeClock], Stage],
) -> None:
    clock = FakeClock()
    ours = stage("lru", clock)
    ours.evict(1, 2, 3)
    ours.connector.hint([1, 2, 3], BlockHints(retain_s=10.0))
    ours.connector.hint([1], BlockHints(retain_s=100.0))
    ours.evict(4)
    ours.evict(5, 6)
    assert ours.held(1, 2, 3) == [1, 2]
    await clock.advance(11.0)
    ours.evict(7, 8, 9)
    assert ours.held(1, 2) == [1]


def test_clear_drops_retained_blocks_too(stage: Callable[[str, FakeClock], Stage]) -> None:
    ours = stage("lru", FakeClock())
    ours.evict(1)
    ours.connector.hint([1], BlockHints(retain_s=10.0))
    ours.connector.clear()
    assert ours.held(1) == []


def test_hints_are_bounded(stage: Callable[[str, FakeClock], Stage], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hints_module, "MAX_HINTED", 2)
    ours = stage("priority", FakeClock())
    ours.connector.hint([1, 2, 3], BlockHints(priority=5))
    for item in (1, 4, 5, 6):
        ours.evict(item)
    ours.evict(7)
    assert ours.held(1) == []


def test_a_prefetch_brings_near_and_a_full_queue_is_no_error(
    stage: Callable[[str, FakeClock], Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = stage("lru", FakeClock())
    ours.connector.prefetch([1, 2])
    from dynamo_core.errors import CapacityExhaustedError

    def full(sequence_hashes: object, *, priority: int = 0) -> None:
        raise CapacityExhaustedError("too many")

    monkeypatch.setattr(ours.connector.manager, "prefetch", full)
    ours.connector.prefetch([1, 2])
    ours.connector.close()


class Shares(Stage):
    """A connector with a host of six blocks, of which tenant ``a`` may have two."""

    def __init__(self, clock: FakeClock, metrics: Metrics) -> None:
        options = {"host_blocks": 6, "host_quotas": {"a": 2}}
        self.connector = create_connector(options=options, clock=clock, metrics=metrics)
        self.device = DeviceBlocks(LAYOUT)
        self.device.blocks = {i: bytes([i]) * LAYOUT.block_bytes for i in range(10)}
        self.connector.start(self.device, lambda change: None)

    def check(self) -> None:
        host = self.connector.manager.nearest
        assert isinstance(host, HostTier)
        host.check_integrity()


def test_a_tenant_s_scan_pushes_out_its_own_blocks_only() -> None:
    metrics = Metrics()
    ours = Shares(FakeClock(), metrics)
    ours.connector.hint([1, 2, 3], BlockHints(tenant="b"))
    ours.evict(1, 2, 3)
    for item in range(10, 20):
        ours.connector.hint([item], BlockHints(tenant="a"))
        ours.evict(item)
        ours.check()
    assert ours.held(1, 2, 3, *range(10, 20)) == [1, 2, 3, 18, 19]
    assert metrics.registry.get_sample_value("dynamo_kvbm_tenant_used_blocks", {"tenant": "a"}) == 2


def test_a_batch_larger_than_a_quota_stores_as_much_as_the_quota() -> None:
    ours = Shares(FakeClock(), Metrics())
    ours.connector.hint([1, 2, 3, 4], BlockHints(tenant="a"))
    ours.evict(1, 2, 3, 4)
    assert ours.held(1, 2, 3, 4) == [1, 2]
    ours.check()


@pytest.mark.parametrize("child_first", [True, False])
def test_a_parent_of_another_tenant_outlives_its_child_and_can_be_dropped(child_first: bool) -> None:
    ours = Shares(FakeClock(), Metrics())
    ours.connector.hint([1], BlockHints(tenant="a"))
    ours.connector.hint([2], BlockHints(tenant="b"))
    parent, child = chain(1, 2)
    for block in (child, parent) if child_first else (parent, child):
        ours.connector.on_evict([block], [0])
    for item in range(10, 13):
        ours.connector.hint([item], BlockHints(tenant="a"))
        ours.evict(item)
        ours.check()
    assert ours.held(1, 2) == [1, 2], "the child keeps its parent, though its tenant scans"
    for item in range(20, 26):
        ours.evict(item)
        ours.check()
        assert ours.held(2) == [] or ours.held(1) == [1]
    ours.connector.clear()
    assert ours.held(1, 2, *range(10, 26)) == []
    ours.check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host_blocks": 4, "host_quotas": {"a": 5}}, "quota 5 of tenant 'a' must be 1 to 4 blocks"),
        (
            {"host_blocks": 4, "host_quotas": {"a": 1}, "host_dir": "/x", "model": "m"},
            "leave host_dir or host_quotas out",
        ),
    ],
)
def test_quotas_that_cannot_hold_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        create_connector(options=options, clock=FakeClock(), metrics=Metrics()).start(
            DeviceBlocks(LAYOUT), lambda change: None
        )
