from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_core.errors import InternalError
from dynamo_kvbm._lru import LeafFirstLru


def chain(lru: LeafFirstLru, *hashes: int) -> None:
    parent = None
    for sequence_hash in hashes:
        lru.add(sequence_hash, parent)
        parent = sequence_hash


def test_a_chain_goes_from_its_end() -> None:
    lru = LeafFirstLru()
    chain(lru, 1, 2, 3)
    assert [lru.evict(), lru.evict(), lru.evict(), lru.evict()] == [3, 2, 1, None]


def test_the_older_of_two_chains_goes_first() -> None:
    lru = LeafFirstLru()
    chain(lru, 1, 2)
    chain(lru, 10, 20)
    lru.touch([1, 2])
    assert [lru.evict(), lru.evict(), lru.evict()] == [20, 10, 2]


def test_a_pinned_leaf_keeps_its_ancestors() -> None:
    lru = LeafFirstLru()
    chain(lru, 1, 2)
    lru.pin([2])
    assert lru.evict() is None
    lru.unpin([2])
    assert lru.evict() == 2


def test_an_unbalanced_unpin_is_a_defect() -> None:
    lru = LeafFirstLru()
    lru.add(1, None)
    with pytest.raises(InternalError, match="unpinned more often"):
        lru.unpin([1])


def test_a_parent_that_comes_back_after_its_child_is_no_leaf() -> None:
    lru = LeafFirstLru()
    lru.add(2, 1)
    lru.add(1, None)
    assert lru.evict() == 2


PARENTS = {1: None, 2: 1, 3: 2, 4: 2, 5: None, 6: 5, 7: 6, 8: 1}


def path(block: int) -> list[int]:
    parent = PARENTS[block]
    return [*path(parent), block] if parent is not None else [block]


@given(st.lists(st.tuples(st.sampled_from(["add", "touch", "evict", "discard"]), st.sampled_from(sorted(PARENTS)))))
def test_eviction_takes_only_leaves_and_full_touches_make_it_exact(steps: list[tuple[str, int]]) -> None:
    lru = LeafFirstLru()
    last_use: dict[int, int] = {}
    for now, (step, block) in enumerate(steps):
        held = [item for item in path(block) if item in lru]
        if step == "add" and block not in lru:
            lru.add(block, PARENTS[block])
            last_use[block] = now
        elif step == "touch" and held:
            lru.touch(held)
            last_use.update(dict.fromkeys(held, now))
        elif step == "discard":
            assert lru.discard(block) == (block in last_use)
            last_use.pop(block, None)
        elif step == "evict":
            victim = lru.evict()
            assert (victim is None) == (not last_use)
            if victim is not None:
                assert not any(PARENTS[other] == victim for other in last_use)
                del last_use[victim]
        lru.check_integrity()
        assert len(lru) == len(last_use)
