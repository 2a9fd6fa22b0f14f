from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo_core.enums import Tier
from dynamo_core.errors import ConfigurationError, InvalidRequestError
from dynamo_core.kv import BlockDescriptor
from dynamo_kvbm._tiers.arena import HUGE_PAGE_BYTES, allocate_arena
from dynamo_kvbm._tiers.base import SupportsForeignChanges
from dynamo_kvbm._tiers.shared_arena import MAX_PROCESSES, SharedArena
from dynamo_kvbm._tiers.shared_host import SharedHostTier

BLOCK_BYTES = 512
DEADLINE_S = 30.0


def content(item: int) -> bytes:
    return random.Random(item).randbytes(BLOCK_BYTES)


def block(item: int, parent: int | None = None) -> BlockDescriptor:
    return BlockDescriptor(item, item ^ 5, parent, 0 if parent is None else 1, 3)


def put(tier: SharedHostTier, *items: int) -> list[int]:
    return tier.put([block(item) for item in items], [content(item) for item in items])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "shared"


@pytest.fixture
def pair(folder: Path) -> Iterator[tuple[SharedHostTier, SharedHostTier]]:
    first, second = SharedHostTier(folder, 4, BLOCK_BYTES), SharedHostTier(folder, 4, BLOCK_BYTES)
    yield first, second
    first.check_integrity()
    second.check_integrity()
    first.close()
    second.close()


def test_what_one_stores_the_other_has(pair: tuple[SharedHostTier, SharedHostTier]) -> None:
    first, second = pair
    put(first, 1, 2)
    assert second.tier is Tier.HOST
    assert second.contains([1, 2, 3]) == [True, True, False]
    assert second.get([1, 3, 2]) == [content(1), None, content(2)]
    assert second.describe([1]) == [block(1)]


def test_who_shares_hears_of_the_others_changes_once(pair: tuple[SharedHostTier, SharedHostTier]) -> None:
    first, second = pair
    assert isinstance(second, SupportsForeignChanges)
    put(first, 1, 2)
    assert second.drain_changes() == [1, 2]
    first.remove([1])
    assert second.drain_changes() == [1]
    assert (second.drain_changes(), first.drain_changes()) == ([], [])


def test_more_changes_than_can_be_noted_ask_for_a_comparison(pair: tuple[SharedHostTier, SharedHostTier]) -> None:
    first, second = pair
    for item in range(20):
        put(first, item)
        second.contains([item])
    assert second.drain_changes() is None
    assert second.drain_changes() == []


def test_what_one_lends_no_other_evicts_or_drops(pair: tuple[SharedHostTier, SharedHostTier]) -> None:
    first, second = pair
    put(first, 1, 2, 3, 4)
    with first.lend([1, 2]) as views:
        second.remove([1])
        assert put(second, 5, 6) == [3, 4]
        assert put(second, 7, 8, 9) == [5, 6]
        assert [bytes(views[item]) for item in (1, 2)] == [content(1), content(2)]
    assert put(second, 5, 6) and second.contains([1, 2]).count(True) < 2


def test_what_another_used_last_goes_last(pair: tuple[SharedHostTier, SharedHostTier]) -> None:
    first, second = pair
    put(first, 1, 2, 3, 4)
    second.contains([1])
    first.touch([1])
    assert put(second, 5) == [2]
    assert second.contains([1]) == [True]


def test_a_held_parent_is_not_evicted_before_its_child(pair: tuple[SharedHostTier, SharedHostTier]) -> None:
    first, second = pair
    first.put([block(1), block(2, 1), block(3, 2)], [content(1), content(2), content(3)])
    put(second, 4)
    assert put(second, 5, 6) == [3, 2]


def test_a_block_stored_by_two_takes_one_slot(pair: tuple[SharedHostTier, SharedHostTier]) -> None:
    first, second = pair
    put(first, 1)
    put(second, 1, 2)
    assert first.contains([1, 2]) == [True, True]
    assert (first.used_blocks, second.used_blocks) == (2, 2)


def test_victims_are_handed_on_whole(pair: tuple[SharedHostTier, SharedHostTier]) -> None:
    first, second = pair
    put(first, 1, 2, 3, 4)
    spilled: dict[int, bytes] = {}

    def receive(blocks: object, data: object) -> None:
        assert isinstance(blocks, list)
        assert isinstance(data, list)
        spilled.update({item.sequence_hash: bytes(piece) for item, piece in zip(blocks, data, strict=True)})

    second.spill_to(receive)
    put(second, 5, 6)
    assert spilled == {1: content(1), 2: content(2)}


def test_the_blocks_outlive_their_processes(folder: Path) -> None:
    first = SharedHostTier(folder, 4, BLOCK_BYTES, fingerprint="m@1")
    put(first, 1)
    first.close()
    first.close()
    assert first.contains([1]) == [True]
    assert first.get([1]) == [None]
    with pytest.raises(ConfigurationError, match="another number, size or model"):
        SharedHostTier(folder, 4, BLOCK_BYTES, fingerprint="m@2")
    with pytest.raises(ConfigurationError, match="another number, size or model"):
        SharedHostTier(folder, 400, 10 * HUGE_PAGE_BYTES, fingerprint="m@1")
    again = SharedHostTier(folder, 4, BLOCK_BYTES, fingerprint="m@1")
    assert again.get([1]) == [content(1)]
    again.close()


