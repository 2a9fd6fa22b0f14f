"""From options to a cascade of tiers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from dynamo_core import plugins
from dynamo_core.clock import Clock
from dynamo_core.enums import Tier
from dynamo_core.errors import ConfigurationError
from dynamo_core.kv import BlockDescriptor, BlockLayout, BlockStore, TierChange
from dynamo_core.telemetry import Metrics
from dynamo_core.tokens import XXH3_1337_V1
from dynamo_kvbm._admission import CostTest
from dynamo_kvbm._codecs import CodecName, make_codec
from dynamo_kvbm._eviction.base import EvictionOrder
from dynamo_kvbm._manager import BlockManager, TierConfig
from dynamo_kvbm._metrics import KvbmMetrics
from dynamo_kvbm._peers.source import PeerSource
from dynamo_kvbm._peers.thread import PeerAddress, PeerThread, open_peers
from dynamo_kvbm._settings import KvbmSettings
from dynamo_kvbm._tiers.base import described
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
    peers: list[PeerThread] = []
    try:
        opened.append(_host_tier(settings, layout, eviction, clock))
        lower: list[TierConfig] = []
        if settings.disk_dir:
            opened.append(_disk_tier(settings, layout, eviction))
            lower.append(TierConfig(opened[-1], settings.disk_offload, settings.queue_blocks(size)))
        if settings.object_url:
            opened.append(_object_tier(settings, layout, eviction, clock))
            lower.append(TierConfig(opened[-1], settings.object_offload, settings.queue_blocks(size)))
        if settings.store:
            opened.append(_plugin_tier(settings, layout))
            lower.append(TierConfig(opened[-1], settings.store_offload, settings.queue_blocks(size)))
        if settings.peer_discovery:
            peers.append(_peers(settings, layout, opened[0], clock, KvbmMetrics(metrics)))
        return BlockManager(
            opened[0],
            lower,
            block_bytes=size,
            on_change=_told(on_change, peers),
            metrics=metrics,
            clock=clock,
            cost_test=cost_test,
            peers=PeerSource(peers[0], settings.peer_timeout_s) if peers else None,
        )
    except BaseException:
        for part in (*peers, *opened):
            part.close()
        raise


def _plugin_tier(settings: KvbmSettings, layout: BlockLayout) -> BlockStore:
    make = plugins.load("kv_tiers", settings.store)
    name = fingerprint(settings.model, layout, CodecName.NONE)
    try:
        store: object = make(layout=layout, fingerprint=name, **settings.store_options)
    except TypeError as error:
        raise ConfigurationError(f"tier {settings.store!r} refuses store_options: {error}") from error
    if not isinstance(store, BlockStore):
        raise ConfigurationError(
            f"tier {settings.store!r} made a {type(store).__name__}, which is no dynamo_core.kv.BlockStore"
        )
    return store


def _peers(
    settings: KvbmSettings, layout: BlockLayout, host: BlockStore, clock: Clock, metrics: KvbmMetrics
) -> PeerThread:
    def read(sequence_hashes: Sequence[int]) -> list[tuple[BlockDescriptor, bytes | memoryview]]:
        known = {block.sequence_hash: block for block in described(host, sequence_hashes)}
        pairs = zip(sequence_hashes, host.get(sequence_hashes), strict=True)
        whole = itertools.takewhile(lambda pair: pair[1] is not None and pair[0] in known, pairs)
        return [(known[item], data) for item, data in whole if data is not None]

    return open_peers(
        PeerAddress(settings.peer_discovery, settings.peer_plane, settings.peer_namespace),
        layout=layout,
        fingerprint=fingerprint(settings.model, layout, CodecName.NONE),
        read=read,
        max_blocks=settings.peer_blocks,
        clock=clock,
        metrics=metrics,
    )


def _told(on_change: Callable[[TierChange], None], peers: Sequence[PeerThread]) -> Callable[[TierChange], None]:
    """Return a listener that tells peers of the host tier's changes too."""

    def tell(change: TierChange) -> None:
        on_change(change)
        if change.tier is Tier.HOST:
            for thread in peers:
                thread.note([block.sequence_hash for block in change.stored], list(change.removed))

    return tell


def _host_tier(
    settings: KvbmSettings, layout: BlockLayout, eviction: Callable[[int], EvictionOrder], clock: Clock
) -> BlockStore:
    capacity = settings.host_capacity_blocks(layout.block_bytes)
    if not settings.host_dir:
        return HostTier(
            capacity, layout.block_bytes, eviction=eviction, clock=clock, quotas=settings.host_quotas or None
        )
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
