from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_core.clock import SystemClock
from dynamo_core.enums import Tier
from dynamo_core.errors import ConfigurationError, UnavailableError
from dynamo_core.kv import BlockDescriptor, TierChange
from dynamo_core.noop.kv import DictBlockStore
from dynamo_core.telemetry import Metrics
from dynamo_core.testing import FakeClock
from dynamo_kvbm._admission import CostTest
from dynamo_kvbm._manager import BlockManager, TierConfig
from dynamo_kvbm._settings import OffloadPolicy
from dynamo_kvbm._tiers.disk import DiskTier
from dynamo_kvbm._tiers.host import HostTier
from dynamo_kvbm._tiers.shared_host import SharedHostTier

BLOCK_BYTES = 64
DEADLINE_S = 30.0


def content(sequence_hash: int) -> bytes:
    return sequence_hash.to_bytes(8, "little") * (BLOCK_BYTES // 8)


def chain(*hashes: int) -> list[BlockDescriptor]:
    return [BlockDescriptor(item, item, hashes[i - 1] if i else None, i) for i, item in enumerate(hashes)]


class Stage:
    """A cascade, what it announced, and its metrics."""

    def __init__(self, host_blocks: int, *lower: TierConfig, cost_test: CostTest | None = None) -> None:
        self.metrics = Metrics()
        self.present: dict[Tier, set[int]] = {}
        self.changes: list[TierChange] = []
        self.host = HostTier(host_blocks, BLOCK_BYTES)
        self.manager = BlockManager(
            self.host,
            lower,
            block_bytes=BLOCK_BYTES,
            on_change=self.on_change,
            metrics=self.metrics,
            clock=SystemClock(),
            cost_test=cost_test,
        )

    def on_change(self, change: TierChange) -> None:
        held = self.present.setdefault(change.tier, set())
        stored = {block.sequence_hash for block in change.stored}
        assert not stored & held, "a block was announced twice"
        assert set(change.removed) <= held, "a block was taken back that was not announced"
        held |= stored
        held -= set(change.removed)
        self.changes.append(change)

    def offload(self, *hashes: int) -> None:
        self.manager.offload(chain(*hashes), [content(item) for item in hashes])

    def lend(self, *hashes: int) -> list[bytes]:
        with self.manager.lend(hashes) as views:
            return [bytes(view) for view in views]

    def settle(self) -> None:
        assert self.manager.flush(DEADLINE_S)

    def value(self, name: str, tier: Tier, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, {"tier": tier.value, **labels})


class GatedStore(DictBlockStore):
    """A disk whose writes wait until they are let through."""

    def __init__(self, capacity_blocks: int) -> None:
        super().__init__(capacity_blocks, tier=Tier.DISK)
        self.entered = threading.Event()
        self.gate = threading.Event()

    def put(self, blocks: Sequence[BlockDescriptor], data: Sequence[bytes | memoryview]) -> list[int]:
        self.entered.set()
        assert self.gate.wait(DEADLINE_S)
        return super().put(blocks, data)


class BrokenStore(DictBlockStore):
    def put(self, blocks: Sequence[BlockDescriptor], data: Sequence[bytes | memoryview]) -> list[int]:
        raise UnavailableError("the store is away")


def disk_stage(path: Path, *, host: int = 2, disk: int = 8, policy: OffloadPolicy = OffloadPolicy.EVICT) -> Stage:
    return Stage(host, TierConfig(DiskTier(path, disk, BLOCK_BYTES), policy))


def test_what_the_host_evicts_sinks_and_comes_back_from_both(tmp_path: Path) -> None:
    stage = disk_stage(tmp_path)
    stage.offload(1, 2)
    stage.offload(3, 4)
    stage.settle()
    assert stage.present == {Tier.HOST: {3, 4}, Tier.DISK: {1, 2}}
    assert stage.manager.match([1, 2, 9]).tiers == (Tier.DISK, Tier.DISK)
    assert stage.lend(1, 2, 9) == [content(1), content(2)]
    stage.settle()
    assert stage.present == {Tier.HOST: {1, 2}, Tier.DISK: {1, 2, 3, 4}}
    assert stage.manager.match([1, 2]).tiers == (Tier.HOST, Tier.HOST)
    assert stage.value("dynamo_kvbm_onboarded_blocks_total", Tier.DISK) == 2
    assert stage.value("dynamo_kvbm_used_blocks", Tier.DISK) == 4


def test_a_prefix_may_lie_in_several_tiers(tmp_path: Path) -> None:
    stage = disk_stage(tmp_path, host=2)
    stage.offload(1, 2, 3)
    stage.offload(7)
    stage.settle()
    stage.offload(3)
    stage.settle()
    found = stage.manager.match([1, 2, 3])
    assert set(found.tiers) == {Tier.HOST, Tier.DISK} or found.blocks == 2
    assert stage.lend(1, 2, 3)[: found.blocks] == [content(item) for item in (1, 2, 3)[: found.blocks]]


def test_a_third_tier_gets_what_the_second_evicts(tmp_path: Path) -> None:
    external = DictBlockStore(16, tier=Tier.EXTERNAL)
    stage = Stage(1, TierConfig(DiskTier(tmp_path, 2, BLOCK_BYTES)), TierConfig(external))
    for item in range(1, 8):
        stage.offload(item)
        stage.settle()
    assert stage.present == {Tier.HOST: {7}, Tier.DISK: {5, 6}, Tier.EXTERNAL: {1, 2, 3, 4}}
    assert stage.lend(1) == [content(1)]


def test_a_slow_disk_costs_blocks_and_never_time() -> None:
    disk = GatedStore(64)
    stage = Stage(1, TierConfig(disk, queue_blocks=2))
    stage.offload(1)
    stage.offload(2)
    assert disk.entered.wait(DEADLINE_S)
    for item in range(3, 9):
        stage.offload(item)
    assert stage.value("dynamo_kvbm_dropped_blocks_total", Tier.DISK, reason="queue_full") == 5
    # What is staged can be read while the disk is busy.
    assert stage.manager.match([1]).tiers == (Tier.DISK,)
    assert stage.lend(2) == [content(2)]
    disk.gate.set()
    stage.settle()
    assert stage.present[Tier.DISK] == {1, 2}
    stage.manager.close()


def test_a_store_that_fails_loses_the_block_and_says_so() -> None:
    stage = Stage(1, TierConfig(BrokenStore(4, tier=Tier.EXTERNAL)))
    stage.offload(1)
    stage.offload(2)
    stage.settle()
    assert stage.value("dynamo_kvbm_dropped_blocks_total", Tier.EXTERNAL, reason="write_failed") == 1
    assert stage.manager.match([1]).blocks == 0


def test_a_cleared_cascade_stays_empty_though_a_write_was_under_way() -> None:
    disk = GatedStore(64)
    stage = Stage(1, TierConfig(disk))
    stage.offload(1)
    stage.offload(2)
    assert disk.entered.wait(DEADLINE_S)
    stage.offload(3)
    stage.manager.clear()
    disk.gate.set()
    stage.settle()
    assert stage.present == {Tier.HOST: set()}
    assert disk.contains([1, 2, 3]) == [False] * 3


def test_the_register_policy_writes_at_once(tmp_path: Path) -> None:
    stage = disk_stage(tmp_path, host=4, policy=OffloadPolicy.REGISTER)
    stage.offload(1, 2)
    stage.settle()
    assert stage.present == {Tier.HOST: {1, 2}, Tier.DISK: {1, 2}}


def test_second_touch_lets_down_only_what_was_used_again(tmp_path: Path) -> None:
    stage = disk_stage(tmp_path, host=2, policy=OffloadPolicy.SECOND_TOUCH)
    stage.offload(1)
    stage.offload(2)
    stage.manager.match([1])
    stage.offload(3)
    stage.offload(4)
    stage.settle()
    assert stage.present[Tier.DISK] == {1}


def test_a_restart_announces_what_the_disk_holds_parents_first(tmp_path: Path) -> None:
    first = disk_stage(tmp_path, policy=OffloadPolicy.REGISTER)
    first.offload(3, 1, 2)
    first.settle()
    first.manager.close()
    again = disk_stage(tmp_path)
    assert [[block.sequence_hash for block in change.stored] for change in again.changes] == [[3, 1, 2]]
    assert again.lend(3, 1) == [content(3), content(1)]


def test_close_writes_what_is_staged(tmp_path: Path) -> None:
    first = disk_stage(tmp_path, host=1)
    first.offload(1)
    first.offload(2)
    first.manager.close()
    first.manager.close()
    assert disk_stage(tmp_path).present == {Tier.DISK: {1}}


def test_a_damaged_block_ends_the_prefix_and_is_taken_back(tmp_path: Path) -> None:
    stage = disk_stage(tmp_path, host=1)
    stage.offload(1)
    stage.offload(2)
    stage.settle()
    with (tmp_path / "0000.data").open("r+b") as file:
        file.write(b"\xff" * BLOCK_BYTES)
    assert stage.manager.match([1]).blocks == 1
    assert stage.lend(1) == []
    assert stage.present[Tier.DISK] == set()


def test_a_tier_that_costs_more_than_computing_is_not_offered(tmp_path: Path) -> None:
    clock = FakeClock()
    cost = CostTest(clock)
    stage = Stage(1, TierConfig(DiskTier(tmp_path, 4, BLOCK_BYTES)), cost_test=cost)
    stage.offload(1)
    stage.offload(2)
    stage.settle()
    cost.fetched("disk", 1, 0.5)
    assert stage.manager.match([1]).blocks == 1
    cost.recompute_s = 0.1
    assert stage.manager.match([1]).blocks == 0
    assert stage.value("dynamo_kvbm_refused_blocks_total", Tier.DISK) == 1
    assert stage.manager.match([2]).blocks == 1


def test_what_is_fetched_ahead_is_near_when_it_is_asked_for(tmp_path: Path) -> None:
    stage = disk_stage(tmp_path, host=4, disk=16)
    stage.offload(1, 2, 3)
    stage.offload(7, 8, 9, 10)
    stage.settle()
    assert stage.manager.match([1, 2, 3]).tiers == (Tier.DISK,) * 3
    assert stage.manager.prefetch([1, 2, 3, 99]).result(DEADLINE_S) == 3
    assert stage.manager.match([1, 2, 3]).tiers == (Tier.HOST,) * 3
    assert stage.lend(1, 2, 3) == [content(1), content(2), content(3)]
    stage.settle()
    assert stage.present[Tier.HOST] == {block.sequence_hash for block in stage.host.held()}
    stage.manager.close()


def test_two_tiers_of_one_kind_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="two tiers are disk"):
        Stage(1, TierConfig(GatedStore(1)), TierConfig(GatedStore(1)))


