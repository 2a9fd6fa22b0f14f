from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dynamo_core import plugins
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
