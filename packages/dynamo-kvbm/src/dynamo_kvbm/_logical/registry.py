"""Which tiers hold a block: one registry shared by the pools of all tiers."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from dynamo_core.enums import Tier

_NEAREST_FIRST = (Tier.DEVICE, Tier.HOST, Tier.DISK, Tier.EXTERNAL)
_BITS = {tier: 1 << i for i, tier in enumerate(_NEAREST_FIRST)}


class BlockRegistry:
    """Presence marks by sequence hash. A block without a mark is not in here, so its size is that of the pools.

    Any thread may call any method.
    """

    def __init__(self) -> None:
        self._marks: dict[int, int] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Blocks that some tier holds."""
        return len(self._marks)

    def mark(self, sequence_hashes: Iterable[int], tier: Tier) -> list[int]:
        """Note that a tier holds blocks; return those that no tier held before."""
        bit = _BITS[tier]
        first: list[int] = []
        with self._lock:
            for item in sequence_hashes:
                marks = self._marks.get(item, 0)
                if not marks:
                    first.append(item)
                self._marks[item] = marks | bit
        return first

    def unmark(self, sequence_hashes: Iterable[int], tier: Tier) -> list[int]:
        """Note that a tier holds blocks no more; return those that no tier holds now."""
        bit = _BITS[tier]
        last: list[int] = []
        with self._lock:
            for item in sequence_hashes:
                marks = self._marks.get(item, 0)
                if not marks & bit:
                    continue
                if marks == bit:
                    del self._marks[item]
                    last.append(item)
                else:
                    self._marks[item] = marks & ~bit
        return last

    def tiers(self, sequence_hash: int) -> tuple[Tier, ...]:
        """Return the tiers that hold a block, nearest first."""
        marks = self._marks.get(sequence_hash, 0)
        return tuple(tier for tier in _NEAREST_FIRST if marks & _BITS[tier])
