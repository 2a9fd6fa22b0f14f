from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_core.tokens import chain_hashes, pack_hashes, unpack_hashes
from dynamo_router import _runs
from dynamo_router._runs import RunTable

A, B = 1, 2
CHAIN = chain_hashes(range(100, 1300))


def add(table, bit, keys, parent=None):
    return table.add(bit, parent, keys, pack_hashes(keys))


def remove(table, bit, keys):
    return table.remove(bit, keys, pack_hashes(keys))


def depths(table, keys, among=-1):
    return table.depths(unpack_hashes(pack_hashes(keys)), pack_hashes(keys), among)


def runs(table, bit=A | B):
    return sum(1 for _ in table.held_by(bit))


def test_a_chain_stored_piece_by_piece_is_few_runs():
    table = RunTable()
    for start in range(0, 512, 16):
        assert add(table, A, CHAIN[start : start + 16], CHAIN[start - 1] if start else None) == 16
    assert runs(table) == 1
    assert depths(table, CHAIN) == [(512, A)]


def test_a_second_holder_of_the_same_chain_leaves_no_splinters():
    table = RunTable()
    add(table, A, CHAIN[:512])
    for place in range(512):
        assert add(table, B, CHAIN[place : place + 1], CHAIN[place - 1] if place else None) == 1
        assert runs(table) <= 2
    assert depths(table, CHAIN) == [(512, A | B)]
    assert table.problems() == []


@pytest.mark.parametrize("step", [1, 7, 512])
@pytest.mark.parametrize("backwards", [True, False])
def test_a_chain_evicted_by_one_holder_leaves_no_splinters(step, backwards):
    table = RunTable()
    for bit in (A, B):
        add(table, bit, CHAIN[:512])
    order = CHAIN[:512][::-1] if backwards else CHAIN[:512]
    for place in range(0, 512, step):
        assert remove(table, A, order[place : place + step]) == len(order[place : place + step])
        assert runs(table) <= 2
        assert table.problems() == []
    assert depths(table, CHAIN) == [(512, B)]
    assert remove(table, B, order) == 512
    assert len(table) == runs(table) == 0


def test_no_run_is_longer_than_the_bound():
    table = RunTable()
    assert add(table, A, CHAIN) == len(CHAIN)
    assert runs(table) == -(-len(CHAIN) // _runs.MOST_BLOCKS)
    assert depths(table, CHAIN) == [(len(CHAIN), A)]
    assert depths(table, [*CHAIN[:700], 5, 6]) == [(700, A)]
    assert table.problems() == []


def test_a_prompt_leaves_a_run_anywhere():
    table = RunTable()
    add(table, A, CHAIN[:300])
    add(table, B, CHAIN[:37])
    for fork in (1, 2, 36, 37, 38, 150, 298, 299):
        expected = [(37, B), (fork, A)] if fork > 37 else [(fork, A | B)]
        assert depths(table, [*CHAIN[:fork], 1, 2, 3]) == expected


def test_a_chain_that_names_a_block_twice_is_held_once():
    table = RunTable()
    assert add(table, A, [1, 2, 2, 3]) == 3
    assert add(table, A, [1, 2, 3, 3, 9]) == 1
    assert table.problems() == []
    assert remove(table, A, [3, 3, 1, 2, 9]) == 4
    assert len(table) == 0


paths = st.lists(st.integers(0, 2), min_size=1, max_size=9)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "add", "add", "remove", "evict", "clear"]),
            st.sampled_from([1, 2, 4]),
            paths,
            st.integers(0, 8),
        ),
        max_size=30,
    ),
    st.sampled_from([2, 3, 512]),
)
def test_equals_sets(history, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_runs, "MOST_BLOCKS", most)
        table, held = RunTable(), {1: set(), 2: set(), 4: set()}
        for kind, bit, path, cut in history:
            keys = chain_hashes(path)
            start = cut % len(keys)
            before = len(held[bit])
            if kind == "add":
                held[bit] |= set(keys[start:])
                changed = add(table, bit, keys[start:], keys[start - 1] if start else None)
            elif kind == "remove":
                held[bit] -= set(keys[start:])
                changed = -remove(table, bit, keys[start:][::-1])
            elif kind == "evict":
                held[bit] -= set(keys[: start + 1])
                changed = -remove(table, bit, keys[: start + 1])
            else:
                held[bit].clear()
                changed = -before
                table.clear(bit)
            assert changed == len(held[bit]) - before
            assert table.problems() == []
            found = {slot: depth for depth, bits in depths(table, keys) for slot in held if bits & slot}
            assert found == {slot: depth for slot in held if (depth := leading(held[slot], keys))}
        assert len(table) == len(set().union(*held.values()))


def leading(held, keys):
    return next((depth for depth, key in enumerate(keys) if key not in held), len(keys))
