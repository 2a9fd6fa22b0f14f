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
from dynamo_kvbm._codecs import CodecName, make_codec
from dynamo_kvbm._eviction.base import EvictionOrder
from dynamo_kvbm._manager import BlockManager, TierConfig
from dynamo_kvbm._settings import KvbmSettings
from dynamo_kvbm._tiers.disk import DiskTier
from dynamo_kvbm._tiers.encoded import EncodedStore
from dynamo_kvbm._tiers.host import HostTier
from dynamo_kvbm._tiers.object_store import ObjectTier
from dynamo_kvbm._tiers.shared_host import SharedHostTier


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
        opened.append(_host_tier(settings, layout, eviction, clock))
        lower: list[TierConfig] = []
        if settings.disk_dir:
            opened.append(_disk_tier(settings, layout, eviction))
            lower.append(TierConfig(opened[-1], settings.disk_offload, settings.queue_blocks(size)))
        if settings.object_url:
            opened.append(_object_tier(settings, layout, eviction, clock))
            lower.append(TierConfig(opened[-1], settings.object_offload, settings.queue_blocks(size)))
        return BlockManager(
            opened[0], lower, block_bytes=size, on_change=on_change, metrics=metrics, clock=clock, cost_test=cost_test
        )
    except BaseException:
        for store in opened:
            store.close()
        raise


def _host_tier(
    settings: KvbmSettings, layout: BlockLayout, eviction: Callable[[int], EvictionOrder], clock: Clock
) -> BlockStore:
    capacity = settings.host_capacity_blocks(layout.block_bytes)
    if not settings.host_dir:
        return HostTier(capacity, layout.block_bytes, eviction=eviction)
    return SharedHostTier(
        Path(settings.host_dir),
        capacity,
        layout.block_bytes,
        fingerprint=fingerprint(settings.model, layout, CodecName.NONE),
        eviction=eviction,
        clock=clock,
    )


def _disk_tier(settings: KvbmSettings, layout: BlockLayout, eviction: Callable[[int], EvictionOrder]) -> BlockStore:
    codec = make_codec(settings.disk_codec, layout)
    stored_bytes = codec.stored_bytes or layout.block_bytes
    disk = DiskTier(
        Path(settings.disk_dir),
        settings.disk_capacity_blocks(stored_bytes),
        stored_bytes,
        fingerprint=fingerprint(settings.model, layout, settings.disk_codec),
        eviction=eviction,
    )
    return disk if settings.disk_codec is CodecName.NONE else EncodedStore(disk, codec, layout.block_bytes)


def _object_tier(
    settings: KvbmSettings, layout: BlockLayout, eviction: Callable[[int], EvictionOrder], clock: Clock
) -> BlockStore:
    codec = make_codec(settings.object_codec, layout)
    objects = ObjectTier(
        settings.object_url,
        settings.object_capacity_blocks(codec.stored_bytes or layout.block_bytes),
        fingerprint=fingerprint(settings.model, layout, settings.object_codec),
        config={"endpoint": settings.object_endpoint} if settings.object_endpoint else {},
        eviction=eviction,
        clock=clock,
    )
    return EncodedStore(objects, codec, layout.block_bytes)


def fingerprint(model: str, layout: BlockLayout, codec: CodecName) -> str:
    """Name what blocks are of: two processes may share stored blocks only if this is equal."""
    shape = " ".join(f"{name}={value}" for name, value in msgspec.structs.asdict(layout).items())
    return f"{model} {XXH3_1337_V1} {shape} codec={codec.value}"
