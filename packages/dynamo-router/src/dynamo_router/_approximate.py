"""An index predicted from the router's own decisions, for workers whose events are missing or not believed.

A routed prompt counts as held by its worker for a time, within the worker's capacity. A prompt's blocks are entered
tail first, so a parent is always newer than its children: what expires or is displaced is a leaf, and prefixes stay
closed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from dynamo_router._search import closed_depths

DEFAULT_CAPACITY_BLOCKS = 65_536


class ApproximateIndex:
    """Predicted holders of blocks.

    Args:
        ttl_s: Seconds for which a routed block counts as held; each use renews it.
    """

    def __init__(self, ttl_s: float) -> None:
        self.ttl_s = ttl_s
        self._holders: dict[int, int] = {}
        # Per slot: block -> time of its last use, oldest first.
        self._used: dict[int, OrderedDict[int, float]] = {}

    def __len__(self) -> int:
        return sum(len(used) for used in self._used.values())

    def insert(self, slot: int, hashes: Sequence[int], now_s: float, *, capacity_blocks: int = 0) -> None:
        """Enter a routed prompt; beyond the capacity the least recently used blocks go."""
        used = self._used.setdefault(slot, OrderedDict())
        depth = next((depth for depth, _ in closed_depths(self._holders, hashes, 1 << slot)), 0)
        keys = list(hashes)
        keys.reverse()
        fresh = len(keys) - depth
        self._mark(1 << slot, keys[:fresh])
        for key in keys[:fresh]:
            used[key] = now_s
        renew = used.move_to_end
        for key in keys[fresh:]:
            renew(key)
            used[key] = now_s
        self._shrink(slot, used, now_s - self.ttl_s, capacity_blocks or DEFAULT_CAPACITY_BLOCKS)

    def match(self, hashes: Sequence[int], among: int, now_s: float) -> list[tuple[int, int]]:
        """Return ``(blocks, slots)`` for each distinct depth above zero; what has expired is dropped first."""
        for slot, used in self._used.items():
            if among >> slot & 1:
                self._shrink(slot, used, now_s - self.ttl_s, len(used))
        return closed_depths(self._holders, hashes, among)

    def clear(self, slot: int) -> None:
        """Forget what a slot holds."""
        used = self._used.pop(slot, None)
        if used is not None:
            self._shrink(slot, used, float("inf"), 0)

    def _mark(self, bit: int, keys: list[int]) -> None:
        holders = self._holders
        if holders.keys().isdisjoint(keys):
            holders.update(dict.fromkeys(keys, bit))
        else:
            for key in keys:
                holders[key] = holders.get(key, 0) | bit

    def _shrink(self, slot: int, used: OrderedDict[int, float], oldest_s: float, capacity: int) -> None:
        while used:
            key = next(iter(used))
            if len(used) <= capacity and used[key] >= oldest_s:
                return
            del used[key]
            rest = self._holders[key] & ~(1 << slot)
            if rest:
                self._holders[key] = rest
            else:
                del self._holders[key]