def test_bad_sizes_folders_and_blocks_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="give both at least 1"):
        SharedHostTier(folder, 0, 1)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigurationError, match="give a writable folder"):
        SharedHostTier(tmp_path / "file" / "x", 1, 1)
    with pytest.raises(ConfigurationError, match="lower host_blocks"):
        SharedHostTier(folder, 1 << 20, 1 << 40)
    tier = SharedHostTier(tmp_path / "other", 2, BLOCK_BYTES)
    with pytest.raises(InvalidRequestError, match="this tier stores blocks of"):
        tier.put([block(1)], [b"short"])
    tier.close()


def test_more_processes_than_there_are_rows_for_are_refused(folder: Path) -> None:
    tiers = [SharedHostTier(folder, 1, BLOCK_BYTES) for _ in range(MAX_PROCESSES)]
    with pytest.raises(ConfigurationError, match="in use by 32 processes"):
        SharedHostTier(folder, 1, BLOCK_BYTES)
    tiers[7].close()
    tiers[7] = SharedHostTier(folder, 1, BLOCK_BYTES)
    for tier in tiers:
        tier.close()


def test_a_death_inside_a_change_makes_all_read_again(
    pair: tuple[SharedHostTier, SharedHostTier], folder: Path
) -> None:
    first, second = pair
    put(first, 1)
    dying = SharedArena(folder, 4, BLOCK_BYTES, "")

    class Killed(BaseException):
        pass

    with pytest.raises(Killed), dying.locked():
        dying.reserve(next(slot for slot in range(4) if not dying.records["state"][slot]))
        raise Killed
    dying.close()
    assert second.get([1]) == [content(1)]
    assert put(second, 2, 3, 4, 5) == [1]
    assert first.contains([2, 3, 4, 5]) == [True] * 4


def test_a_lock_that_cannot_be_had_finds_and_stores_nothing(folder: Path) -> None:
    tier = SharedHostTier(folder, 4, BLOCK_BYTES)
    put(tier, 1)
    other = SharedArena(folder, 4, BLOCK_BYTES, "")
    with other.locked():
        assert tier.get([1]) == [None]
        assert put(tier, 2) == []
    other.close()
    assert tier.contains([1, 2]) == [True, False]
    assert tier.get([1]) == [content(1)]
    tier.check_integrity()
    tier.close()


WORKER = """
import random, sys
from pathlib import Path
from dynamo_core.kv import BlockDescriptor
from dynamo_kvbm._tiers.shared_host import SharedHostTier

folder, seed, steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rng = random.Random(seed)
tier = SharedHostTier(folder, 16, 512)
print("ready", flush=True)
step = 0
while not steps or step < steps:
    step += 1
    items = [rng.randrange(48) for _ in range(3)]
    if rng.random() < 0.5:
        tier.put([BlockDescriptor(i) for i in items], [random.Random(i).randbytes(512) for i in items])
    elif rng.random() < 0.1:
        tier.remove(items[:1])
    else:
        with tier.lend(items) as views:
            for i, view in views.items():
                assert bytes(view) == random.Random(i).randbytes(512), i
print("done", flush=True)
"""


def worker(folder: Path, seed: int, steps: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(folder), str(seed), str(steps)], stdout=subprocess.PIPE, text=True
    )


def test_processes_and_threads_never_see_a_torn_or_foreign_block(folder: Path) -> None:
    processes = [worker(folder, seed, 400) for seed in range(3)]
    outputs = [process.communicate(timeout=DEADLINE_S)[0] for process in processes]
    assert outputs == ["ready\ndone\n"] * 3, outputs
    tier = SharedHostTier(folder, 16, BLOCK_BYTES)
    failures: list[object] = []

    def use(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(100):
            item = rng.randrange(48)
            put(tier, item)
            (found,) = tier.get([item])
            if found is not None and bytes(found) != content(item):
                failures.append(item)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    tier.check_integrity()
    tier.close()


@pytest.mark.parametrize(
    "rounds", [pytest.param(4), pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_kill_9_of_sharers_leaves_whole_blocks_and_no_lost_slot(folder: Path, rounds: int) -> None:
    tier = SharedHostTier(folder, 16, BLOCK_BYTES)
    rng = random.Random(1)
    for round_number in range(rounds):
        process = worker(folder, round_number, 0)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(rng.randrange(50, 150)):
            item = rng.randrange(48)
            put(tier, item)
            (found,) = tier.get([item])
            assert found is None or found == content(item)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(DEADLINE_S)
        process.stdout.close()
    fresh = list(range(100, 116))
    put(tier, *fresh)  # every slot can be had again: dead processes keep none
    assert tier.contains(fresh) == [True] * 16
    assert tier.get(fresh) == [content(item) for item in fresh]
    tier.check_integrity()
    tier.close()


@pytest.mark.parametrize("size", [1, HUGE_PAGE_BYTES - 1, HUGE_PAGE_BYTES + 1])
def test_an_arena_is_as_large_as_asked_and_begins_at_a_page(size: int) -> None:
    memory, _ = allocate_arena(size)
    assert memory.nbytes == size
    assert memory.ctypes.data % 4096 == 0
    memory[-1] = 7
    assert memory[-1] == 7


def test_more_memory_than_there_is_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="lower host_blocks"):
        allocate_arena(1 << 60)
