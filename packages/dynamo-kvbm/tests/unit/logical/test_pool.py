from __future__ import annotations

import gc
import random
import threading
from collections.abc import Sequence

import pytest

from dynamo_core.enums import Tier
from dynamo_core.errors import ConfigurationError, InternalError, InvalidRequestError
from dynamo_core.kv import BlockDescriptor
from dynamo_core.testing import FakeClock
from dynamo_kvbm._logical.handles import CompleteBlocks, ImmutableBlocks, MutableBlocks
from dynamo_kvbm._logical.pool import BlockPool, Watermarks
from dynamo_kvbm._logical.registry import BlockRegistry


def chain(*hashes: int, after: int | None = None) -> list[BlockDescriptor]:
    parents = [after, *hashes][: len(hashes)]
    return [BlockDescriptor(item, 0, parent) for item, parent in zip(hashes, parents, strict=True)]


def publish(pool: BlockPool, *hashes: int, after: int | None = None, tenant: str = "") -> ImmutableBlocks:
    taken = pool.allocate(len(hashes), tenant=tenant)
    assert taken is not None
    return taken.complete(chain(*hashes, after=after)).register()


def test_a_block_goes_through_its_states_and_each_handle_is_spent_by_the_step() -> None:
    pool = BlockPool(4)
    taken = pool.allocate(2)
    assert isinstance(taken, MutableBlocks)
    full = taken.complete(chain(1, 2))
    assert isinstance(full, CompleteBlocks)
    assert pool.stats().private == 2
    assert pool.contains([1, 2]) == [False, False]
    shared = full.register()
    assert pool.contains([1, 2]) == [True, True]
    for spent in (taken, full):
        assert len(spent) == 0
        with pytest.raises(InternalError, match="before"):
            spent.release()
        with pytest.raises(InternalError, match="before"):
            _ = spent.block_ids
    shared.release()
    pool.check_integrity()


@pytest.mark.parametrize(
    ("kind", "missing"),
    [(MutableBlocks, "register"), (CompleteBlocks, "complete"), (ImmutableBlocks, "complete"), (BlockPool, "fill")],
)
def test_a_step_that_a_state_does_not_allow_does_not_exist(kind: type, missing: str) -> None:
    assert not hasattr(kind, missing)


def test_descriptors_must_fit_and_nothing_changes_if_they_do_not() -> None:
    pool = BlockPool(4)
    taken = pool.allocate(2)
    assert taken is not None
    with pytest.raises(InvalidRequestError, match="1 descriptors for 2 blocks"):
        taken.complete(chain(1))
    taken.release()
    assert pool.stats().reset == 4


def test_private_blocks_go_back_when_their_context_ends() -> None:
    pool = BlockPool(4)
    taken = pool.allocate(3)
    assert taken is not None
    with taken, taken.split(1) as first:
        assert (len(first), len(taken)) == (1, 2)
    assert pool.stats().reset == 4
    pool.check_integrity()


def test_a_dropped_handle_gives_its_blocks_back() -> None:
    pool = BlockPool(2)
    publish(pool, 1)
    _ = pool.allocate(1)
    del _
    gc.collect()
    assert pool.stats().private == 0
    assert pool.allocate(2) is not None


def test_the_longest_prefix_is_matched_and_stays_while_it_is_held() -> None:
    pool = BlockPool(4)
    publish(pool, 1, 2, 3).release()
    held = pool.match([1, 2, 9])
    assert list(held.sequence_hashes) == [1, 2]
    taken = pool.allocate(2)
    assert taken is not None
    assert pool.allocate(1) is None
    assert pool.contains([1, 2, 3]) == [True, True, False]
    held.release()
    assert pool.allocate(2) is not None


def test_scan_finds_any_subset() -> None:
    pool = BlockPool(4)
    publish(pool, 1, 2, 3).release()
    found = pool.scan([3, 9, 1])
    assert list(found.sequence_hashes) == [3, 1]
    found.release()
    pool.check_integrity()


def test_a_known_hash_is_shared_and_the_copy_is_freed() -> None:
    pool = BlockPool(4)
    first = publish(pool, 1, 2)
    second = publish(pool, 1, 2)
    assert second.block_ids == first.block_ids
    assert (pool.stats().dedups, pool.stats().reset) == (2, 2)
    first.release()
    assert pool.allocate(3) is None
    second.release()
    pool.check_integrity()


def test_clones_and_weak_references() -> None:
    pool = BlockPool(2)
    first = publish(pool, 1, 2)
    weak = first.downgrade()
    second = first.clone()
    first.release()
    assert pool.allocate(1) is None
    second.release()
    again = weak.upgrade()
    assert again is not None
    again.release()
    assert pool.reset_unheld() == 2
    assert weak.upgrade() is None


