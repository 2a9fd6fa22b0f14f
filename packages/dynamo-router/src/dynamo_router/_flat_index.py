"""The naive index: sets and a walk. Slow, obvious, and the oracle that ``BlockIndex`` is tested against."""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_core.enums import Tier
from dynamo_core.events import BlockRemoved, BlocksCleared, BlockStored, KvEvent
from dynamo_core.ids import WorkerId
from dynamo_core.tokens import chain_hashes, unpack_hashes

_LOWER = (Tier.HOST, Tier.DISK, Tier.EXTERNAL)
_TIERS = (Tier.DEVICE, *_LOWER)


class FlatIndex:
    """What each worker holds in each tier: engine hash -> sequence hash."""

    def __init__(self) -> None:
        self._names: dict[WorkerId, dict[Tier, dict[int, int]]] = {}

    def apply(self, worker: WorkerId, event: KvEvent) -> None:
        """Apply one event, or leave things alone if it cannot be placed."""
        tiers = self._names.setdefault(worker, {tier: {} for tier in _TIERS})
        if isinstance(event, BlockStored):
            _store(tiers, event)
        elif isinstance(event, BlockRemoved) and event.tier in tiers:
            for name in unpack_hashes(event.engine_hashes):
                tiers[event.tier].pop(name, None)
        elif isinstance(event, BlocksCleared):
            for tier in _TIERS:
                if event.tier in (None, tier):
                    tiers[tier].clear()

    def remove_worker(self, worker: WorkerId) -> None:
        """Forget a worker."""
        self._names.pop(worker, None)

    def match(self, hashes: Sequence[int]) -> dict[WorkerId, list[int]]:
        """Return blocks per tier for each worker that holds any of the prefix."""
        found = {worker: _match(tiers, hashes) for worker, tiers in self._names.items()}
        return {worker: blocks for worker, blocks in found.items() if any(blocks)}


def _store(tiers: dict[Tier, dict[int, int]], event: BlockStored) -> None:
    engine, local = list(unpack_hashes(event.engine_hashes)), list(unpack_hashes(event.local_hashes))
    if event.tier not in tiers or not engine or len(engine) != len(local):
        return
    parent = event.parent_hash
    if parent is not None:
        known = [names[parent] for names in tiers.values() if parent in names]
        if known:
            parent = known[0]
        elif chain_hashes(local[:1], parent)[0] != engine[0]:
            return
    tiers[event.tier].update(zip(engine, chain_hashes(local, parent), strict=True))


def _match(tiers: dict[Tier, dict[int, int]], hashes: Sequence[int]) -> list[int]:
    held = {tier: set(names.values()) for tier, names in tiers.items()}
    blocks = [0, 0, 0, 0]
    depth = 0
    while depth < len(hashes) and hashes[depth] in held[Tier.DEVICE]:
        blocks[0] += 1
        depth += 1
    for key in hashes[depth:]:
        rank = next((rank for rank, tier in enumerate(_LOWER, start=1) if key in held[tier]), None)
        if rank is None:
            break
        blocks[rank] += 1
    return blocks
