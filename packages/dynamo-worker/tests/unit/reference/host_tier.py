"""A block manager with one host tier: bounded, least recently used first, offloads on register or on evict."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from dynamo_core.enums import Tier
from dynamo_core.kv import BlockAccess, BlockDescriptor, MatchResult, TierChange


class HostTier:
    def __init__(self, capacity_blocks: int, *, on_evict_only: bool = False) -> None:
        self.capacity_blocks = capacity_blocks
        self.on_evict_only = on_evict_only
        self.blocks: OrderedDict[int, bytes] = OrderedDict()
        self.damaged: set[int] = set()
        self.onboarded = 0
        self.is_closed = False

    def start(self, access: BlockAccess, on_change: Callable[[TierChange], None]) -> None:
        self.access, self.on_change = access, on_change

    def match(self, sequence_hashes: Sequence[int]) -> MatchResult:
        count = 0
        while count < len(sequence_hashes) and sequence_hashes[count] in self.blocks:
            count += 1
        return MatchResult(count, (Tier.HOST,) * count)

    def onboard(self, sequence_hashes: Sequence[int], block_ids: Sequence[int]) -> int:
        for count, (value, block_id) in enumerate(zip(sequence_hashes, block_ids, strict=True)):
            if value not in self.blocks or value in self.damaged:
                return count
            self.access.write_blocks([block_id], [self.blocks[value]])
            self.onboarded += 1
        return len(sequence_hashes)

    def on_register(self, blocks: Sequence[BlockDescriptor], block_ids: Sequence[int]) -> None:
        if not self.on_evict_only:
            self.put(blocks, block_ids)

    def on_evict(self, blocks: Sequence[BlockDescriptor], block_ids: Sequence[int]) -> None:
        if self.on_evict_only:
            self.put(blocks, block_ids)

    def put(self, blocks: Sequence[BlockDescriptor], block_ids: Sequence[int]) -> None:
        for block, data in zip(blocks, self.access.read_blocks(block_ids), strict=True):
            self.blocks[block.sequence_hash] = data
            self.blocks.move_to_end(block.sequence_hash)
        removed = [self.blocks.popitem(last=False)[0] for _ in range(len(self.blocks) - self.capacity_blocks)]
        self.on_change(TierChange(Tier.HOST, tuple(blocks), tuple(removed)))

    def clear(self) -> None:
        self.blocks.clear()

    def close(self) -> None:
        self.is_closed = True
