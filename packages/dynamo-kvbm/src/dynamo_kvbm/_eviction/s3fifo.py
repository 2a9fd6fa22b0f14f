"""S3-FIFO, leaves first.

Source: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023. New blocks enter a small queue of a
tenth of the capacity; those used again there move on to the main queue, the others leave quickly. A ghost queue lets
a block that comes back enter the main queue at once. A block that is not an evictable leaf goes round once more.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from dynamo_core.errors import InternalError
from dynamo_kvbm._eviction.base import LeafOrder

SMALL_SHARE = 0.1
MAX_FREQUENCY = 3


class S3FifoOrder(LeafOrder):
    """Filters one-hit blocks out early.

    Args:
        capacity_blocks: Size of the tier; sets the small queue's share and the ghosts' bound.
    """

    def __init__(self, capacity_blocks: int) -> None:
        self._small_blocks = max(1, int(capacity_blocks * SMALL_SHARE))
        # As many as the main queue has room for.
        self._ghost_blocks = capacity_blocks - self._small_blocks
        super().__init__()
        self._small: OrderedDict[int, None] = OrderedDict()
        self._main: OrderedDict[int, None] = OrderedDict()
        self._ghosts: OrderedDict[int, None] = OrderedDict()
        self._frequency: dict[int, int] = {}

    def insert(self, blocks: Sequence[tuple[int, int | None]]) -> None:
        """Add blocks at the tail of the small queue, those that a ghost remembers at the tail of the main one."""
        for sequence_hash, parent in reversed(blocks):
            self._lineage.add(sequence_hash, parent)
            self._frequency[sequence_hash] = 0
            remembered = self._ghosts.pop(sequence_hash, _ABSENT) is not _ABSENT
            (self._main if remembered else self._small)[sequence_hash] = None

    def touch(self, sequence_hashes: Sequence[int]) -> None:
        """Count a use of each block, up to three."""
        for sequence_hash in sequence_hashes:
            self._frequency[sequence_hash] = min(MAX_FREQUENCY, self._frequency[sequence_hash] + 1)

    def evict(self) -> int | None:
        """Remove and return the next leaf of the small queue if that is over its share, else of the main one."""
        # Each step drops a use, moves a block on, or passes one over, so this many steps see every block as a leaf.
        for _ in range((MAX_FREQUENCY + 2) * (len(self._lineage) + 1)):
            from_small = bool(self._small) and (len(self._small) > self._small_blocks or not self._main)
            victim = self._step_small() if from_small else self._step_main()
            if victim is not None:
                self._forget(victim)
                return victim
        return self._evict_any()

    def check_integrity(self) -> None:
        """Verify that each held block is in one queue and no ghost is held."""
        self._lineage.check_integrity()
        queues = (self._small, self._main)
        if sum(map(len, queues)) != len(self._lineage) or self._frequency.keys() != {*self._small, *self._main}:
            raise InternalError("lineage, queues and counters hold different blocks")
        if any(block in self._lineage for block in self._ghosts):
            raise InternalError("a ghost is held")

    def _drop(self, sequence_hash: int) -> None:
        self._small.pop(sequence_hash, None)
        self._main.pop(sequence_hash, None)
        self._forget(sequence_hash)

    def _step_small(self) -> int | None:
        sequence_hash, _ = self._small.popitem(last=False)
        if self._frequency[sequence_hash] > 0:
            self._frequency[sequence_hash] = 0
            self._main[sequence_hash] = None
            return None
        if not self._lineage.evictable(sequence_hash):
            self._small[sequence_hash] = None
            return None
        self._ghosts[sequence_hash] = None
        while len(self._ghosts) > self._ghost_blocks:
            self._ghosts.popitem(last=False)
        return sequence_hash

    def _step_main(self) -> int | None:
        if not self._main:
            return None
        sequence_hash, _ = self._main.popitem(last=False)
        uses = self._frequency[sequence_hash]
        if uses or not self._lineage.evictable(sequence_hash):
            self._frequency[sequence_hash] = max(0, uses - 1)
            self._main[sequence_hash] = None
            return None
        return sequence_hash

    def _evict_any(self) -> int | None:
        """Find a leaf wherever it is; the queues' own turn ends without one when the small queue is all pinned."""
        for queue in (self._small, self._main):
            for sequence_hash in queue:
                if self._lineage.evictable(sequence_hash):
                    del queue[sequence_hash]
                    self._forget(sequence_hash)
                    return sequence_hash
        return None

    def _forget(self, sequence_hash: int) -> None:
        del self._frequency[sequence_hash]
        self._lineage.remove(sequence_hash)


_ABSENT = object()
