"""One tier of the cascade with the queue before it and the rule for what comes down to it."""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_core.enums import Tier
from dynamo_core.kv import BlockDescriptor, BlockStore
from dynamo_kvbm._admission import SecondTouch
from dynamo_kvbm._announcer import TierAnnouncer
from dynamo_kvbm._metrics import KvbmMetrics
from dynamo_kvbm._settings import OffloadPolicy
from dynamo_kvbm._tiers.base import SupportsTouch, described
from dynamo_kvbm._write_behind import WriteBehind

SEEN_FACTOR = 4
MIN_SEEN_BLOCKS = 1024


class Level:
    """A store below the nearest one.

    Args:
        store: The tier.
        policy: What comes down to it.
        block_bytes: Size of every block.
        queue_blocks: Most blocks staged before it.
        announcer: Hears what was written.
        metrics: Where counts go.
    """

    def __init__(
        self,
        store: BlockStore,
        policy: OffloadPolicy,
        block_bytes: int,
        queue_blocks: int,
        announcer: TierAnnouncer,
        metrics: KvbmMetrics,
    ) -> None:
        self.store = store
        self.policy = policy
        self._seen = SecondTouch(max(MIN_SEEN_BLOCKS, SEEN_FACTOR * store.capacity_blocks))
        self._announcer = announcer
        self._metrics = metrics
        self.queue = WriteBehind(
            store, queue_blocks, block_bytes, on_written=self._on_written, on_failed=self._on_failed
        )

    @property
    def name(self) -> str:
        """Label in metrics and measurements."""
        return self.store.tier.value

    @property
    def tier(self) -> Tier:
        """Which tier."""
        return self.store.tier

    def note_use(self, sequence_hashes: Sequence[int]) -> None:
        """Count a use of blocks, wherever they are, and renew those that the tier holds."""
        self._seen.note(sequence_hashes)
        if isinstance(self.store, SupportsTouch):
            self.store.touch(sequence_hashes)

    def contains(self, sequence_hashes: Sequence[int]) -> list[bool]:
        """Whether each block is in the tier or staged before it."""
        pairs = zip(self.queue.contains(sequence_hashes), self.store.contains(sequence_hashes), strict=True)
        return [staged or stored for staged, stored in pairs]

    def get(self, sequence_hashes: Sequence[int]) -> list[bytes | memoryview | None]:
        """Return the bytes of each block, from the queue or from the tier."""
        data = self.queue.get(sequence_hashes)
        missing = [item for item, piece in zip(sequence_hashes, data, strict=True) if piece is None]
        if missing:
            stored = dict(zip(missing, self.store.get(missing), strict=True))
            self._announcer.refresh(self.store, (), [item for item, piece in stored.items() if piece is None])
            data = [stored[item] if piece is None else piece for item, piece in zip(sequence_hashes, data, strict=True)]
        return data

    def describe(self, sequence_hashes: Sequence[int]) -> list[BlockDescriptor]:
        """Return what is known of those blocks that are here."""
        staged = self.queue.describe(sequence_hashes)
        return [*staged, *described(self.store, sequence_hashes)]

    def take(self, blocks: Sequence[BlockDescriptor], data: Sequence[bytes | memoryview]) -> None:
        """Stage those blocks that the tier wants and does not hold."""
        present = self.store.contains([block.sequence_hash for block in blocks])
        wanted = [
            (block, piece)
            for block, piece, there in zip(blocks, data, present, strict=True)
            if not there and self._wants(block)
        ]
        refused = self.queue.offer([block for block, _ in wanted], [piece for _, piece in wanted])
        self._metrics.dropped.labels(self.tier.value, "queue_full").inc(len(refused))
        self._metrics.queued.labels(self.tier.value).set(len(self.queue))

    def clear(self) -> None:
        """Drop everything, staged blocks too."""
        self.queue.discard()
        announced = self._announcer.announced(self.tier)
        self.store.remove(announced)
        self._announcer.refresh(self.store, (), announced)

    def close(self) -> None:
        """Write what is staged and close the tier."""
        self.queue.close()
        self.store.close()

    def _wants(self, block: BlockDescriptor) -> bool:
        return self.policy is not OffloadPolicy.SECOND_TOUCH or self._seen.seen_twice(block.sequence_hash)

    def _on_written(self, blocks: Sequence[BlockDescriptor], evicted: Sequence[int]) -> None:
        stored = self._announcer.refresh(self.store, blocks, evicted)
        self._metrics.offloaded.labels(self.tier.value).inc(len(stored))
        self._metrics.queued.labels(self.tier.value).set(len(self.queue))
        kept = self.store.contains([block.sequence_hash for block in blocks])
        self._metrics.dropped.labels(self.tier.value, "write_failed").inc(kept.count(False))

    def _on_failed(self, blocks: Sequence[BlockDescriptor]) -> None:
        self._metrics.dropped.labels(self.tier.value, "write_failed").inc(len(blocks))
