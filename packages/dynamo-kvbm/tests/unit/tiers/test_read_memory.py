from __future__ import annotations

import random
import threading
from pathlib import Path

import numpy as np
import pytest

from dynamo_core.kv import BlockDescriptor
from dynamo_kvbm import DiskTier
from dynamo_kvbm._tiers.read_memory import KEPT_PIECES, MAX_BYTES, MIN_BYTES, ReadMemory


def address(piece: np.ndarray) -> int:
    return piece.ctypes.data


@pytest.mark.parametrize("size", [1, MIN_BYTES - 1, MIN_BYTES, MIN_BYTES + 4097])
def test_a_piece_is_as_large_as_asked_and_begins_at_a_page(size: int) -> None:
    piece = ReadMemory().take(size)
    assert piece.nbytes == size
    assert address(piece) % 4096 == 0
    piece[-1] = 7


def test_a_piece_comes_back_with_the_last_view_of_it_and_not_before() -> None:
    memory = ReadMemory()
    piece = memory.take(MIN_BYTES)
    first = address(piece)
    views = [piece[:10].data, memoryview(piece[10:20]), np.frombuffer(piece[20:30].data, dtype=np.uint8)]
    del piece
    while views:
        other = memory.take(MIN_BYTES)
        assert address(other) != first
        del other
        views.pop()
    pieces = [memory.take(MIN_BYTES), memory.take(MIN_BYTES)]
    assert first in map(address, pieces)


def test_what_is_kept_is_bounded_and_what_is_too_small_goes() -> None:
    memory = ReadMemory()
    pieces = [memory.take(MIN_BYTES) for _ in range(3 * KEPT_PIECES)]
    del pieces
    assert memory.kept_bytes == KEPT_PIECES * MIN_BYTES
    larger = memory.take(2 * MIN_BYTES)
    assert memory.kept_bytes == 0
    del larger
    assert memory.kept_bytes == 2 * MIN_BYTES
    too_large = memory.take(MAX_BYTES + 1)
    del too_large
    assert memory.kept_bytes == 2 * MIN_BYTES


def test_blocks_that_are_still_held_are_never_overwritten_by_other_reads(tmp_path: Path) -> None:
    size = MIN_BYTES // 4
    data = {key: random.Random(key).randbytes(size) for key in range(1, 17)}
    tier = DiskTier(tmp_path, 16, size)
    tier.put([BlockDescriptor(key) for key in data], list(data.values()))
    wrong: list[int] = []

    def read(seed: int) -> None:
        rng = random.Random(seed)
        held: list[tuple[int, bytes | memoryview | None]] = []
        for _ in range(40):
            keys = rng.sample(range(1, 17), 6)
            held += zip(keys, tier.get(keys), strict=True)
            rng.shuffle(held)
            wrong.extend(key for key, piece in held if piece is None or piece != data[key])
            del held[rng.randrange(12) :]

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    tier.close()
