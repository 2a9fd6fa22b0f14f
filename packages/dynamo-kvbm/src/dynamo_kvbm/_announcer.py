"""Says what entered and left each tier: once each, in an order that ends in the truth.

Tiers change on several threads. So a change is not passed on as it was seen: whoever changed blocks names them here,
and under one lock the tier is asked again and the difference to what was announced before is reported. Two threads
that race over a block both end up here, and the later one reports what is true then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from dynamo_core.enums import Tier
from dynamo_core.kv import BlockDescriptor, BlockStore, TierChange
from dynamo_kvbm._metrics import KvbmMetrics
from dynamo_kvbm._tiers.base import SupportsHeld


class TierAnnouncer:
    """Reports differences between tiers and what was announced of them.

    Args:
        on_change: Hears each change, under a lock; it must not call back.
        metrics: Where the counts go.
    """

    def __init__(self, on_change: Callable[[TierChange], None], metrics: KvbmMetrics) -> None:
        self._on_change = on_change
        self._metrics = metrics
        self._lock = threading.Lock()
        self._announced: dict[Tier, set[int]] = {}

    def announced(self, tier: Tier) -> list[int]:
        """Return the blocks that were announced in a tier and are not taken back."""
        with self._lock:
            return list(self._announced.get(tier, ()))

    def compare(self, store: BlockStore) -> None:
        """Report every difference between a tier that can name its blocks and what was announced of it."""
        held = store.held() if isinstance(store, SupportsHeld) else []
        self.refresh(store, sorted(held, key=lambda block: block.position), self.announced(store.tier))

    def refresh(
        self, store: BlockStore, blocks: Sequence[BlockDescriptor], removed: Sequence[int] = ()
    ) -> tuple[BlockDescriptor, ...]:
        """Report what became of these blocks in a tier; return those that are new there."""
        with self._lock:
            known = self._announced.setdefault(store.tier, set())
            by_hash = {block.sequence_hash: block for block in blocks}
            named = [*dict.fromkeys([*by_hash, *removed])]
            present = {item for item, there in zip(named, store.contains(named), strict=True) if there}
            stored = tuple(block for item, block in by_hash.items() if item in present and item not in known)
            gone = tuple(item for item in named if item not in present and item in known)
            known.update(block.sequence_hash for block in stored)
            known.difference_update(gone)
            self._metrics.evicted.labels(store.tier.value).inc(len(gone))
            self._metrics.used.labels(store.tier.value).set(len(known))
            if stored or gone:
                self._on_change(TierChange(store.tier, stored, gone))
        return stored
