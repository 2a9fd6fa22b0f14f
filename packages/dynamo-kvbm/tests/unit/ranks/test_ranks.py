from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dynamo_core.errors import ConfigurationError, InternalError, InvalidRequestError
from dynamo_core.kv import BlockDescriptor, BlockLayout, TierChange
from dynamo_kvbm._ranks import leader as leader_module
from dynamo_kvbm._transfer.layout import ArenaLayout, KvArena, shard_layout
from dynamo_kvbm.connector_sdk import ArenaBlockAccess, PlanOutcome, RankLeader, RankPlan, RankReport, RankWorker

WHOLE = BlockLayout(num_layers=2, block_size=4, kv_heads=4, head_dim=4)
RANKS = 2
DEVICE_BLOCKS = 6
SLOTS = 4


def chain(*hashes: int) -> list[BlockDescriptor]:
    return [BlockDescriptor(item, 0, hashes[i - 1] if i else None, i) for i, item in enumerate(hashes)]


def content(item: int) -> np.ndarray:
    return np.random.default_rng(item).standard_normal(WHOLE.shape, dtype=np.float32)


class Device(ArenaBlockAccess):
    """One rank's device memory that can be told to fail."""

    def __init__(self, rank: int) -> None:
        self.arena = KvArena(ArenaLayout(shard_layout(WHOLE, rank, RANKS), DEVICE_BLOCKS))
        super().__init__(self.arena)
        self.broken = False

    def read_blocks(self, block_ids: Sequence[int]) -> list[bytes]:
        if self.broken:
            raise OSError("the device is away")
        return super().read_blocks(block_ids)

    def write_blocks(self, block_ids: Sequence[int], data: Sequence[bytes | memoryview]) -> None:
        if self.broken:
            raise OSError("the device is away")
        super().write_blocks(block_ids, data)


class Engine:
    """A leader and its ranks; plans and reports travel as bytes."""

    def __init__(self) -> None:
        self.present: set[int] = set()
        self.devices = [Device(rank) for rank in range(RANKS)]
        self.leader = RankLeader(SLOTS, RANKS, on_change=self.on_change)
        self.workers = [RankWorker(rank, device, SLOTS) for rank, device in enumerate(self.devices)]

    def on_change(self, change: TierChange) -> None:
        stored = {block.sequence_hash for block in change.stored}
        assert not stored & self.present
        assert set(change.removed) <= self.present
        self.present = (self.present | stored) - set(change.removed)

    def compute(self, item: int, block_id: int) -> None:
        for rank, device in enumerate(self.devices):
            part = WHOLE.kv_heads // RANKS
            device.arena.view[block_id] = content(item)[..., rank * part : (rank + 1) * part, :]

    def holds(self, item: int, block_id: int) -> bool:
        whole = np.concatenate([device.arena.view[block_id] for device in self.devices], axis=-2)
        return bool(np.array_equal(whole, content(item)))

    def reports(self, plan: RankPlan) -> list[RankReport]:
        wire = msgspec.msgpack.encode(plan)
        done = [worker.execute(msgspec.msgpack.decode(wire, type=RankPlan)) for worker in self.workers]
        return [msgspec.msgpack.decode(msgspec.msgpack.encode(report), type=RankReport) for report in done]

    def step(self) -> PlanOutcome | None:
        plan = self.leader.take_plan()
        if plan is None:
            return None
        outcomes = [self.leader.on_report(report) for report in self.reports(plan)]
        assert outcomes[:-1] == [None] * (RANKS - 1)
        return outcomes[-1]


def stored(*hashes: int) -> Engine:
    engine = Engine()
    for block_id, item in enumerate(hashes):
        engine.compute(item, block_id)
    assert engine.leader.offload(chain(*hashes), range(len(hashes))) == list(hashes)
    assert engine.leader.match(hashes).blocks == 0, "no block is present before all ranks have reported"
    engine.step()
    return engine


def test_shards_come_back_to_every_rank_and_make_the_whole_block() -> None:
    engine = stored(1, 2)
    assert engine.present == {1, 2}
    for device in engine.devices:
        device.arena.view[:] = 0
    assert engine.leader.match([1, 2, 3]).blocks == 2
    assert engine.leader.onboard([1, 2, 3], [5, 4, 3]) == 2
    assert engine.step() == PlanOutcome(2)
    assert engine.holds(1, 5)
    assert engine.holds(2, 4)
    assert engine.leader.take_plan() is None


def test_a_device_block_is_copied_out_before_it_is_copied_over() -> None:
    engine = stored(1)
    engine.compute(2, 3)
    engine.leader.onboard([1], [3])
    engine.leader.offload(chain(2), [3])
    engine.step()
    assert engine.holds(1, 3)
    engine.leader.onboard([2], [0])
    engine.step()
    assert engine.holds(2, 0)


def test_a_block_that_one_rank_could_not_keep_is_kept_by_none() -> None:
    engine = Engine()
    engine.devices[1].broken = True
    engine.leader.offload(chain(1, 2), [0, 1])
    assert engine.step() == PlanOutcome(1)
    assert (engine.present, engine.leader.present_blocks) == (set(), 0)
    engine.leader.check_integrity()


