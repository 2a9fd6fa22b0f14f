from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dynamo_core.enums import Tier
from dynamo_core.errors import ConfigurationError, InternalError, InvalidRequestError
from dynamo_core.kv import BlockDescriptor, BlockStore
from dynamo_kvbm._tiers.disk import DiskTier
from dynamo_kvbm._tiers.slot_file import RECORD

BLOCK_BYTES = 4096


def block(sequence_hash: int, parent: int | None = None) -> BlockDescriptor:
    return BlockDescriptor(sequence_hash=sequence_hash, local_hash=sequence_hash ^ 7, parent_hash=parent, position=3)


def content(sequence_hash: int) -> bytes:
    return random.Random(sequence_hash).randbytes(BLOCK_BYTES)


def fill(tier: DiskTier, *hashes: int) -> list[int]:
    chain = [block(item, hashes[i - 1] if i else None) for i, item in enumerate(hashes)]
    return tier.put(chain, [content(item) for item in hashes])


def test_it_is_a_block_store_of_the_disk_tier(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 4, BLOCK_BYTES)
    assert isinstance(tier, BlockStore)
    assert (tier.tier, tier.capacity_blocks, tier.used_blocks) == (Tier.DISK, 4, 0)
    fill(tier, 1, 2)
    assert tier.get([1, 2, 3]) == [content(1), content(2), None]
    tier.check_integrity()
    tier.close()
    tier.close()


def test_a_full_tier_evicts_leaves_and_keeps_parents_of_new_blocks(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 2, BLOCK_BYTES)
    fill(tier, 1, 2)
    assert tier.put([block(3, 1)], [content(3)]) == [2]
    assert tier.contains([1, 2, 3]) == [True, False, True]
    tier.check_integrity()


def test_blocks_survive_a_restart_with_all_they_are(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 8, BLOCK_BYTES)
    fill(tier, 2**64 - 1, 5)
    tier.sync()
    tier.close()
    again = DiskTier(tmp_path, 4, BLOCK_BYTES)
    assert again.get([2**64 - 1, 5]) == [content(2**64 - 1), content(5)]
    assert sorted(again.held(), key=lambda item: item.sequence_hash) == [block(5, 2**64 - 1), block(2**64 - 1)]
    assert fill(again, 11, 12, 13) == [5]
    again.check_integrity()


def test_a_folder_of_other_blocks_is_refused(tmp_path: Path) -> None:
    DiskTier(tmp_path, 4, BLOCK_BYTES, fingerprint="model-a").close()
    with pytest.raises(ConfigurationError, match=r"model-a.*not of.*model-b"):
        DiskTier(tmp_path, 4, BLOCK_BYTES, fingerprint="model-b")
    with pytest.raises(ConfigurationError, match="give another folder or delete it"):
        DiskTier(tmp_path, 4, 2 * BLOCK_BYTES, fingerprint="model-a")
    DiskTier(tmp_path, 4, BLOCK_BYTES, fingerprint="model-a").close()


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 4, BLOCK_BYTES)
    with pytest.raises(ConfigurationError, match="belongs to a running process"):
        DiskTier(tmp_path, 4, BLOCK_BYTES)
    tier.close()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="give a writable folder"):
        DiskTier(tmp_path / "file" / "tier", 4, BLOCK_BYTES)


def test_a_block_of_another_size_is_refused(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 4, BLOCK_BYTES)
    with pytest.raises(InvalidRequestError, match="has 3 bytes"):
        tier.put([block(1)], [b"abc"])


@pytest.mark.parametrize("offset", [0, 1000, BLOCK_BYTES - 1])
def test_a_flipped_bit_is_a_miss_and_the_block_leaves(tmp_path: Path, offset: int) -> None:
    tier = DiskTier(tmp_path, 4, BLOCK_BYTES)
    fill(tier, 1)
    with (tmp_path / "0000.data").open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(InternalError, match="checksums"):
        tier.check_integrity()
    assert tier.get([1]) == [None]
    assert (tier.used_blocks, tier.damaged_blocks) == (0, 1)
    fill(tier, 1)
    assert tier.get([1]) == [content(1)]


def test_bytes_of_another_block_are_a_miss(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 4, BLOCK_BYTES)
    fill(tier, 1)
    with (tmp_path / "0000.data").open("r+b") as file:
        file.write(content(2))
    assert tier.get([1]) == [None]


def test_a_cut_data_file_is_a_miss(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 4, BLOCK_BYTES)
    fill(tier, 1, 2)
    os.truncate(tmp_path / "0000.data", BLOCK_BYTES + 100)
    assert tier.get([1, 2]) == [content(1), None]


