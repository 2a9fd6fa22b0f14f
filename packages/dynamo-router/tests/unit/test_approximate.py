from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_core.tokens import chain_hashes
from dynamo_router._approximate import ApproximateIndex

PATH = chain_hashes(range(8))


def test_routed_prompts_count_as_held_for_a_time():
    index = ApproximateIndex(10.0)
    index.insert(0, PATH, 0.0)
    index.insert(1, PATH[:3], 5.0)
    assert sorted(index.match(PATH, 3, 9.0)) == [(3, 2), (8, 1)]
    index.insert(0, PATH[:2], 9.0)
    assert sorted(index.match(PATH, 3, 11.0)) == [(2, 1), (3, 2)]
    assert index.match(PATH, 2, 16.0) == []
    assert len(index) == 2


def test_the_least_recent_leaf_goes_first():
    index = ApproximateIndex(10.0)
    other = chain_hashes([0, 1, 99])
    index.insert(0, PATH, 0.0, capacity_blocks=8)
    index.insert(0, other, 1.0, capacity_blocks=8)
    assert index.match(PATH, 1, 1.0) == [(7, 1)]
    assert index.match(other, 1, 1.0) == [(3, 1)]
    assert len(index) == 8


def test_uses_of_a_busy_prompt_do_not_pile_up():
    index = ApproximateIndex(1000.0)
    long = chain_hashes(range(100))
    others = [chain_hashes([*range(90), other]) for other in range(1000, 1100)]
    for second in range(500):
        index.insert(0, long[: second % 50 + 50], float(second))
        index.insert(0, others[second % 100], float(second))
    index.settle()
    shelf = index._shelves[0]
    assert shelf.named == sum(use.left for use in shelf.uses) <= 4 * len(index) + 4096
    assert len(shelf.uses) <= 4 * len(shelf.ends) + 256
    assert index.match(long, 1, 1499.0) == [(99, 1)]
    assert index.match(long, 1, 1500.0) == []
    assert (len(index), shelf.named, len(shelf.uses), len(shelf.ends)) == (0, 0, 0, 0)


def test_a_slot_can_be_cleared():
    index = ApproximateIndex(10.0)
    index.insert(0, PATH, 0.0)
    index.insert(3, PATH, 0.0)
    index.clear(0)
    index.clear(7)
    assert index.match(PATH, -1, 0.0) == [(8, 8)]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 1), max_size=5), st.integers(0, 4)), max_size=30),
    st.integers(1, 12),
)
def test_prefixes_stay_closed_and_bounded(steps, capacity):
    index, now = ApproximateIndex(6.0), 0.0
    for slot, path, wait in steps:
        now += wait
        index.insert(slot, chain_hashes(path), now, capacity_blocks=capacity)
        assert index.blocks_of(slot) <= max(capacity, len(path))
        for path in ([0, 0, 0, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1, 1]):
            hashes = chain_hashes(path)
            found = {s: depth for depth, bits in index.match(hashes, 7, now) for s in range(3) if bits >> s & 1}
            for s in range(3):
                held = [index.holds(s, key) for key in hashes]
                assert found.get(s, 0) == (held.index(False) if False in held else len(held))
                assert held == sorted(held, reverse=True)
