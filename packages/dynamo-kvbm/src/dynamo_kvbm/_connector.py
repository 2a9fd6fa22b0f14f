"""The block manager behind an engine: offload on the policy's moment, match and onboard on the engine's question."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynamo_core import plugins
from dynamo_core.clock import Clock
from dynamo_core.errors import CapacityExhaustedError, InternalError
from dynamo_core.kv import BlockAccess, BlockDescriptor, BlockStore, MatchResult, TierChange
from dynamo_core.telemetry import Metrics
from dynamo_kvbm._admission import CostTest, SecondTouch
from dynamo_kvbm._assembly import build_manager
from dynamo_kvbm._eviction.base import EvictionOrder
from dynamo_kvbm._eviction.hints import HintBook
from dynamo_kvbm._manager import BlockManager
from dynamo_kvbm._metrics import KvbmMetrics
from dynamo_kvbm._settings import Admission, KvbmSettings, OffloadPolicy, settings_from_options
from dynamo_kvbm._tiers.base import SupportsHintBook, SupportsQuotas
from dynamo_kvbm._transfer.access import SupportsReadViews

if TYPE_CHECKING:
    # Core has had it since 1.1; with an older one nobody calls ``hint``.
    from dynamo_core.kv import BlockHints

SEEN_BLOCKS = 1 << 16


@dataclass(frozen=True)
class _Binding:
    access: BlockAccess
    manager: BlockManager


class KvbmConnector:
    """A ``KvConnector`` over a cascade of tiers.

    Args:
        settings: Tiers, sizes and policies.
        clock: Measures transfers.
        metrics: Where its metrics go.

    Raises:
        ConfigurationError: if the eviction order is not installed.
    """

    def __init__(self, settings: KvbmSettings, clock: Clock, metrics: Metrics) -> None:
        self._settings = settings
        self._clock = clock
        self._scope = metrics
        self._metrics = KvbmMetrics(metrics)
        self._eviction: Callable[[int], EvictionOrder] = plugins.load("kv_eviction", settings.eviction)
        self._cost_test = CostTest(clock) if settings.admission is Admission.COST else None
        self._registered = SecondTouch(SEEN_BLOCKS)
        self._bound: _Binding | None = None

    def start(self, access: BlockAccess, on_change: Callable[[TierChange], None]) -> None:
        """Size the tiers for the engine's layout, bind to it, and announce what lasting tiers hold already.

        Raises:
            ConfigurationError: if a tier has no room for one block, or its storage cannot be used.
        """
        manager = build_manager(
            self._settings,
            access.layout,
            self._eviction,
            on_change=on_change,
            metrics=self._scope,
            clock=self._clock,
            cost_test=self._cost_test,
        )
        self._bound = _Binding(access, manager)

    @property
    def manager(self) -> BlockManager:
        """The tiers; exist after ``start``."""
        return self._require_bound().manager

    def match(self, sequence_hashes: Sequence[int]) -> MatchResult:
        """Return how many blocks, from the start of the list, the tiers hold together, and mark them as used."""
        return self.manager.match(sequence_hashes)

    def onboard(self, sequence_hashes: Sequence[int], block_ids: Sequence[int]) -> int:
        """Copy the longest present prefix into device blocks; return its length."""
        bound = self._require_bound()
        with bound.manager.lend(sequence_hashes) as views:
            bound.access.write_blocks(block_ids[: len(views)], views)
        return len(views)

    def on_register(self, blocks: Sequence[BlockDescriptor], block_ids: Sequence[int]) -> None:
        """Offload complete blocks: all if the policy is ``register``, those seen before if it is ``second-touch``."""
        if self._cost_test is not None:
            self._cost_test.computed(blocks)
            self._metrics.recompute_s.set(self._cost_test.recompute_s or 0.0)
        if self._settings.offload is OffloadPolicy.REGISTER:
            self._offload(blocks, block_ids)
        elif self._settings.offload is OffloadPolicy.SECOND_TOUCH:
            self._registered.note([block.sequence_hash for block in blocks])
            again = [
                (block, block_id)
                for block, block_id in zip(blocks, block_ids, strict=True)
                if self._registered.seen_twice(block.sequence_hash)
            ]
            self._offload([block for block, _ in again], [block_id for _, block_id in again])

    def on_evict(self, blocks: Sequence[BlockDescriptor], block_ids: Sequence[int]) -> None:
        """Offload blocks that the device is about to reuse if the policy is ``evict``."""
        if self._settings.offload is OffloadPolicy.EVICT:
            self._offload(blocks, block_ids)

    def hint(self, sequence_hashes: Sequence[int], hints: BlockHints) -> None:
        """Pass on to the host tier what is known of the future of blocks, wherever they are now.

        What it makes of it is the eviction order's affair: ``hinted`` hears of sessions, ``priority`` of priorities.
        Blocks are retained in any order, as far as no more than half of the tier is, and count to their tenant's quota.
        """
        host = self.manager.nearest
        if not isinstance(host, SupportsHintBook):
            return
        now = self._clock.monotonic()

        def apply(book: HintBook) -> None:
            if self._settings.host_quotas and hints.tenant:
                book.assign(sequence_hashes, hints.tenant)
            if hints.session_ended or hints.next_turn_s is not None:
                book.expect(
                    sequence_hashes,
                    None if hints.session_ended or hints.next_turn_s is None else now + hints.next_turn_s,
                )
            if hints.priority:
                book.prioritise(sequence_hashes, hints.priority)
            if hints.retain_s is not None:
                book.retain(sequence_hashes, now + hints.retain_s)

        host.hints(apply)

    def prefetch(self, sequence_hashes: Sequence[int]) -> None:
        """Start to bring the longest held prefix to the host tier. A full transfer queue makes it do nothing."""
        try:
            self.manager.prefetch(sequence_hashes)
        except CapacityExhaustedError:
            self._metrics.prefetch_refused.inc(len(sequence_hashes))

    def clear(self) -> None:
        """Drop every block of every tier and say so."""
        self.manager.clear()

    def close(self) -> None:
        """Write what is staged and release the tiers. Idempotent."""
        if self._bound is not None:
            self._bound.manager.close()

    def _offload(self, blocks: Sequence[BlockDescriptor], block_ids: Sequence[int]) -> None:
        bound = self._require_bound()
        present = bound.manager.nearest.contains([block.sequence_hash for block in blocks])
        pairs = zip(blocks, block_ids, present, strict=True)
        missing = [(block, block_id) for block, block_id, there in pairs if not there]
        if missing:
            ids = [block_id for _, block_id in missing]
            access = bound.access
            data = access.read_views(ids) if isinstance(access, SupportsReadViews) else access.read_blocks(ids)
            bound.manager.offload([block for block, _ in missing], data)
            self._count_tenants(bound.manager.nearest)

    def _count_tenants(self, host: BlockStore) -> None:
        if isinstance(host, SupportsQuotas):
            for tenant in self._settings.host_quotas:
                self._metrics.tenant_used.labels(tenant).set(host.used_by(tenant))

    def _require_bound(self) -> _Binding:
        if self._bound is None:
            raise InternalError("the connector is not bound to an engine; call start first")
        return self._bound


def create_connector(*, options: Mapping[str, object], clock: Clock, metrics: Metrics) -> KvbmConnector:
    """Build the connector from options: the entry ``kvbm`` of ``dynamo_core.kv_connectors``.

    Raises:
        ConfigurationError: for an unknown option or a bad value.
    """
    return KvbmConnector(settings_from_options(options), clock, metrics)