def test_a_tier_below_one_that_cannot_spill_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="put it last"):
        Stage(1, TierConfig(DictBlockStore(1, tier=Tier.DISK)), TierConfig(DictBlockStore(1, tier=Tier.EXTERNAL)))


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.tuples(st.sampled_from("olmc"), st.integers(0, 5), st.integers(1, 5)), max_size=25))
def test_any_sequence_of_operations_serves_right_bytes_and_announces_the_truth(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]
) -> None:
    stage = disk_stage(tmp_path_factory.mktemp("disk"), host=3, disk=5)
    for step, start, length in steps:
        hashes = [start * 10 + i + 1 for i in range(length)]
        if step == "o":
            stage.offload(*hashes)
        elif step == "l":
            found = stage.lend(*hashes)
            assert found == [content(item) for item in hashes[: len(found)]]
        elif step == "m":
            stage.settle()
            matched = stage.manager.match(hashes).blocks
            assert len(stage.lend(*hashes)) == matched
        else:
            stage.manager.clear()
    stage.settle()
    for store in stage.manager.stores:
        held = {item for item in range(60) if store.contains([item])[0]}
        assert held == stage.present.get(store.tier, set())
        assert len(held) <= store.capacity_blocks
    stage.host.check_integrity()
    stage.manager.close()


def test_what_another_process_stored_in_a_shared_host_is_found_and_announced(tmp_path: Path) -> None:
    ours, other = (SharedHostTier(tmp_path, 4, BLOCK_BYTES) for _ in range(2))
    other.put(chain(1, 2), [content(1), content(2)])
    changes: list[TierChange] = []
    metrics = Metrics()
    manager = BlockManager(
        ours, block_bytes=BLOCK_BYTES, on_change=changes.append, metrics=metrics, clock=SystemClock()
    )
    other.put([BlockDescriptor(7)], [content(7)])
    assert manager.match([1, 2]).blocks == 2
    with manager.lend([1, 2]) as views:
        assert [bytes(view) for view in views] == [content(1), content(2)]
    other.remove([2])
    assert manager.match([1, 2]).blocks == 1
    assert [[block.sequence_hash for block in change.stored] for change in changes] == [[1, 2], [7], []]
    assert changes[-1].removed == (2,)
    pages = {"tier": "host_pinned", "pages": ours.pages.value}
    assert metrics.registry.get_sample_value("dynamo_kvbm_arena_bytes", pages) == 4 * BLOCK_BYTES
    manager.close()
    other.close()
