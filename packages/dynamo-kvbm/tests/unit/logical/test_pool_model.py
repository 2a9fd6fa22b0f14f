"""The pool beside a model that keeps plain dictionaries."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dynamo_core import plugins
from dynamo_core.kv import BlockDescriptor
from dynamo_kvbm._logical.handles import CompleteBlocks, ImmutableBlocks, MutableBlocks
from dynamo_kvbm._logical.pool import BlockPool

CAPACITY = 6
# A small forest: 1-2-3, 1-2-4, 1-5, 6-7, 8.
PARENTS = {1: None, 2: 1, 3: 2, 4: 2, 5: 1, 6: None, 7: 6, 8: None}
PATHS = [[1, 2, 3], [1, 2, 4], [1, 5], [6, 7], [8], [1], [1, 2]]
POLICIES = ["arc", "hinted", "lineage", "lru", "multi-lru", "priority", "s3fifo"]


def descriptor(item: int) -> BlockDescriptor:
    return BlockDescriptor(item, 0, PARENTS[item], priority=item % 3)


class PoolMachine(RuleBasedStateMachine):
    """What is published is a dictionary; who holds it is a list of lists."""

    policy = "lru"

    def __init__(self) -> None:
        super().__init__()
        self.private: list[MutableBlocks | CompleteBlocks] = []
        self.held: list[tuple[ImmutableBlocks, list[int]]] = []
        self.published: set[int] = set()

    @initialize()
    def start(self) -> None:
        self.pool = BlockPool(CAPACITY, eviction=plugins.load("kv_eviction", self.policy), on_evict=self.on_evict)

    def on_evict(self, blocks: list[BlockDescriptor], places: list[int]) -> None:
        for block in blocks:
            item = block.sequence_hash
            assert item in self.published
            assert not any(item in path for _, path in self.held), "a held block was evicted"
            self.published.remove(item)
            children = {child for child, parent in PARENTS.items() if parent == item}
            assert not children & self.published, "a block went before one that continues it"

    @rule(path=st.sampled_from(PATHS))
    def compute(self, path: list[int]) -> None:
        held = self.pool.match(path)
        hit = list(held.sequence_hashes)
        expected = 0
        while expected < len(path) and path[expected] in self.published:
            expected += 1
        assert hit == path[:expected]
        self.held.append((held, hit))
        taken = self.pool.allocate(len(path) - expected)
        if taken is None:
            assert len(path) - expected > self.obtainable()
            return
        self.private.append(taken.complete([descriptor(item) for item in path[expected:]]))

    @rule(count=st.integers(1, 3))
    def allocate(self, count: int) -> None:
        before = self.obtainable()
        taken = self.pool.allocate(count)
        assert (taken is not None) == (count <= before)
        if taken is not None:
            self.private.append(taken)

    @precondition(lambda self: self.private)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        handle = self.private.pop(data.draw(st.integers(0, len(self.private) - 1)))
        if isinstance(handle, CompleteBlocks) and data.draw(st.booleans()):
            shared = handle.register()
            self.published |= set(shared.sequence_hashes)
            self.held.append((shared, list(shared.sequence_hashes)))
        else:
            handle.release()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        handle, path = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        assert list(handle.sequence_hashes) == path
        handle.release()

    @rule()
    def reset_unheld(self) -> None:
        self.pool.reset_unheld()
        assert self.published == self.kept()

    def kept(self) -> set[int]:
        """Held blocks, and what they continue."""
        kept: set[int] = set()
        for _, path in self.held:
            for item in path:
                above: int | None = item
                while above is not None:
                    kept.add(above)
                    above = PARENTS[above]
        return kept & self.published

    def obtainable(self) -> int:
        private = sum(len(handle) for handle in self.private)
        return CAPACITY - private - len(self.kept())

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity()
        stats = self.pool.stats()
        assert stats.registered == len(self.published)
        assert stats.private == sum(len(handle) for handle in self.private)
        assert self.pool.contains(sorted(PARENTS)) == [item in self.published for item in sorted(PARENTS)]


def machine(policy: str) -> type[PoolMachine]:
    return type(f"PoolMachine_{policy}", (PoolMachine,), {"policy": policy})


@pytest.mark.parametrize("policy", POLICIES)
def test_the_pool_agrees_with_the_model(policy: str) -> None:
    case = machine(policy).TestCase
    case.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
    case("runTest").runTest()
