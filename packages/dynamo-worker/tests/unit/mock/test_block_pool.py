from __future__ import annotations

from collections.abc import Sequence

from dynamo_core.enums import Tier
from dynamo_core.kv import BlockDescriptor
from dynamo_worker._mock._block_pool import BlockPool


class Log:
    def __init__(self) -> None:
        self.lines: list[tuple[str, list[int]]] = []

    def stored(self, blocks: Sequence[BlockDescriptor], *, tier: Tier = Tier.DEVICE, lora: str = "") -> None:
        self.lines.append(("stored", [block.sequence_hash for block in blocks]))

    def removed(self, sequence_hashes: Sequence[int], *, tier: Tier = Tier.DEVICE) -> None:
        self.lines.append(("removed", list(sequence_hashes)))

    def cleared(self) -> None:
        self.lines.append(("cleared", []))


def blocks(*hashes: int) -> list[BlockDescriptor]:
    return [BlockDescriptor(sequence_hash) for sequence_hash in hashes]


def filled(pool: BlockPool, *hashes: int) -> None:
    assert pool.allocate(len(hashes))
    pool.register(blocks(*hashes))


def test_released_blocks_stay_cached_until_room_is_needed_and_leaves_go_first() -> None:
    pool = BlockPool(4)
    pool.sink = log = Log()
    filled(pool, 1, 2, 3)
    pool.release([1, 2, 3], 0)
    assert (pool.active, pool.free, pool.cached) == (0, 4, 3)
    assert pool.match([1, 2, 3, 4]) == 3
    assert pool.allocate(3)
    assert pool.match([1, 2, 3]) == 1
    assert log.lines == [("stored", [1, 2, 3]), ("removed", [3, 2])]


def test_held_blocks_are_never_evicted() -> None:
    pool = BlockPool(3)
    filled(pool, 1, 2)
    assert not pool.allocate(2)
    assert pool.allocate(1)
    assert not pool.allocate(1)
    assert pool.free == 0


def test_a_shared_block_is_stored_once_and_freed_by_its_last_holder() -> None:
    pool = BlockPool(8)
    pool.sink = log = Log()
    filled(pool, 1)
    filled(pool, 1)  # a second sequence computed the same block
    assert log.lines == [("stored", [1])]
    assert pool.active == 1
    pool.release([1], 0)
    assert pool.active == 1
    pool.release([1], 0)
    assert (pool.active, pool.cached) == (0, 1)


def test_using_a_block_saves_it_from_eviction() -> None:
    pool = BlockPool(3)
    filled(pool, 1)
    filled(pool, 2)
    pool.release([1], 0)
    pool.release([2], 0)
    pool.hold([1])
    pool.release([1], 0)
    assert pool.allocate(2)
    assert (pool.match([1]), pool.match([2])) == (1, 0)


def test_clear_keeps_what_is_held() -> None:
    pool = BlockPool(8)
    pool.sink = log = Log()
    filled(pool, 1)
    filled(pool, 2)
    pool.release([2], 0)
    assert pool.clear() == 1
    assert log.lines[-1] == ("removed", [2])
    assert pool.match([1]) == 1