def test_a_block_that_one_rank_could_not_load_is_dropped_and_named() -> None:
    engine = stored(1, 2)
    engine.devices[0].broken = True
    engine.leader.onboard([1, 2], [4, 5])
    assert engine.step() == PlanOutcome(2, (), (1, 2))
    assert engine.present == set()
    engine.leader.check_integrity()


def test_a_rank_that_restarted_without_telling_serves_no_foreign_bytes() -> None:
    engine = stored(1)
    engine.workers[1] = RankWorker(1, engine.devices[1], SLOTS)
    engine.leader.onboard([1], [4])
    assert engine.step() == PlanOutcome(2, (), (1,))
    assert engine.present == set()


def test_a_lost_rank_takes_everything_until_it_is_back() -> None:
    engine = stored(1, 2)
    engine.leader.onboard([1], [4])
    plan = engine.leader.take_plan()
    assert plan is not None
    engine.leader.onboard([2], [5])
    first, second = engine.leader.lose_rank(1)
    assert (first.not_onboarded, second.not_onboarded) == ((1,), (2,))
    assert engine.present == set()
    assert engine.leader.offload(chain(3), [0]) == []
    assert [engine.leader.on_report(report) for report in engine.reports(plan)] == [None, None]
    engine.leader.join_rank(1)
    engine.compute(3, 0)
    assert engine.leader.offload(chain(3), [0]) == [3]
    engine.step()
    assert engine.present == {3}
    engine.leader.check_integrity()
    with pytest.raises(InvalidRequestError, match="ranks 0 to 1, not 2"):
        engine.leader.lose_rank(2)


def test_what_is_being_loaded_is_neither_evicted_nor_cleared() -> None:
    engine = stored(1, 2, 3, 4)
    engine.leader.onboard([1, 2, 3, 4], [0, 1, 2, 3])
    assert engine.leader.offload(chain(9), [5]) == []
    engine.leader.clear()
    engine.step()
    assert engine.present == {1, 2, 3, 4}
    engine.leader.clear()
    assert engine.present == set()


def test_a_full_arena_evicts_leaves_and_keeps_parents_of_new_blocks() -> None:
    engine = stored(1, 2, 3, 4)
    assert engine.leader.offload([BlockDescriptor(5, 0, 3, 3)], [0]) == [5]
    assert engine.present == {1, 2, 3}


def test_ranks_that_never_report_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader_module, "MAX_PLANS", 1)
    engine = Engine()
    engine.leader.offload(chain(1), [0])
    assert engine.leader.take_plan() is not None
    engine.leader.offload(chain(2), [1])
    with pytest.raises(InternalError, match="a rank stands still"):
        engine.leader.take_plan()


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="0 blocks on 2 ranks"):
        RankLeader(0, 2)
    with pytest.raises(ConfigurationError, match="holds nothing"):
        RankWorker(0, Device(0), 0)
    with pytest.raises(InvalidRequestError, match="1 device blocks for 2 blocks"):
        RankLeader(1, 1).offload(chain(1, 2), [0])


class RanksMachine(RuleBasedStateMachine):
    """Random plans with ranks that fail and get lost: what is served is right, the books agree."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = Engine()
        self.lost: set[int] = set()

    @rule(first=st.integers(1, 4), length=st.integers(1, 3), broken=st.sets(st.integers(0, RANKS - 1)))
    def offload(self, first: int, length: int, broken: set[int]) -> None:
        hashes = [10 * first + i for i in range(length)]
        for block_id, item in enumerate(hashes):
            self.engine.compute(item, block_id)
        for rank in broken:
            self.engine.devices[rank].broken = True
        self.engine.leader.offload(chain(*hashes), range(length))
        self.engine.step() if not self.lost else self.engine.leader.take_plan()
        for device in self.engine.devices:
            device.broken = False

    @precondition(lambda self: not self.lost)
    @rule(first=st.integers(1, 4), broken=st.sets(st.integers(0, RANKS - 1), max_size=1))
    def onboard(self, first: int, broken: set[int]) -> None:
        hashes = [10 * first + i for i in range(3)]
        count = self.engine.leader.onboard(hashes, [3, 4, 5])
        assert count == self.engine.leader.match(hashes).blocks
        for rank in broken:
            self.engine.devices[rank].broken = True
        outcome = self.engine.step()
        for device in self.engine.devices:
            device.broken = False
        failed = set(outcome.not_onboarded) if outcome is not None else set[int]()
        for item, block_id in zip(hashes[:count], [3, 4, 5], strict=False):
            assert item in failed or self.engine.holds(item, block_id)
        assert bool(failed) == (bool(broken) and count > 0)

    @rule(rank=st.integers(0, RANKS - 1))
    def lose(self, rank: int) -> None:
        self.engine.leader.lose_rank(rank)
        self.engine.workers[rank] = RankWorker(rank, self.engine.devices[rank], SLOTS)
        self.lost.add(rank)
        assert self.engine.present == set()

    @rule(rank=st.integers(0, RANKS - 1))
    def join(self, rank: int) -> None:
        self.engine.leader.join_rank(rank)
        self.lost.discard(rank)

    @invariant()
    def agrees(self) -> None:
        self.engine.leader.check_integrity()
        assert self.engine.leader.present_blocks == len(self.engine.present)


TestRanks = RanksMachine.TestCase
TestRanks.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
