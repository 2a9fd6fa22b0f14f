"""The block manager behind an engine: offload on the policy's moment, match and onboard on the engine's question."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from dynamo_core import plugins
from dynamo_core.clock import Clock
from dynamo_core.enums import Tier
from dynamo_core.errors import InternalError
from dynamo_core.kv import BlockAccess, BlockDescriptor, MatchResult, TierChange
from dynamo_core.telemetry import Metrics
from dynamo_kvbm._eviction.base import EvictionOrder
from dynamo_kvbm._metrics import KvbmMetrics
from dynamo_kvbm._settings import KvbmSettings, OffloadPolicy, settings_from_options
from dynamo_kvbm._tiers.host import HostTier


class KvbmConnector:
    """A ``KvConnector`` with a host tier.

    Args:
        settings: Sizes and policy.
        metrics: Where its metrics go.

    Raises:
        ConfigurationError: if the eviction order is not installed.
    """

    def __init__(self, settings: KvbmSettings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = KvbmMetrics(metrics)
        self._eviction: Callable[[int], EvictionOrder] = plugins.load("kv_eviction", settings.eviction)
        self._bound: tuple[BlockAccess, HostTier] | None = None
        self._on_change: Callable[[TierChange], None] = lambda change: None

    def start(self, access: BlockAccess, on_change: Callable[[TierChange], None]) -> None:
        """Size the host tier for the engine's layout and bind to it."""
        block_bytes = access.layout.block_bytes
        host = HostTier(self._settings.host_capacity_blocks(block_bytes), block_bytes, eviction=self._eviction)
        self._bound = (access, host)
        self._on_change = on_change
        self._metrics.capacity.labels(Tier.HOST.value).set(host.capacity_blocks)

    @property
    def host(self) -> HostTier:
        """The host tier; exists after ``start``."""
        return self._require_bound()[1]

    def match(self, sequence_hashes: Sequence[int]) -> MatchResult:
        """Return how many blocks, from the start of the list, the host holds, and mark them as used."""
        host = self._require_bound()[1]
        present = host.contains(sequence_hashes)
        blocks = present.index(False) if False in present else len(present)
        host.touch(sequence_hashes[:blocks])
        self._metrics.requested.inc(len(sequence_hashes))
        self._metrics.matched.labels(Tier.HOST.value).inc(blocks)
        return MatchResult(blocks, (Tier.HOST,) * blocks)

    def onboard(self, sequence_hashes: Sequence[int], block_ids: Sequence[int]) -> int:
        """Copy the longest present prefix into device blocks, straight from the arena; return its length."""
        access, host = self._require_bound()
        with host.borrow(sequence_hashes) as views:
            access.write_blocks(block_ids[: len(views)], views)
        self._metrics.onboarded.labels(Tier.HOST.value).inc(len(views))
        return len(views)

    def on_register(self, blocks: Sequence[BlockDescriptor], block_ids: Sequence[int]) -> None:
        """Offload complete blocks if the policy is ``register``."""
        if self._settings.offload is OffloadPolicy.REGISTER:
            self._offload(blocks, block_ids)

    def on_evict(self, blocks: Sequence[BlockDescriptor], block_ids: Sequence[int]) -> None:
        """Offload blocks that the device is about to reuse if the policy is ``evict``."""
        if self._settings.offload is OffloadPolicy.EVICT:
            self._offload(blocks, block_ids)

    def clear(self) -> None:
        """Drop every block of the host tier and say so."""
        removed = self._require_bound()[1].clear()
        self._note(TierChange(Tier.HOST, removed=tuple(removed)))

    def close(self) -> None:
        """Release the host tier. Idempotent."""
        if self._bound is not None:
            self._bound[1].close()

    def _offload(self, blocks: Sequence[BlockDescriptor], block_ids: Sequence[int]) -> None:
        access, host = self._require_bound()
        present = host.contains([block.sequence_hash for block in blocks])
        missing = [
            (block, block_id) for block, block_id, there in zip(blocks, block_ids, present, strict=True) if not there
        ]
        if not missing:
            return
        fresh = [block for block, _ in missing]
        evicted = host.put(fresh, access.read_blocks([block_id for _, block_id in missing]))
        kept = host.contains([block.sequence_hash for block in fresh])
        stored = tuple(block for block, there in zip(fresh, kept, strict=True) if there)
        self._metrics.offloaded.labels(Tier.HOST.value).inc(len(stored))
        # A block that came and went within this batch was never announced.
        announced = set(evicted) - {block.sequence_hash for block in fresh}
        self._note(TierChange(Tier.HOST, stored, tuple(item for item in evicted if item in announced)))

    def _note(self, change: TierChange) -> None:
        self._metrics.evicted.labels(Tier.HOST.value).inc(len(change.removed))
        self._metrics.used.labels(Tier.HOST.value).set(self.host.used_blocks)
        if change.stored or change.removed:
            self._on_change(change)

    def _require_bound(self) -> tuple[BlockAccess, HostTier]:
        if self._bound is None:
            raise InternalError("the connector is not bound to an engine; call start first")
        return self._bound


def create_connector(*, options: Mapping[str, object], clock: Clock, metrics: Metrics) -> KvbmConnector:
    """Build the connector from options: the entry ``kvbm`` of ``dynamo_core.kv_connectors``.

    Raises:
        ConfigurationError: for an unknown option or a bad value.
    """
    return KvbmConnector(settings_from_options(options), metrics)
