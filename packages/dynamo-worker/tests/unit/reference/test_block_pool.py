"""Block pool: leaf-first LRU, sharing by content, invariants under random use."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_core.kv import BlockDescriptor
from dynamo_worker._reference._block_pool import BlockPool, KVCacheBlock


class Listener:
    def __init__(self) -> None:
        self.registered: list[int] = []
        self.evicted: list[int] = []

    def on_register(self, blocks: Sequence[BlockDescriptor], block_ids: Sequence[int]) -> None:
        assert len(blocks) == len(block_ids)
        self.registered.extend(block.sequence_hash for block in blocks)

    def on_evict(self, blocks: Sequence[BlockDescriptor], block_ids: Sequence[int]) -> None:
        assert len(blocks) == len(block_ids)
        self.evicted.extend(block.sequence_hash for block in blocks)


def chain(*hashes: int) -> list[BlockDescriptor]:
    parents = [None, *hashes[:-1]]
    return [
        BlockDescriptor(value, value, parent, i) for i, (value, parent) in enumerate(zip(hashes, parents, strict=False))
    ]


def store(pool: BlockPool, *hashes: int) -> list[KVCacheBlock]:
    """Hold a sequence as an engine does: known prefix first, the rest allocated and registered."""
    known = pool.get_computed_blocks(hashes)
    pool.touch(known)
    fresh = pool.allocate(len(hashes) - len(known))
    assert fresh is not None
    return known + pool.register(fresh, chain(*hashes)[len(known) :])


@pytest.fixture
def listener() -> Listener:
    return Listener()


def test_a_registered_prefix_is_found_again(listener: Listener) -> None:
    pool = BlockPool(4, listener)
    blocks = store(pool, 1, 2, 3)
    pool.free(blocks)
    assert pool.get_computed_blocks([1, 2, 9]) == blocks[:2]
    assert pool.num_free_blocks == 4
    assert listener.registered == [1, 2, 3]


def test_leaves_are_evicted_before_their_parents(listener: Listener) -> None:
    pool = BlockPool(4, listener)
    pool.free(store(pool, 1, 2, 3))
    pool.free(store(pool, 1, 4))
    pool.allocate(3)
    assert listener.evicted == [3, 2, 4]
    assert pool.get_computed_blocks([1]) != []
    pool.check_integrity()


def test_the_least_recently_used_leaf_goes_first(listener: Listener) -> None:
    pool = BlockPool(4, listener)
    pool.free(store(pool, 1, 2))
    pool.free(store(pool, 5, 6))
    pool.free(store(pool, 1, 2))
    pool.allocate(1)
    assert listener.evicted == [6]


def test_held_blocks_are_never_evicted(listener: Listener) -> None:
    pool = BlockPool(3, listener)
    store(pool, 1, 2)
    assert pool.allocate(2) is None
    assert listener.evicted == []
    assert pool.num_used_blocks == 2


def test_a_second_copy_is_replaced_by_the_known_block(listener: Listener) -> None:
    pool = BlockPool(4, listener)
    first = store(pool, 1)
    twin = pool.allocate(2)
    assert twin is not None
    held = pool.register(twin, chain(1, 2))
    assert held[0] is first[0]
    assert first[0].ref_count == 2
    assert listener.registered == [1, 2]
    pool.free(first)
    pool.free(held)
    pool.check_integrity()
    assert pool.num_free_blocks == 4


def test_clear_drops_what_nobody_holds(listener: Listener) -> None:
    pool = BlockPool(4, listener)
    pool.free(store(pool, 5, 6))
    store(pool, 1)
    assert {block.sequence_hash for block in pool.clear()} == {5, 6}
    assert pool.get_computed_blocks([5]) == []
    assert pool.get_computed_blocks([1]) != []
    pool.check_integrity()


def test_lineage_leads_from_the_first_block(listener: Listener) -> None:
    pool = BlockPool(4, listener)
    blocks = store(pool, 1, 2, 3)
    assert pool.get_lineage(3) == blocks
    assert pool.get_lineage(None) == []
    assert pool.get_lineage(9) is None


PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["hold", "twin", "free", "clear"]), PATHS), max_size=40))
def test_invariants_hold_under_random_use(operations: list[tuple[str, list[int]]]) -> None:
    pool = BlockPool(8, Listener())
    held: list[list[KVCacheBlock]] = []
    for name, path in operations:
        # A path in a tree of three branches stands for a prompt; its prefixes are its blocks.
        hashes = [int("1" + "".join(map(str, path[: end + 1]))) for end in range(len(path))]
        if name == "clear":
            pool.clear()
        elif name == "free" and held:
            pool.free(held.pop(path[0] % len(held)))
        elif name == "hold" and len(hashes) <= pool.num_free_blocks:
            held.append(store(pool, *hashes))
        elif name == "twin" and (blocks := pool.allocate(len(hashes))) is not None:
            held.append(pool.register(blocks, chain(*hashes)))
        pool.check_integrity()
    for blocks in held:
        pool.free(blocks)
    pool.check_integrity()
    assert pool.num_free_blocks == 8
