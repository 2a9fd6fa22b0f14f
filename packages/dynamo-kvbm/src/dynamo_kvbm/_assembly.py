"""From options to a cascade of tiers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from dynamo_core.clock import Clock
from dynamo_core.kv import BlockLayout, BlockStore, TierChange
from dynamo_core.telemetry import Metrics
from dynamo_core.tokens import XXH3_1337_V1
from dynamo_kvbm._admission import CostTest
from dynamo_kvbm._eviction.base import EvictionOrder
from dynamo_kvbm._manager import BlockManager, TierConfig
from dynamo_kvbm._settings import KvbmSettings
from dynamo_kvbm._tiers.disk import DiskTier
from dynamo_kvbm._tiers.host import HostTier


def build_manager(  # noqa: PLR0913 - built in one place, every argument by name
    settings: KvbmSettings,
    layout: BlockLayout,
    eviction: Callable[[int], EvictionOrder],
    *,
    on_change: Callable[[TierChange], None],
    metrics: Metrics,
    clock: Clock,
    cost_test: CostTest | None,
) -> BlockManager:
    """Return the tiers that the options name, opened; what was opened is closed again if one cannot be.

    Raises:
        ConfigurationError: if a tier has no room for one block, or its storage cannot be used.
    """
    size = layout.block_bytes
    opened: list[BlockStore] = []
    try:
        opened.append(HostTier(settings.host_capacity_blocks(size), size, eviction=eviction))
        lower: list[TierConfig] = []
        if settings.disk_dir:
            disk = DiskTier(
                Path(settings.disk_dir),
                settings.disk_capacity_blocks(size),
                size,
                fingerprint=fingerprint(settings.model, layout),
                eviction=eviction,
            )
            opened.append(disk)
            lower.append(TierConfig(disk, settings.disk_offload, settings.queue_blocks(size)))
        return BlockManager(
            opened[0], lower, block_bytes=size, on_change=on_change, metrics=metrics, clock=clock, cost_test=cost_test
        )
    except BaseException:
        for store in opened:
            store.close()
        raise


def fingerprint(model: str, layout: BlockLayout) -> str:
    """Name what blocks are of: two processes may share stored blocks only if this is equal."""
    shape = " ".join(f"{name}={value}" for name, value in msgspec.structs.asdict(layout).items())
    return f"{model} {XXH3_1337_V1} {shape}"
