"""Which blocks one dp rank has advertised, per tier: exactly what its events, applied in order, say.

It answers a full dump with as few events as the shape of the block tree allows, every parent before its children.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from dynamo_core.enums import Tier
from dynamo_core.events import BlocksCleared, BlockStored, KvEvent
from dynamo_core.kv import BlockDescriptor
from dynamo_core.tokens import pack_hashes

_TIERS = (Tier.DEVICE, Tier.HOST, Tier.DISK, Tier.EXTERNAL)
_BIT = {tier: 1 << number for number, tier in enumerate(_TIERS)}


@dataclass(slots=True)
class _Block:
    local_hash: int
    parent_hash: int | None
    lora: str
    tiers: int


@dataclass(slots=True)
class _Chain:
    """Consecutive blocks without a branch, in the same tiers."""

    hashes: list[int] = field(default_factory=list[int])
    locals: list[int] = field(default_factory=list[int])
    parent: int | None = None
    tiers: int = 0
    lora: str = ""
    start: int = 0


class KvIndex:
    """Present blocks of one dp rank.

    Args:
        max_blocks: Most blocks it holds; further ones are not advertised.

    Attributes:
        refused: Blocks not advertised for lack of room.
        orphans: Blocks not advertised because their parents are not: nobody could match them, and readers would take
            the unknown parent for a lost event.
    """

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._blocks: dict[int, _Block] = {}
        self.refused = 0
        self.orphans = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def store(self, blocks: Sequence[BlockDescriptor], tier: Tier, lora: str) -> list[Sequence[BlockDescriptor]]:
        """Add blocks to a tier and return those that are new there, as runs of consecutive blocks."""
        bit = _BIT.get(tier, 0)
        runs: list[list[BlockDescriptor]] = []
        last: int | None = None
        for block in blocks:
            if not self._add(block, bit, lora):
                continue
            if runs and block.parent_hash == last:
                runs[-1].append(block)
            else:
                runs.append([block])
            last = block.sequence_hash
        return list(runs)

    def remove(self, hashes: Iterable[int], tier: Tier) -> list[int]:
        """Take blocks out of a tier and return those that were there."""
        bit = _BIT.get(tier, 0)
        gone: list[int] = []
        for sequence_hash in hashes:
            block = self._blocks.get(sequence_hash)
            if block is None or not block.tiers & bit:
                continue
            block.tiers &= ~bit
            if not block.tiers:
                del self._blocks[sequence_hash]
            gone.append(sequence_hash)
        return gone

    def clear(self) -> bool:
        """Forget everything; return whether there was anything."""
        had = bool(self._blocks)
        self._blocks.clear()
        return had

    def dump(self, event_id: int) -> tuple[KvEvent, ...]:
        """Return events that rebuild the whole state, all with ``event_id``; at least one, even when it is empty.

        Blocks whose parents are gone are left out: no request can match them.
        """
        events: list[KvEvent] = [BlocksCleared(event_id)]
        for chain in self._chains():
            events.extend(_stored(chain, event_id))
        return tuple(events)

    def _add(self, block: BlockDescriptor, bit: int, lora: str) -> bool:
        known = self._blocks.get(block.sequence_hash)
        if known is not None:
            added = not known.tiers & bit
            known.tiers |= bit
            return added
        if block.parent_hash is not None and block.parent_hash not in self._blocks:
            self.orphans += 1
            return False
        if not bit or len(self._blocks) >= self._max_blocks:
            self.refused += 1
            return False
        self._blocks[block.sequence_hash] = _Block(block.local_hash, block.parent_hash, lora, bit)
        return True

    def _chains(self) -> Iterator[_Chain]:
        children: dict[int | None, list[int]] = {}
        for sequence_hash, block in self._blocks.items():
            children.setdefault(block.parent_hash, []).append(sequence_hash)
        pending = [(root, 0) for root in reversed(children.get(None, []))]
        while pending:
            first, depth = pending.pop()
            chain, branches = self._follow(first, depth, children)
            yield chain
            pending.extend((child, depth + len(chain.hashes)) for child in reversed(branches))

    def _follow(self, first: int, depth: int, children: dict[int | None, list[int]]) -> tuple[_Chain, list[int]]:
        """Walk down from a block while its tiers do not change; return the rest of the branches at the end."""
        head = self._blocks[first]
        chain = _Chain(parent=head.parent_hash, tiers=head.tiers, lora=head.lora, start=depth)
        current = first
        while True:
            chain.hashes.append(current)
            chain.locals.append(self._blocks[current].local_hash)
            below = children.get(current, [])
            if len(below) != 1 or self._blocks[below[0]].tiers != chain.tiers:
                return chain, below
            current = below[0]


def _stored(chain: _Chain, event_id: int) -> list[BlockStored]:
    return [
        BlockStored(
            event_id,
            pack_hashes(chain.hashes),
            pack_hashes(chain.locals),
            chain.parent,
            start_block=chain.start,
            tier=tier,
            lora=chain.lora,
        )
        for tier in _TIERS
        if chain.tiers & _BIT[tier]
    ]
