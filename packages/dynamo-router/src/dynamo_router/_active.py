"""Blocks of running requests: which are distinct, and how many of a prompt a worker already computes on.

Sequences are chains, so the blocks that a worker has active are closed under "parent of" at all times: a prompt's
active part is a prefix, and its depth on every worker at once is found by the index's bisection.
"""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_router._search import closed_depths


class ActiveBlocks:
    """Reference counts of active blocks for every slot, with the usual count of one left implicit."""

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}
        # Per slot: block -> references beyond the first.
        self._extra: dict[int, dict[int, int]] = {}
        # Chains to enter before the next look, with their known depth: a decision need not wait for it.
        self._pending: list[tuple[int, int, Sequence[int]]] = []

    def __len__(self) -> int:
        self.settle()
        return len(self._holders)

    def depths(self, hashes: Sequence[int], among: int = -1) -> list[tuple[int, int]]:
        """Return ``(leading active blocks, slots)`` for each distinct depth above zero."""
        self.settle()
        return closed_depths(self._holders, hashes, among)

    def add(self, slot: int, hashes: Sequence[int]) -> int:
        """Count one request's chain of blocks in a slot; returns how many of them are new there."""
        depth = next((depth for depth, _ in self.depths(hashes, 1 << slot)), 0)
        self._pending.append((slot, depth, hashes))
        return len(hashes) - depth

    def settle(self) -> None:
        """Do now what is put off until the next look."""
        if self._pending:
            pending, self._pending = self._pending, []
            for slot, depth, hashes in pending:
                self._enter(slot, depth, hashes)

    def _enter(self, slot: int, depth: int, hashes: Sequence[int]) -> None:
        bit = 1 << slot
        if depth:
            extra = self._extra.setdefault(slot, {})
            for key in hashes[:depth]:
                extra[key] = extra.get(key, 0) + 1
        holders = self._holders
        fresh = list(hashes[depth:])
        if holders.keys().isdisjoint(fresh):
            holders.update(dict.fromkeys(fresh, bit))
        else:
            for key in fresh:
                holders[key] = holders.get(key, 0) | bit

    def remove(self, slot: int, hashes: Sequence[int]) -> int:
        """Take one request's chain out again; returns how many of its blocks nobody there uses any more."""
        self.settle()
        extra = self._extra.get(slot)
        if not extra:
            return self._clear_all(list(hashes), 1 << slot)
        freed = 0
        for key in hashes:
            count = extra.get(key)
            if count is None:
                freed += self._clear(key, 1 << slot)
            elif count == 1:
                del extra[key]
            else:
                extra[key] = count - 1
        return freed

    def _clear_all(self, keys: list[int], bit: int) -> int:
        holders = self._holders
        if list(map(holders.get, keys)).count(bit) == len(keys) == len(set(keys)):
            for key in keys:
                del holders[key]
            return len(keys)
        return sum(self._clear(key, bit) for key in keys)

    def _clear(self, key: int, bit: int) -> int:
        held = self._holders.get(key, 0)
        if not held & bit:
            return 0
        if held == bit:
            del self._holders[key]
        else:
            self._holders[key] = held & ~bit
        return 1
