"""KV blocks by content, without the content: who holds which, what is cached, what gives way."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from dynamo_core.engine import KvEventSink
from dynamo_core.kv import BlockDescriptor


class BlockPool:
    """Blocks of one dp rank.

    A block is *private* to a sequence until it is full; then it is registered under its hash and shared. Registered
    blocks that nobody holds stay cached, and the least recently used give way, leaves before their parents.

    Args:
        total: Blocks in all.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.sink: KvEventSink | None = None
        self._holders: dict[int, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._private = 0

    @property
    def active(self) -> int:
        """Blocks that sequences hold."""
        return len(self._holders) + self._private

    @property
    def free(self) -> int:
        """Blocks that can be had, cached ones included."""
        return self.total - self.active

    @property
    def cached(self) -> int:
        """Registered blocks that nobody holds."""
        return len(self._cached)

    def match(self, hashes: Sequence[int]) -> int:
        """Number of blocks, from the start, that are registered."""
        for count, sequence_hash in enumerate(hashes):
            if sequence_hash not in self._holders and sequence_hash not in self._cached:
                return count
        return len(hashes)

    def hold(self, hashes: Sequence[int]) -> None:
        """Hold registered blocks once more."""
        for sequence_hash in hashes:
            self._cached.pop(sequence_hash, None)
            self._holders[sequence_hash] = self._holders.get(sequence_hash, 0) + 1

    def allocate(self, count: int) -> bool:
        """Take private blocks, evicting cached ones; return whether there was room."""
        if count > self.free:
            return False
        self._private += count
        self._evict(self.active + len(self._cached) - self.total)
        return True

    def register(self, blocks: Sequence[BlockDescriptor]) -> None:
        """Turn private blocks into shared ones; one that is registered already is only held once more."""
        new = [block for block in blocks if not self._is_registered(block.sequence_hash)]
        self.hold([block.sequence_hash for block in blocks])
        self._private -= len(blocks)
        if new and self.sink is not None:
            self.sink.stored(new)

    def release(self, hashes: Sequence[int], private: int) -> None:
        """Let go of a sequence's blocks, the last first, so that leaves are evicted before their parents."""
        self._private -= private
        for sequence_hash in reversed(hashes):
            left = self._holders[sequence_hash] - 1
            if left:
                self._holders[sequence_hash] = left
            else:
                del self._holders[sequence_hash]
                self._cached[sequence_hash] = None

    def clear(self) -> int:
        """Forget all cached blocks; return how many."""
        count = len(self._cached)
        self._evict(count)
        return count

    def _is_registered(self, sequence_hash: int) -> bool:
        return sequence_hash in self._holders or sequence_hash in self._cached

    def _evict(self, count: int) -> None:
        if count <= 0:
            return
        gone = [self._cached.popitem(last=False)[0] for _ in range(count)]
        if self.sink is not None:
            self.sink.removed(gone)
