"""Writes to a slow tier on a thread of its own, from a bounded staging area.

Whoever offers a block pays for one copy and never waits for the tier. When the staging area is full, blocks are refused
and counted: a cache may lose a block, an engine step may not wait for a disk. Staged blocks can be read back, so a
block is never out of sight between two tiers.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import structlog

from dynamo_core.errors import ConfigurationError, DynamoError
from dynamo_core.kv import BlockDescriptor, BlockStore
from dynamo_kvbm._tiers.slot_file import aligned_bytes

BATCH_BLOCKS = 16

_log = structlog.get_logger(__name__)
_Staged = tuple[BlockDescriptor, int]


class WriteBehind:
    """A bounded queue of blocks before a ``BlockStore``, drained by one thread.

    Args:
        store: Where blocks go.
        capacity_blocks: Most blocks staged; their memory is allocated once.
        block_bytes: Size of every block.
        on_written: Called on the writing thread after each batch with what was offered to the store and what the store
            evicted.
        on_failed: Called on the writing thread with the blocks of a batch that the store could not take.
    """

    def __init__(
        self,
        store: BlockStore,
        capacity_blocks: int,
        block_bytes: int,
        *,
        on_written: Callable[[Sequence[BlockDescriptor], Sequence[int]], None],
        on_failed: Callable[[Sequence[BlockDescriptor]], None],
    ) -> None:
        if capacity_blocks < 1:
            raise ConfigurationError(f"a write queue of {capacity_blocks} blocks takes nothing; give at least 1")
        self._store = store
        # At a page's start, so that a disk can take blocks from here without a copy.
        self._arena = aligned_bytes(capacity_blocks * block_bytes).reshape(capacity_blocks, block_bytes)
        self._free = list(range(capacity_blocks - 1, -1, -1))
        self._waiting: OrderedDict[int, _Staged] = OrderedDict()
        self._writing: dict[int, _Staged] = {}
        self._on_written = on_written
        self._on_failed = on_failed
        self._epoch = 0
        self._batch_epoch = 0
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"kvbm-write-{store.tier.value}", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Blocks staged."""
        return len(self._waiting) + len(self._writing)

    def offer(self, blocks: Sequence[BlockDescriptor], data: Sequence[bytes | memoryview]) -> list[BlockDescriptor]:
        """Copy blocks into the staging area and return those that found no room. Already staged ones are skipped."""
        refused: list[BlockDescriptor] = []
        with self._changed:
            for block, piece in zip(blocks, data, strict=True):
                if block.sequence_hash in self._waiting or block.sequence_hash in self._writing:
                    continue
                if not self._free or self._closing:
                    refused.append(block)
                    continue
                slot = self._free.pop()
                self._arena[slot] = np.frombuffer(piece, dtype=np.uint8)
                self._waiting[block.sequence_hash] = (block, slot)
            self._changed.notify_all()
        return refused

    def contains(self, sequence_hashes: Sequence[int]) -> list[bool]:
        """Whether each block is staged."""
        with self._changed:
            return [item in self._waiting or item in self._writing for item in sequence_hashes]

    def get(self, sequence_hashes: Sequence[int]) -> list[bytes | memoryview | None]:
        """Return a copy of each staged block, None for the others."""
        with self._changed:
            found = [self._waiting.get(item) or self._writing.get(item) for item in sequence_hashes]
            return [None if staged is None else self._arena[staged[1]].tobytes() for staged in found]

    def describe(self, sequence_hashes: Sequence[int]) -> list[BlockDescriptor]:
        """Return the descriptors of those blocks that are staged."""
        with self._changed:
            found = [self._waiting.get(item) or self._writing.get(item) for item in sequence_hashes]
            return [staged[0] for staged in found if staged is not None]

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is staged; return whether that came in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._writing, timeout_s)

    def discard(self) -> None:
        """Drop what is staged without waiting; a batch being written is removed again once it is written."""
        with self._changed:
            self._epoch += 1
            self._free += [slot for _, slot in self._waiting.values()]
            self._waiting.clear()
            self._changed.notify_all()

    def close(self) -> None:
        """Write what is staged, then end the thread. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next_batch():
            blocks = [block for block, _ in batch]
            try:
                evicted = self._store.put(blocks, [self._arena[slot].data for _, slot in batch])
            except (DynamoError, OSError) as error:
                _log.warning("tier refuses blocks", tier=self._store.tier.value, error=str(error))
                self._on_failed(blocks)
            else:
                self._settle(blocks, evicted)
            with self._changed:
                self._free += [slot for _, slot in batch]
                self._writing = {}
                self._changed.notify_all()

    def _next_batch(self) -> list[_Staged]:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            count = min(BATCH_BLOCKS, len(self._waiting))
            batch = [self._waiting.popitem(last=False)[1] for _ in range(count)]
            self._writing = {block.sequence_hash: (block, slot) for block, slot in batch}
            self._batch_epoch = self._epoch
            return batch

    def _settle(self, blocks: Sequence[BlockDescriptor], evicted: Sequence[int]) -> None:
        with self._changed:
            discarded = self._epoch != self._batch_epoch
        if discarded:
            self._store.remove([block.sequence_hash for block in blocks])
        self._on_written(blocks, evicted)
