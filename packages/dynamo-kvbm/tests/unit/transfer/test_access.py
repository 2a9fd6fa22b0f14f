"""One set of tests for every block access: NumPy, and where PyTorch is installed its CPU and, marked ``gpu``, CUDA."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from dynamo_core.clock import SystemClock
from dynamo_core.errors import ConfigurationError, InvalidRequestError
from dynamo_core.kv import BlockAccess, BlockDescriptor, BlockLayout
from dynamo_core.telemetry import Metrics
from dynamo_kvbm import create_connector
from dynamo_kvbm._transfer.access import ArenaBlockAccess, SupportsReadViews
from dynamo_kvbm._transfer.layout import ArenaLayout, KvArena, LayoutKind

BLOCK = BlockLayout(num_layers=3, block_size=4, kv_heads=2, head_dim=8, dtype="bf16")
BLOCKS = 9
WITH_TORCH = importlib.util.find_spec("torch") is not None


def torch_layers(device: str, *, kv_first: bool) -> list[Any]:
    import torch

    shape = (2, BLOCKS, BLOCK.block_size, BLOCK.kv_heads, BLOCK.head_dim)
    caches = [torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in range(BLOCK.num_layers)]
    return [cache.transpose(0, 1) if kv_first else cache.transpose(0, 1).contiguous() for cache in caches]


def made(kind: str) -> BlockAccess:
    if kind == "arena":
        return ArenaBlockAccess(KvArena(ArenaLayout(BLOCK, BLOCKS, LayoutKind.LAYER_SEPARATE, kv_first=True)))
    from dynamo_kvbm._transfer.torch_access import TorchBlockAccess

    device, _, layout = kind.partition("-")
    return TorchBlockAccess(torch_layers(device, kv_first=layout == "kv_first"), BLOCK, staging_blocks=2)


CPU_KINDS = ["cpu-kv_first", "cpu-blocks_first"] if WITH_TORCH else []
CUDA_KINDS = [pytest.param(f"cuda-{kind}", marks=pytest.mark.gpu) for kind in ("kv_first", "blocks_first")]


@pytest.fixture(params=["arena", *CPU_KINDS, *CUDA_KINDS])
def access(request: pytest.FixtureRequest) -> BlockAccess:
    return made(request.param)


def pieces(ids: Sequence[int]) -> list[bytes]:
    return [np.random.default_rng(item).bytes(BLOCK.block_bytes) for item in ids]


@pytest.mark.parametrize("ids", [[], [3], [8, 0, 5], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
def test_blocks_come_back_from_where_they_were_put(access: BlockAccess, ids: list[int]) -> None:
    access.write_blocks(ids, pieces(ids))
    assert access.read_blocks(ids) == pieces(ids)
    others = [item for item in range(BLOCKS) if item not in ids]
    assert access.read_blocks(others) == [bytes(BLOCK.block_bytes)] * len(others)


def test_views_are_the_same_bytes(access: BlockAccess) -> None:
    access.write_blocks([1, 7, 4], pieces([1, 7, 4]))
    if isinstance(access, SupportsReadViews):
        assert [bytes(view) for view in access.read_views([7, 1])] == pieces([7, 1])
        assert [bytes(view) for view in access.read_views([7, 1, 4])] == pieces([7, 1, 4])
        assert access.read_views([]) == []
    assert access.read_blocks([4]) == pieces([4])


def test_the_last_of_several_writes_counts(access: BlockAccess) -> None:
    for seed in range(5):
        access.write_blocks([2, 3], pieces([seed, seed + 10]))
    assert access.read_blocks([3, 2]) == pieces([14, 4])


def test_what_does_not_fit_is_refused_and_changes_nothing(access: BlockAccess) -> None:
    with pytest.raises(InvalidRequestError, match="not 9 to 9"):
        access.read_blocks([9])
    with pytest.raises(InvalidRequestError, match="a piece has 3 bytes"):
        access.write_blocks([0], [b"abc"])
    with pytest.raises(InvalidRequestError, match="1 pieces of data for 2 blocks"):
        access.write_blocks([0, 1], pieces([1]))
    assert access.read_blocks([0, 1]) == [bytes(BLOCK.block_bytes)] * 2


def test_blocks_survive_the_way_through_a_host_tier(access: BlockAccess) -> None:
    connector = create_connector(options={"host_blocks": 4}, clock=SystemClock(), metrics=Metrics())
    connector.start(access, lambda change: None)
    access.write_blocks([0, 1, 2], pieces([0, 1, 2]))
    connector.on_evict([BlockDescriptor(10), BlockDescriptor(11, 0, 10, 1), BlockDescriptor(12, 0, 11, 2)], [0, 1, 2])
    access.write_blocks([0, 1, 2], pieces([5, 5, 5]))
    assert connector.onboard([10, 11, 12], [8, 7, 6]) == 3
    assert access.read_blocks([8, 7, 6]) == pieces([0, 1, 2])
    connector.close()


def test_memory_is_shared_with_whoever_speaks_dlpack() -> None:
    layout = ArenaLayout(BlockLayout(2, 4, 2, 8), 3)
    arena = KvArena(layout)
    seen = np.from_dlpack(arena)
    arena.view[1, 1, 0, 2, 1, 7] = 5.0
    assert seen[1, 1, 0, 2, 1, 7] == 5.0
    memory = np.zeros((3, *layout.block.shape), dtype=np.float32)
    again = KvArena.from_dlpack(layout, memory)
    again.view[2] = 3.0
    assert memory[2].min() == 3.0
    with pytest.raises(InvalidRequestError, match="side by side"):
        KvArena.from_dlpack(layout, memory.transpose(0, 2, 1, 3, 4, 5))


if WITH_TORCH:

    def test_tensors_of_another_shape_are_refused() -> None:
        from dynamo_kvbm._transfer.torch_access import TorchBlockAccess

        layers = torch_layers("cpu", kv_first=True)
        with pytest.raises(ConfigurationError, match="2 KV tensors were given for 3 layers"):
            TorchBlockAccess(layers[:2], BLOCK)
        with pytest.raises(ConfigurationError, match="with heads side by side"):
            TorchBlockAccess([layer.transpose(-1, -2) for layer in layers], BLOCK)
        with pytest.raises(ConfigurationError, match="moves nothing"):
            TorchBlockAccess(layers, BLOCK, staging_blocks=0)

    def test_a_tensor_and_an_arena_are_one_memory() -> None:
        import torch

        layout = ArenaLayout(BlockLayout(2, 4, 2, 8), 3)
        tensor = torch.zeros((3, *layout.block.shape))
        KvArena.from_dlpack(layout, tensor).view[1] = 7.0
        assert float(tensor[1].min()) == 7.0
        assert torch.from_dlpack(KvArena(layout)).shape == tensor.shape
