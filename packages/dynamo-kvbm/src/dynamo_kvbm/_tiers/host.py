"""G2, host memory: one arena of equal slots, content-addressed."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from dynamo_core.clock import Clock, SystemClock
from dynamo_core.enums import Tier
from dynamo_core.errors import ConfigurationError, InternalError
from dynamo_core.kv import BlockDescriptor
from dynamo_kvbm._eviction.base import EvictionOrder
from dynamo_kvbm._eviction.hints import HintBook
from dynamo_kvbm._eviction.lru import LruOrder
from dynamo_kvbm._eviction.quota import QuotaOrder
from dynamo_kvbm._tiers.arena import Pages, allocate_arena
from dynamo_kvbm._tiers.base import Spill, require_pieces


class HostTier:
    """A ``BlockStore`` in this process's memory.

    The arena is allocated once, so memory never grows. Any thread may call any method; one lock guards the books, and
    copies run under it, since a slot must not be reused while it is read.

    Args:
        capacity_blocks: Slots, at least 1.
        block_bytes: Size of every block.
        eviction: Makes the eviction order for a capacity.
        clock: The clock of hints.
        quotas: Most blocks of each tenant that has a quota. Hints say whose a block is.

    Raises:
        ConfigurationError: if either is below 1, a quota does not fit, or the machine has not that much memory.
    """

    def __init__(
        self,
        capacity_blocks: int,
        block_bytes: int,
        *,
        eviction: Callable[[int], EvictionOrder] = LruOrder,
        clock: Clock | None = None,
        quotas: Mapping[str, int] | None = None,
    ) -> None:
        if capacity_blocks < 1 or block_bytes < 1:
            raise ConfigurationError(
                f"a host tier of {capacity_blocks} blocks of {block_bytes} bytes holds nothing; give both at least 1"
            )
        self._block_bytes = block_bytes
        memory, self._pages = allocate_arena(capacity_blocks * block_bytes)
        self._arena = memory.reshape(capacity_blocks, block_bytes)
        self._free = list(range(capacity_blocks - 1, -1, -1))
        self._slots: dict[int, int] = {}
        self._blocks: dict[int, BlockDescriptor] = {}
        self._spill: Spill | None = None
        self._eviction = eviction
        self._clock = clock or SystemClock()
        self._quotas = dict(quotas or {})
        self._start_books()
        self._lock = threading.RLock()

    @property
    def tier(self) -> Tier:
        """``Tier.HOST``."""
        return Tier.HOST

    @property
    def capacity_blocks(self) -> int:
        """Slots in all."""
        return self._arena.shape[0]

    @property
    def arena_bytes(self) -> int:
        """Bytes of all slots."""
        return self._arena.nbytes

    @property
    def pages(self) -> Pages:
        """Which pages the arena lies on."""
        return self._pages

    @property
    def used_blocks(self) -> int:
        """Slots in use."""
        return len(self._slots)

    def used_by(self, tenant: str) -> int:
        """Slots of a tenant; 0 in a tier without quotas, which counts nobody's."""
        with self._lock:
            return 0 if self._shares is None else self._shares.used_by(tenant)

    def contains(self, sequence_hashes: Sequence[int]) -> list[bool]:
        """Whether each block is present."""
        with self._lock:
            return [sequence_hash in self._slots for sequence_hash in sequence_hashes]

    def held(self) -> list[BlockDescriptor]:
        """Return every block held."""
        with self._lock:
            return list(self._blocks.values())

    def describe(self, sequence_hashes: Sequence[int]) -> list[BlockDescriptor]:
        """Return the descriptors of those of these blocks that are present."""
        with self._lock:
            return [self._blocks[item] for item in sequence_hashes if item in self._blocks]

    def spill_to(self, receive: Spill) -> None:
        """Hand victims to ``receive`` as views of the arena. It runs under the tier's lock, so it must not wait."""
        self._spill = receive

    def touch(self, prefix: Sequence[int]) -> None:
        """Mark the blocks of a prefix, root first, as used now; absent ones are ignored."""
        with self._lock:
            self._order.touch([sequence_hash for sequence_hash in prefix if sequence_hash in self._slots])

    def put(self, blocks: Sequence[BlockDescriptor], data: Sequence[bytes | memoryview]) -> list[int]:
        """Store blocks and return what was evicted for them, oldest first.

        A block that finds every slot pinned is not stored; ``contains`` tells.

        Raises:
            InvalidRequestError: if a piece has another size than the tier's blocks.
        """
        require_pieces(blocks, data, self._block_bytes)
        with self._lock:
            self._order.touch([block.sequence_hash for block in blocks if block.sequence_hash in self._slots])
            pairs = zip(blocks, data, strict=True)
            fresh = {
                block.sequence_hash: (block, piece) for block, piece in pairs if block.sequence_hash not in self._slots
            }
            slots, victims = self._take_slots([block for block, _ in fresh.values()])
            if victims and self._spill is not None:
                self._spill([block for block, _ in victims], [self._arena[slot].data for _, slot in victims])
            stored: list[tuple[int, int | None]] = []
            for (block, piece), slot in zip(fresh.values(), slots, strict=False):
                self._arena[slot] = np.frombuffer(piece, dtype=np.uint8)
                self._slots[block.sequence_hash] = slot
                self._blocks[block.sequence_hash] = block
                stored.append((block.sequence_hash, block.parent_hash))
            self._order.insert(stored)
            self._hints.arrived([block for block, _ in fresh.values()][: len(stored)])
        return [block.sequence_hash for block, _ in victims]

    def get(self, sequence_hashes: Sequence[int]) -> list[bytes | memoryview | None]:
        """Return a copy of each block, None for those that are not there."""
        with self._lock:
            slots = [self._slots.get(sequence_hash) for sequence_hash in sequence_hashes]
            return [None if slot is None else self._arena[slot].tobytes() for slot in slots]

    def hints(self, apply: Callable[[HintBook], None]) -> None:
        """Let ``apply`` write into the book of hints, under the tier's lock."""
        with self._lock:
            apply(self._hints)

    @contextmanager
    def borrow(self, sequence_hashes: Sequence[int]) -> Generator[list[memoryview]]:
        """Lend views of the longest present prefix of these blocks, pinned while the context lasts."""
        with self._lock:
            held = _present_prefix(sequence_hashes, self._slots)
            self._order.pin(held)
            views = [self._arena[self._slots[sequence_hash]].data for sequence_hash in held]
        try:
            yield views
        finally:
            with self._lock:
                self._order.unpin(held)

    @contextmanager
    def lend(self, sequence_hashes: Sequence[int]) -> Generator[dict[int, memoryview]]:
        """Lend views of those of these blocks that are present, pinned while the context lasts."""
        with self._lock:
            held = [item for item in dict.fromkeys(sequence_hashes) if item in self._slots]
            self._order.pin(held)
            views = {item: self._arena[self._slots[item]].data for item in held}
        try:
            yield views
        finally:
            with self._lock:
                self._order.unpin(held)

    def remove(self, sequence_hashes: Sequence[int]) -> None:
        """Drop blocks that are not lent; absent ones are ignored."""
        with self._lock:
            self._hints.release(sequence_hashes)
            for sequence_hash in sequence_hashes:
                if self._order.discard(sequence_hash):
                    self._free.append(self._forget(sequence_hash)[1])

    def clear(self) -> list[int]:
        """Drop every block that is not lent and return their hashes."""
        with self._lock:
            before = list(self._slots)
            self.remove(before)
            return [sequence_hash for sequence_hash in before if sequence_hash not in self._slots]

    def check_integrity(self) -> None:
        """Verify that slots and order agree.

        Raises:
            InternalError: with what is wrong.
        """
        with self._lock:
            self._order.check_integrity()
            slots = sorted([*self._slots.values(), *self._free])
            same = len(self._order) == len(self._slots) and self._blocks.keys() == self._slots.keys()
            if slots != list(range(self.capacity_blocks)) or not same:
                raise InternalError(f"{len(self._slots)} used and {len(self._free)} free slots do not add up")

    def close(self) -> None:
        """Forget all blocks; the arena goes when the last view of it does. Idempotent."""
        with self._lock:
            self._slots.clear()
            self._blocks.clear()
            self._start_books()
            self._free = list(range(self.capacity_blocks - 1, -1, -1))

    def _start_books(self) -> None:
        capacity = self.capacity_blocks
        self._shares: QuotaOrder | None = None
        if self._quotas:
            self._shares = QuotaOrder(capacity, self._quotas, self._eviction, self._tenant_of)
        self._order: EvictionOrder = self._eviction(capacity) if self._shares is None else self._shares
        self._hints = HintBook(self._order, capacity, self._clock)

    def _take_slots(self, fresh: Sequence[BlockDescriptor]) -> tuple[list[int], list[tuple[BlockDescriptor, int]]]:
        """Return slots for as many of the blocks as fit, and what was evicted for them with the slots it had.

        Held parents of the new blocks stay: a block without its parent could not be matched.
        """
        parents = [block.parent_hash for block in fresh if block.parent_hash is not None]
        held = [parent for parent in parents if parent in self._slots]
        self._order.pin(held)
        self._hints.settle()
        slots: list[int] = []
        victims: list[tuple[BlockDescriptor, int]] = []
        coming: Counter[str] = Counter()
        for block in fresh:
            tenant = self._over_quota(block.sequence_hash, coming)
            if tenant is None and self._free:
                slots.append(self._free.pop())
            elif (victim := self._next_victim(tenant)) is not None:
                victims.append(self._forget(victim))
                slots.append(victims[-1][1])
            else:
                break
        self._order.unpin(held)
        return slots, victims

    def _tenant_of(self, sequence_hash: int) -> str:
        return self._hints.tenant_of(sequence_hash)

    def _over_quota(self, sequence_hash: int, coming: Counter[str]) -> str | None:
        """Return the tenant of a block to come if it must give up one of its own for it."""
        if self._shares is None:
            return None
        tenant = self._shares.tenant_of(sequence_hash)
        coming[tenant] += 1
        return tenant if self._shares.is_full(tenant, coming[tenant]) else None

    def _next_victim(self, tenant: str | None) -> int | None:
        return self._order.evict() if tenant is None or self._shares is None else self._shares.evict_from(tenant)

    def _forget(self, sequence_hash: int) -> tuple[BlockDescriptor, int]:
        return self._blocks.pop(sequence_hash), self._slots.pop(sequence_hash)


def _present_prefix(sequence_hashes: Sequence[int], slots: dict[int, int]) -> list[int]:
    held: list[int] = []
    for sequence_hash in sequence_hashes:
        if sequence_hash not in slots:
            break
        held.append(sequence_hash)
    return held