def test_evicted_blocks_are_told_before_their_places_are_reused() -> None:
    told: list[tuple[list[int], list[int]]] = []

    def on_evict(blocks: Sequence[BlockDescriptor], places: Sequence[int]) -> None:
        told.append(([block.sequence_hash for block in blocks], list(places)))

    pool = BlockPool(2, on_evict=on_evict)
    held = publish(pool, 1, 2)
    places = list(held.block_ids)
    held.release()
    pool.allocate(2)
    assert told == [([2, 1], places[::-1])]


async def test_a_lease_keeps_blocks_until_it_ends() -> None:
    clock = FakeClock()
    pool = BlockPool(2, clock=clock)
    publish(pool, 1, 2).release()
    assert pool.lease([1, 2, 3], 10.0) == 2
    assert pool.lease([7], 10.0) == 0
    assert pool.allocate(1) is None
    await clock.advance(10.0)
    assert pool.allocate(1) is not None


def test_watermarks_make_room_ahead_of_need() -> None:
    pool = BlockPool(10, watermarks=Watermarks(high=0.8, low=0.5))
    for item in range(1, 9):
        publish(pool, item).release()
    assert pool.stats().reset == 2
    held = publish(pool, 9)
    assert pool.stats().reset == 5
    held.release()
    assert pool.trim() == 0
    with pytest.raises(ConfigurationError, match="0 < low <= high"):
        Watermarks(high=0.5, low=0.8)


def test_a_tenant_pushes_out_its_own_blocks_only() -> None:
    pool = BlockPool(6, quotas={"a": 2})
    publish(pool, 1, 2, tenant="b").release()
    for item in range(10, 20):
        publish(pool, item, tenant="a").release()
    assert pool.used_by("a") == 2
    assert pool.contains([1, 2, 18, 19]) == [True] * 4
    assert pool.allocate(3, tenant="a") is None
    pool.check_integrity()


def test_a_block_of_one_tenant_keeps_the_parent_that_another_registered() -> None:
    pool = BlockPool(3)
    publish(pool, 1, tenant="a").release()
    publish(pool, 2, after=1, tenant="b").release()
    publish(pool, 3, tenant="a").release()
    taken = pool.allocate(2)
    assert taken is not None
    assert pool.contains([2]) != [True] or pool.contains([1]) == [True]
    pool.check_integrity()
    taken.release()
    assert pool.reset_unheld() + pool.stats().reset >= 3
    assert pool.used_by("b") == 0


def test_presence_is_kept_over_all_tiers() -> None:
    registry = BlockRegistry()
    device = BlockPool(1, registry=registry)
    host = BlockPool(1, tier=Tier.HOST, registry=registry)
    publish(device, 1).release()
    publish(host, 1).release()
    assert registry.tiers(1) == (Tier.DEVICE, Tier.HOST)
    device.reset_unheld()
    assert registry.tiers(1) == (Tier.HOST,)
    assert registry.mark([1, 2], Tier.DISK) == [2]
    assert registry.unmark([1, 2], Tier.DISK) == [2]
    host.reset_unheld()
    assert (registry.tiers(1), len(registry)) == ((), 0)


@pytest.mark.parametrize(
    ("blocks", "quotas", "message"), [(0, {}, "at least 1"), (4, {"a": 5}, "quota 5 of tenant 'a' must be 1 to 4")]
)
def test_bad_sizes_are_refused(blocks: int, quotas: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        BlockPool(blocks, quotas=quotas)


def race(pool: BlockPool, threads: int, steps: int) -> list[str]:
    """Let threads share a pool; return what they saw that must not be."""
    owner: dict[int, int] = {}
    wrong: list[str] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(steps):
            first = rng.randrange(40) * 10 + 1
            hashes = list(range(first, first + rng.randint(1, 6)))
            held = pool.match(hashes)
            missing = hashes[len(held) :]
            taken = pool.allocate(len(missing))
            if taken is None:
                held.release()
                continue
            for place in taken.block_ids:
                if owner.setdefault(place, seed) != seed:
                    wrong.append(f"block {place} has two owners")
            for place in taken.block_ids:
                owner.pop(place, None)
            if rng.random() < 0.2:
                taken.release()
            else:
                after = hashes[len(held) - 1] if len(held) else None
                taken.complete(chain(*missing, after=after)).register().release()
            held.release()

    running = [threading.Thread(target=work, args=(seed,)) for seed in range(1, threads + 1)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return wrong


@pytest.mark.parametrize(
    "steps", [pytest.param(2_000), pytest.param(250_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_threads_never_share_a_private_block_and_leak_none(steps: int) -> None:
    pool = BlockPool(64)
    assert race(pool, 4, steps) == []
    pool.check_integrity()
    stats = pool.stats()
    assert stats.private == 0
    pool.reset_unheld()
    assert pool.stats().reset == 64
