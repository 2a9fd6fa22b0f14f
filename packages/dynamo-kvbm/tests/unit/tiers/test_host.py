from __future__ import annotations

import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dynamo_core.enums import Tier
from dynamo_core.errors import ConfigurationError, InvalidRequestError
from dynamo_core.kv import BlockDescriptor, BlockStore
from dynamo_kvbm import HostTier

BLOCK_BYTES = 16


def block(sequence_hash: int, parent: int | None = None) -> BlockDescriptor:
    return BlockDescriptor(sequence_hash=sequence_hash, parent_hash=parent)


def content(sequence_hash: int) -> bytes:
    return sequence_hash.to_bytes(8, "little") * 2


def test_it_is_a_block_store_of_the_host_tier() -> None:
    tier = HostTier(2, BLOCK_BYTES)
    assert isinstance(tier, BlockStore)
    assert (tier.tier, tier.capacity_blocks, tier.used_blocks) == (Tier.HOST, 2, 0)


def test_bytes_come_back_and_later_puts_do_not_change_them() -> None:
    tier = HostTier(1, BLOCK_BYTES)
    tier.put([block(1)], [content(1)])
    [first] = tier.get([1])
    assert tier.put([block(2)], [content(2)]) == [1]
    assert first == content(1)
    assert tier.get([1, 2]) == [None, content(2)]


def test_a_block_of_another_size_is_refused_and_nothing_is_stored() -> None:
    tier = HostTier(2, BLOCK_BYTES)
    with pytest.raises(InvalidRequestError, match="has 3 bytes, this tier stores blocks of 16"):
        tier.put([block(1), block(2)], [content(1), b"abc"])
    assert tier.used_blocks == 0


@pytest.mark.parametrize(("blocks", "size"), [(0, 16), (4, 0)])
def test_an_empty_tier_is_refused(blocks: int, size: int) -> None:
    with pytest.raises(ConfigurationError, match="at least 1"):
        HostTier(blocks, size)


def test_lent_blocks_stay_until_given_back() -> None:
    tier = HostTier(2, BLOCK_BYTES)
    tier.put([block(1), block(2, 1)], [content(1), content(2)])
    with tier.borrow([1, 2, 3]) as views:
        assert [bytes(view) for view in views] == [content(1), content(2)]
        assert tier.put([block(9)], [content(9)]) == []
        assert tier.contains([9]) == [False]
        tier.remove([1])
        assert tier.contains([1, 2]) == [True, True]
    assert tier.put([block(9)], [content(9)]) == [2]


def test_room_for_a_block_is_not_made_from_its_parent() -> None:
    tier = HostTier(1, BLOCK_BYTES)
    tier.put([block(1)], [content(1)])
    assert tier.put([block(2, 1)], [content(2)]) == []
    assert tier.contains([1, 2]) == [True, False]


def test_a_block_given_twice_takes_one_slot() -> None:
    tier = HostTier(3, BLOCK_BYTES)
    tier.put([block(1), block(1)], [content(1), content(1)])
    assert tier.used_blocks == 1
    tier.check_integrity()


def test_clear_tells_what_went() -> None:
    tier = HostTier(2, BLOCK_BYTES)
    tier.put([block(1), block(2, 1)], [content(1), content(2)])
    assert sorted(tier.clear()) == [1, 2]
    assert tier.used_blocks == 0


def test_threads_never_see_a_torn_or_foreign_block() -> None:
    tier = HostTier(4, BLOCK_BYTES)
    wrong: list[bytes] = []

    def work(seed: int) -> None:
        for step in range(2000):
            key = (seed * 31 + step * 7) % 11 + 1
            tier.put([block(key)], [content(key)])
            with tier.borrow([key]) as views:
                wrong.extend(bytes(view) for view in views if bytes(view) != content(key))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    tier.check_integrity()


class HostTierMachine(RuleBasedStateMachine):
    """A host tier next to a dictionary that never forgets what may be there."""

    def __init__(self) -> None:
        super().__init__()
        self.tier = HostTier(4, BLOCK_BYTES)
        self.held: set[int] = set()

    @rule(start=st.integers(1, 6), length=st.integers(1, 6))
    def put_chain(self, start: int, length: int) -> None:
        chain = [start * 100 + i for i in range(length)]
        blocks = [block(item, chain[i - 1] if i else None) for i, item in enumerate(chain)]
        evicted = self.tier.put(blocks, [content(item) for item in chain])
        kept = self.tier.contains(chain)
        # What does not fit is cut from the chain's end: the rest would be unreachable.
        assert kept == sorted(kept, reverse=True)
        assert len(evicted) == len(set(evicted)) and set(evicted) <= self.held
        self.held = (self.held - set(evicted)) | {item for item, there in zip(chain, kept, strict=True) if there}

    @rule(item=st.integers(100, 606))
    def remove(self, item: int) -> None:
        self.tier.remove([item])
        self.held.discard(item)

    @invariant()
    def agrees(self) -> None:
        assert self.tier.used_blocks == len(self.held) <= 4
        assert all(self.tier.get([item]) == [content(item)] for item in self.held)
        self.tier.check_integrity()


TestHostTierMachine = HostTierMachine.TestCase
TestHostTierMachine.settings = settings(max_examples=50, stateful_step_count=30)