@pytest.mark.parametrize("byte", range(0, RECORD.itemsize, 5))
def test_a_damaged_record_is_an_empty_slot_after_a_restart(tmp_path: Path, byte: int) -> None:
    tier = DiskTier(tmp_path, 4, BLOCK_BYTES)
    fill(tier, 1)
    fill(tier, 2)
    tier.close()
    with (tmp_path / "0000.index").open("r+b") as file:
        file.seek(byte)
        value = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([value ^ 0xFF]))
    again = DiskTier(tmp_path, 4, BLOCK_BYTES)
    assert again.used_blocks == 1
    assert again.get([2]) == [content(2)]
    again.check_integrity()


def test_a_full_disk_loses_the_block_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DiskTier(tmp_path, 4, BLOCK_BYTES)
    fill(tier, 1)

    def no_space(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", no_space)
        fill(tier, 1, 2)
    assert (tier.contains([1, 2]), tier.failed_writes) == ([True, False], 1)
    fill(tier, 1, 2)
    assert tier.get([1, 2]) == [content(1), content(2)]
    tier.check_integrity()


def test_a_disk_without_room_for_a_segment_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DiskTier(tmp_path, 4, BLOCK_BYTES)

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    assert fill(tier, 1) == []
    assert tier.contains([1]) == [False]


def test_a_read_error_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DiskTier(tmp_path, 4, BLOCK_BYTES)
    fill(tier, 1)

    def broken(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    assert tier.get([1]) == [None]


def test_threads_never_see_a_torn_or_foreign_block(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 4, BLOCK_BYTES)
    contents = {key: content(key) for key in range(1, 12)}
    wrong: list[int] = []

    def work(seed: int) -> None:
        for step in range(400):
            key = (seed * 31 + step * 7) % 11 + 1
            tier.put([block(key)], [contents[key]])
            [found] = tier.get([key])
            if found is not None and found != contents[key]:
                wrong.append(key)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert tier.used_blocks <= 4
    assert tier.damaged_blocks == 0
    tier.check_integrity()


WRITER = """
import random, sys
from pathlib import Path
from dynamo_core.kv import BlockDescriptor
from dynamo_kvbm._tiers.disk import DiskTier

tier = DiskTier(Path(sys.argv[1]), 64, 4096)
print("open", flush=True)
for key in range(int(sys.argv[2]), int(sys.argv[2]) + 1_000_000):
    evicted = tier.put([BlockDescriptor(key)], [random.Random(key).randbytes(4096)])
    print(key, *evicted, flush=True)
"""


@pytest.mark.parametrize("acknowledged", [1, 40, 300])
def test_kill_9_loses_no_acknowledged_block_and_serves_no_wrong_byte(tmp_path: Path, acknowledged: int) -> None:
    held: set[int] = set()
    starts = (1, 10**7)
    for start in starts:
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(start)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        for _ in range(acknowledged + 1):
            line = writer.stdout.readline()
            if line.strip() != "open":
                key, *evicted = map(int, line.split())
                held = (held - set(evicted)) | {key}
        writer.kill()
        rest = writer.stdout.read().splitlines()
        writer.stdout.close()
        writer.wait()
        for line in rest:
            numbers = [int(part) for part in line.split()]
            held = (held - set(numbers[1:])) | set(numbers[:1])
    tier = DiskTier(tmp_path, 64, BLOCK_BYTES)
    tier.check_integrity()
    # The write under way at each kill may have evicted one block that it could not report.
    lost = [key for key in held if tier.get([key]) != [content(key)]]
    assert len(lost) <= len(starts)
    assert all(tier.get([item.sequence_hash]) == [content(item.sequence_hash)] for item in tier.held())
    tier.close()


@pytest.mark.parametrize("size", [65_536, 65_537, 100_000])
@pytest.mark.parametrize("direct", [True, False])
def test_large_blocks_come_back_whole_past_the_page_cache_or_through_it(
    tmp_path: Path, size: int, direct: bool
) -> None:
    data = {key: random.Random(key).randbytes(size) for key in range(1, 9)}
    tier = DiskTier(tmp_path, 6, size, direct=direct)
    tier.put([block(key) for key in data][:4], [data[key] for key in data][:4])
    page = memoryview(bytearray(size + 5))[5:]  # not at a page's start
    page[:] = data[5]
    tier.put([block(5)], [page])
    tier.close()
    again = DiskTier(tmp_path, 6, size, direct=not direct)
    assert again.get(list(range(1, 6))) == [data[key] for key in range(1, 6)]
    again.check_integrity()
    again.close()


def test_a_file_system_without_direct_access_is_used_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def refuse(path: os.PathLike[str], flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)
    tier = DiskTier(tmp_path, 4, BLOCK_BYTES)
    fill(tier, 1, 2)
    assert tier.get([1, 2]) == [content(1), content(2)]
    tier.close()
