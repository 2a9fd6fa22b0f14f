from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_core.errors import ConfigurationError, InvalidRequestError
from dynamo_core.kv import BlockLayout
from dynamo_kvbm._transfer.copier import BlockCopier, CpuCopier, gather, scatter
from dynamo_kvbm._transfer.layout import ArenaLayout, KvArena, LayoutKind, shard_layout

BLOCK = BlockLayout(num_layers=3, block_size=4, kv_heads=4, head_dim=2)
LAYOUTS = [
    ArenaLayout(BLOCK, 5),
    ArenaLayout(BLOCK, 5, alignment=4096),
    ArenaLayout(BLOCK, 5, LayoutKind.LAYER_SEPARATE),
    ArenaLayout(BLOCK, 5, LayoutKind.LAYER_SEPARATE, kv_first=True),
    ArenaLayout(BLOCK, 5, LayoutKind.LAYER_SEPARATE, kv_first=True, alignment=512),
]


def pieces(count: int) -> list[bytes]:
    rng = np.random.default_rng(7)
    return [rng.bytes(BLOCK.block_bytes) for _ in range(count)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_regions_are_apart_and_inside(layout: ArenaLayout) -> None:
    starts = sorted(
        layout.offset(block, layer, kv)
        for block in range(layout.num_blocks)
        for layer in range(BLOCK.num_layers)
        for kv in range(2)
    )
    assert all(after - before >= layout.half_bytes for before, after in itertools.pairwise(starts))
    assert starts[-1] + layout.half_bytes <= layout.total_bytes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_view_shows_the_bytes_at_the_offsets_without_a_copy(layout: ArenaLayout) -> None:
    buffer = bytearray(layout.total_bytes)
    arena = KvArena(layout, buffer)
    arena.view[3, 2, 1] = 7.0
    start = layout.offset(3, 2, 1)
    assert np.all(np.frombuffer(buffer[start : start + layout.half_bytes], np.float32) == 7.0)
    assert np.count_nonzero(np.frombuffer(buffer, np.float32)) == layout.half_bytes // 4


@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("target", LAYOUTS)
def test_blocks_keep_their_bytes_through_any_two_layouts(source: ArenaLayout, target: ArenaLayout) -> None:
    first, second = KvArena(source), KvArena(target)
    data = pieces(4)
    scatter(first, [4, 0, 1, 2], data)
    assert isinstance(CpuCopier(), BlockCopier)
    CpuCopier().copy(first.view, [4, 0, 1, 2], second.view, [0, 2, 3, 4])
    assert gather(second, [0, 2, 3, 4]) == data
    assert not second.view[1].any()


@given(ids=st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True))
def test_gather_is_the_inverse_of_scatter(ids: Sequence[int]) -> None:
    for layout in LAYOUTS:
        arena = KvArena(layout)
        scatter(arena, ids, pieces(len(ids)))
        assert gather(arena, ids) == pieces(len(ids))


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "f8", "i8"])
def test_every_dtype_has_its_size(dtype: str) -> None:
    block = BlockLayout(2, 4, 2, 8, dtype=dtype)
    assert KvArena(ArenaLayout(block, 3)).view.nbytes == 3 * block.block_bytes


def test_shards_are_slices_of_the_heads() -> None:
    arena = KvArena(ArenaLayout(BLOCK, 5))
    scatter(arena, range(5), pieces(5))
    part = shard_layout(BLOCK, 1, 2)
    assert (part.kv_heads, part.tp_rank, part.tp_size) == (2, 1, 2)
    shard = KvArena(ArenaLayout(part, 2, LayoutKind.LAYER_SEPARATE))
    CpuCopier().copy(arena.shard(1, 2), [3, 0], shard.view, [0, 1])
    assert np.array_equal(shard.view[0], arena.view[3][..., 2:, :], equal_nan=True)
    with pytest.raises(InvalidRequestError, match="tp_size must divide"):
        arena.shard(0, 3)


def test_bad_layouts_and_copies_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="no power of two"):
        ArenaLayout(BLOCK, 1, alignment=3)
    with pytest.raises(ConfigurationError, match="splits an element"):
        ArenaLayout(BLOCK, 1, alignment=2)
    with pytest.raises(ConfigurationError, match="holds nothing"):
        ArenaLayout(BLOCK, 0)
    with pytest.raises(InvalidRequestError, match="too small"):
        KvArena(LAYOUTS[0], bytearray(10))
    arena = KvArena(LAYOUTS[0])
    with pytest.raises(InvalidRequestError, match="source has blocks 0 to 4, not 5 to 5"):
        gather(arena, [5])
    with pytest.raises(InvalidRequestError, match="a piece has 3 bytes"):
        scatter(arena, [0], [b"abc"])
    with pytest.raises(InvalidRequestError, match="1 pieces of data for 2 blocks"):
        scatter(arena, [0, 1], pieces(1))
    with pytest.raises(InvalidRequestError, match="do not fit"):
        CpuCopier().copy(arena.view, [0], KvArena(ArenaLayout(BlockLayout(1, 1, 1, 1), 1)).view, [0])
