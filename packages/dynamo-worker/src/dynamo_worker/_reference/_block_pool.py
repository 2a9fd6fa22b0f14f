"""Paged KV blocks with prefix caching: who holds which block, which are reusable, which goes first.

A block is in one of three places: free (no content), referenced (a sequence holds it), or cached (content nobody
holds now). Cached blocks are evicted least recently used first, and a block never before the blocks that continue it:
whoever holds a block holds its parents too and frees children before parents, so age order is leaf order. ``register``
keeps that true by giving a sequence the block that is already known under a hash in place of its own copy.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dynamo_core.kv import BlockDescriptor


@dataclass(slots=True, eq=False)
class KVCacheBlock:
    """One block of the KV cache.

    Attributes:
        block_id: Its place in the cache.
        ref_count: How many sequences hold it.
        descriptor: What it holds, once it is full and registered.
    """

    block_id: int
    ref_count: int = 0
    descriptor: BlockDescriptor | None = None


class BlockListener(Protocol):
    """Hears what becomes of content. Called on the step thread."""

    def on_register(self, blocks: Sequence[BlockDescriptor], block_ids: Sequence[int]) -> None:
        """Consecutive blocks of one sequence became reusable."""
        ...

    def on_evict(self, blocks: Sequence[BlockDescriptor], block_ids: Sequence[int]) -> None:
        """These blocks are about to be overwritten."""
        ...


class BlockPool:
    """All device blocks.

    Args:
        num_blocks: How many.
        listener: Hears of registered and evicted blocks.
    """

    def __init__(self, num_blocks: int, listener: BlockListener) -> None:
        self.num_blocks = num_blocks
        self._listener = listener
        self._blocks = [KVCacheBlock(block_id) for block_id in range(num_blocks)]
        self._free = self._blocks[::-1]
        self._cached: OrderedDict[int, KVCacheBlock] = OrderedDict()
        self._by_hash: dict[int, KVCacheBlock] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be allocated: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_used_blocks(self) -> int:
        """Blocks that sequences hold."""
        return self.num_blocks - self.num_free_blocks

    @property
    def num_cached_blocks(self) -> int:
        """Reusable blocks, held or not."""
        return len(self._by_hash)

    def get_computed_blocks(self, hashes: Sequence[int]) -> list[KVCacheBlock]:
        """Return the longest known prefix. Changes nothing; ``touch`` it before anything else is allocated."""
        found: list[KVCacheBlock] = []
        for value in hashes:
            block = self._by_hash.get(value)
            if block is None:
                break
            found.append(block)
        return found

    def get_lineage(self, sequence_hash: int | None) -> list[KVCacheBlock] | None:
        """Return a known block with all its parents, first block first; None if it is unknown."""
        found: list[KVCacheBlock] = []
        while sequence_hash is not None:
            block = self._by_hash.get(sequence_hash)
            if block is None:
                return None
            found.append(block)
            sequence_hash = _content(block).parent_hash
        return found[::-1]

    def touch(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Hold blocks, in sequence order."""
        for block in blocks:
            if block.ref_count == 0 and block.descriptor is not None:
                del self._cached[block.descriptor.sequence_hash]
            block.ref_count += 1

    def allocate(self, count: int) -> list[KVCacheBlock] | None:
        """Hold that many empty blocks, evicting cached ones if needed; None, and nothing done, if too few exist."""
        if count > self.num_free_blocks:
            return None
        self._evict(count - len(self._free))
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            block.ref_count = 1
        return taken

    def register(self, blocks: Sequence[KVCacheBlock], descriptors: Sequence[BlockDescriptor]) -> list[KVCacheBlock]:
        """Make consecutive full blocks reusable; return the blocks the sequence holds from then on.

        Where a hash is already known, that block takes the place of the given one, which is freed.
        """
        held: list[KVCacheBlock] = []
        new: list[KVCacheBlock] = []
        for block, descriptor in zip(blocks, descriptors, strict=True):
            known = self._by_hash.setdefault(descriptor.sequence_hash, block)
            if known is block:
                block.descriptor = descriptor
                new.append(block)
            else:
                self.touch([known])
                self.free([block])
            held.append(known)
        if new:
            self._listener.on_register([_content(block) for block in new], [block.block_id for block in new])
        return held

    def free(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Let go of blocks given in sequence order; children become evictable before their parents."""
        for block in reversed(blocks):
            block.ref_count -= 1
            if block.ref_count:
                continue
            if block.descriptor is None:
                self._free.append(block)
            else:
                self._cached[block.descriptor.sequence_hash] = block

    def clear(self) -> list[BlockDescriptor]:
        """Drop every cached block that nobody holds, without telling the listener; return them."""
        dropped = [_content(block) for block in self._cached.values()]
        self._drop(len(dropped))
        return dropped

    def check_integrity(self) -> None:
        """Verify the invariants named at the top of this module.

        Raises:
            AssertionError: if one is broken.
        """
        held = [block for block in self._blocks if block.ref_count]
        assert len(held) + len(self._free) + len(self._cached) == self.num_blocks
        assert all(block.descriptor is None and block.ref_count == 0 for block in self._free)
        age = {value: index for index, value in enumerate(self._cached)}
        for value, block in self._by_hash.items():
            content = _content(block)
            assert content.sequence_hash == value
            assert (value in age) == (block.ref_count == 0)
            if content.parent_hash is None:
                continue
            assert content.parent_hash in self._by_hash, "a block was evicted before the block that continues it"
            if content.parent_hash in age:
                assert value in age
                assert age[value] < age[content.parent_hash], "a parent would be evicted before its child"

    def _evict(self, count: int) -> None:
        if count <= 0:
            return
        oldest = [block for block, _ in zip(self._cached.values(), range(count), strict=False)]
        self._listener.on_evict([_content(block) for block in oldest], [block.block_id for block in oldest])
        self._drop(count)

    def _drop(self, count: int) -> None:
        for _ in range(count):
            value, block = self._cached.popitem(last=False)
            del self._by_hash[value]
            block.descriptor = None
            self._free.append(block)


def _content(block: KVCacheBlock) -> BlockDescriptor:
    assert block.descriptor is not None
    return block.descriptor
