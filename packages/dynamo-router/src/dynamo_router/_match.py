"""What a look-up in the index finds."""

from __future__ import annotations

from dynamo_core.enums import Tier
from dynamo_router._bits import slots_of

TIERS = (Tier.DEVICE, Tier.HOST, Tier.DISK, Tier.EXTERNAL)
"""Tiers that an index knows, nearest first."""


class Match:
    """Holders of a prompt's prefix.

    Attributes:
        device: ``(blocks, workers)`` for each distinct depth, workers as a bit set of slots, each worker once.
        lower: ``(tier index, blocks, workers)`` runs that continue a worker's device prefix in lower tiers.
    """

    __slots__ = ("device", "lower")

    def __init__(self) -> None:
        self.device: list[tuple[int, int]] = []
        self.lower: list[tuple[int, int, int]] = []

    def groups(self) -> list[tuple[tuple[int, ...], int]]:
        """Return ``(blocks per tier, workers)``, each worker with any block in exactly one group."""
        if not self.lower:
            return [((blocks, 0, 0, 0), bits) for blocks, bits in self.device]
        groups: dict[tuple[int, ...], int] = {}
        for slot, blocks in self.by_slot().items():
            groups[tuple(blocks)] = groups.get(tuple(blocks), 0) | 1 << slot
        return list(groups.items())

    def by_slot(self) -> dict[int, list[int]]:
        """Return blocks per tier for each slot with any."""
        found: dict[int, list[int]] = {}
        for blocks, bits in self.device:
            for slot in slots_of(bits):
                found.setdefault(slot, [0] * len(TIERS))[0] = blocks
        for tier, blocks, bits in self.lower:
            for slot in slots_of(bits):
                found.setdefault(slot, [0] * len(TIERS))[tier] += blocks
        return found
