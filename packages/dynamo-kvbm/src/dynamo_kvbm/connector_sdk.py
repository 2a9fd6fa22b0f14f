"""For whoever connects an engine: the two sides of a block manager whose scheduler and workers are apart.

``RankLeader`` lives where the engine schedules, ``RankWorker`` lives with each rank's device memory. Between them go
``RankPlan`` and ``RankReport``, plain values that msgspec and pickle can carry, by the engine's own way (scheduler and
worker output, pipes, RPC). An engine that runs in one process needs none of this: ``KvbmConnector`` is one object.
``ArenaBlockAccess`` gives access to blocks in CPU memory, ``torch_block_access`` to those of a PyTorch engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynamo_core.kv import BlockAccess, BlockLayout
from dynamo_kvbm._ranks.leader import RankLeader
from dynamo_kvbm._ranks.plan import Move, PlanOutcome, RankPlan, RankReport
from dynamo_kvbm._ranks.worker import RankWorker
from dynamo_kvbm._transfer.access import ArenaBlockAccess
from dynamo_kvbm._transfer.layout import ArenaLayout, KvArena, LayoutKind

__all__ = [
    "ArenaBlockAccess",
    "ArenaLayout",
    "KvArena",
    "LayoutKind",
    "Move",
    "PlanOutcome",
    "RankLeader",
    "RankPlan",
    "RankReport",
    "RankWorker",
    "torch_block_access",
]


def torch_block_access(layers: Sequence[Any], layout: BlockLayout, *, staging_blocks: int = 32) -> BlockAccess:
    """Return access to the KV tensors of an engine that uses PyTorch, on a GPU or on the CPU.

    Args:
        layers: One tensor a layer, ``[blocks, 2, block_size, kv_heads, head_dim]``, of any strides that keep heads and
            elements of a token side by side.
        layout: Shape of one block.
        staging_blocks: Most blocks moved at once; pinned memory for two batches is taken here.

    Raises:
        ConfigurationError: if the extra ``torch`` is not installed, or a tensor does not fit the layout.
    """
    from dynamo_kvbm._transfer.torch_access import TorchBlockAccess

    return TorchBlockAccess(layers, layout, staging_blocks=staging_blocks)
