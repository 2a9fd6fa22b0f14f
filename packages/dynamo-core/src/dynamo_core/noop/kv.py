"""Block storage in a dictionary, and the connector of an engine without a block manager."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from dynamo_core.enums import Tier
from dynamo_core.errors import ConfigurationError, InvalidRequestError
from dynamo_core.kv import BlockAccess, BlockDescriptor, MatchResult, TierChange


class DictBlockStore:
    """Blocks by sequence hash in memory; the lowest priority, then the least recently used, goes first.

    Finding a victim is linear in the capacity, which suits tests and small stores.

    Args:
        capacity_blocks: Most blocks held, at least 1.
        tier: What it stands for.
    """

    def __init__(self, capacity_blocks: int, *, tier: Tier = Tier.HOST) -> None:
        if capacity_blocks < 1:
            raise ConfigurationError(f"capacity_blocks {capacity_blocks} must be at least 1")
        self._capacity = capacity_blocks
        self._tier = tier
        self._lock = threading.Lock()
        self._blocks: OrderedDict[int, tuple[int, bytes]] = OrderedDict()

    @property
    def tier(self) -> Tier:
        """Which tier."""
        return self._tier

    @property
    def capacity_blocks(self) -> int:
        """Most blocks it holds."""
        return self._capacity

    def contains(self, sequence_hashes: Sequence[int]) -> list[bool]:
        """Whether each block is present."""
        with self._lock:
            return [key in self._blocks for key in sequence_hashes]

    def put(self, blocks: Sequence[BlockDescriptor], data: Sequence[bytes | memoryview]) -> list[int]:
        """Store blocks; return what was evicted for them, in order of eviction.

        Raises:
            InvalidRequestError: if there are more or fewer pieces than blocks.
        """
        if len(blocks) != len(data):
            raise InvalidRequestError(f"{len(blocks)} blocks came with {len(data)} pieces of data", param="data")
        evicted: list[int] = []
        with self._lock:
            # Present blocks are renewed first, so that the new ones do not push them out.
            for block, piece in sorted(
                zip(blocks, data, strict=True), key=lambda pair: pair[0].sequence_hash not in self._blocks
            ):
                if block.sequence_hash not in self._blocks and len(self._blocks) >= self._capacity:
                    evicted.append(self._evict())
                self._blocks[block.sequence_hash] = (block.priority, bytes(piece))
                self._blocks.move_to_end(block.sequence_hash)
            return [key for key in evicted if key not in self._blocks]

    def get(self, sequence_hashes: Sequence[int]) -> list[bytes | memoryview | None]:
        """Return each block's bytes, or None, and renew the present ones."""
        with self._lock:
            return [self._read(key) for key in sequence_hashes]

    def remove(self, sequence_hashes: Sequence[int]) -> None:
        """Drop blocks; absent ones are ignored."""
        with self._lock:
            for key in sequence_hashes:
                self._blocks.pop(key, None)

    def close(self) -> None:
        """Drop everything. Idempotent."""
        with self._lock:
            self._blocks.clear()

    def _read(self, key: int) -> bytes | None:
        found = self._blocks.get(key)
        if found is None:
            return None
        self._blocks.move_to_end(key)
        return found[1]

    def _evict(self) -> int:
        victim = min(self._blocks, key=lambda key: self._blocks[key][0])
        del self._blocks[victim]
        return victim


class NullKvConnector:
    """A block manager that keeps nothing: every match misses, nothing is onboarded."""

    def start(self, access: BlockAccess, on_change: Callable[[TierChange], None]) -> None:
        """Bind to nothing."""

    def match(self, sequence_hashes: Sequence[int]) -> MatchResult:
        """Find nothing."""
        return MatchResult()

    def onboard(self, sequence_hashes: Sequence[int], block_ids: Sequence[int]) -> int:
        """Copy nothing."""
        return 0

    def on_register(self, blocks: Sequence[BlockDescriptor], block_ids: Sequence[int]) -> None:
        """Offload nothing."""

    def on_evict(self, blocks: Sequence[BlockDescriptor], block_ids: Sequence[int]) -> None:
        """Save nothing."""

    def clear(self) -> None:
        """Have nothing to forget."""

    def close(self) -> None:
        """Have nothing to release."""
