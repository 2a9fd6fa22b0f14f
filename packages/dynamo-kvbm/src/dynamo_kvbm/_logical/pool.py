"""The blocks of one tier: allocate, fill, publish, find, hold, and reuse.

Held blocks are pinned by their tails: an eviction order takes leaves only, so a pin on the last block of a chain keeps
the whole chain, and holding a prefix of any length costs one pin.
"""

from __future__ import annotations

import heapq
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from dynamo_core.clock import Clock, SystemClock
from dynamo_core.enums import Tier
from dynamo_core.errors import ConfigurationError, InternalError
from dynamo_core.kv import BlockDescriptor
from dynamo_kvbm._eviction.base import EvictionOrder, SupportsPriority
from dynamo_kvbm._eviction.lru import LruOrder
from dynamo_kvbm._eviction.tenants import Tenants
from dynamo_kvbm._logical.handles import BlocksHandle, ImmutableBlocks, MutableBlocks
from dynamo_kvbm._logical.registry import BlockRegistry

EvictListener = Callable[[Sequence[BlockDescriptor], Sequence[int]], None]


@dataclass(frozen=True)
class Watermarks:
    """When a pool makes room ahead of need.

    Attributes:
        high: Share of used blocks beyond which registering makes room.
        low: Share of used blocks that it goes down to.
    """

    high: float = 1.0
    low: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high <= 1:
            raise ConfigurationError(f"watermarks low {self.low}, high {self.high} must be 0 < low <= high <= 1")


@dataclass(frozen=True)
class PoolStats:
    """Counts since the pool was made, and blocks by state now.

    Attributes:
        capacity: All blocks.
        reset: Blocks that hold nothing.
        private: Blocks being filled, or full and not published.
        registered: Published blocks.
        allocations: Blocks handed out.
        registrations: Blocks published.
        dedups: Blocks freed at registering, since their hash was known.
        evictions: Published blocks taken back.
    """

    capacity: int
    reset: int
    private: int
    registered: int
    allocations: int
    registrations: int
    dedups: int
    evictions: int


class BlockPool:
    """Blocks of one tier by state, without their bytes.

    Any thread may call any method; one lock guards the pool.

    Args:
        capacity_blocks: How many blocks there are.
        tier: Which tier, for the registry.
        eviction: Makes the order in which published blocks that nobody holds are taken back.
        registry: Presence marks that the pools of several tiers share.
        quotas: Most blocks of a tenant, for tenants that have a quota.
        watermarks: When to make room ahead of need.
        on_evict: Hears of blocks, and their places, before the places are reused. It runs under the pool's lock.
        clock: Ends leases.

    Raises:
        ConfigurationError: if there are no blocks, or a quota exceeds them.
    """

    def __init__(  # noqa: PLR0913 - built in one place, every argument by name
        self,
        capacity_blocks: int,
        *,
        tier: Tier = Tier.DEVICE,
        eviction: Callable[[int], EvictionOrder] = LruOrder,
        registry: BlockRegistry | None = None,
        quotas: Mapping[str, int] | None = None,
        watermarks: Watermarks | None = None,
        on_evict: EvictListener | None = None,
        clock: Clock | None = None,
    ) -> None:
        if capacity_blocks < 1:
            raise ConfigurationError(f"a pool of {capacity_blocks} blocks holds nothing; give at least 1")
        self.tier = tier
        self._capacity = capacity_blocks
        self._free = list(range(capacity_blocks - 1, -1, -1))
        self._by_hash: dict[int, int] = {}
        self._blocks: list[BlockDescriptor | None] = [None] * capacity_blocks
        self._tenant: list[str] = [""] * capacity_blocks
        self._tenants = Tenants(capacity_blocks, quotas or {}, eviction)
        self._registry = registry
        self._watermarks = watermarks or Watermarks()
        self._on_evict = on_evict
        self._clock = clock or SystemClock()
        self._leases: list[tuple[float, int, ImmutableBlocks]] = []
        self._abandoned: deque[BlocksHandle] = deque()
        self._lock = threading.RLock()
        self._allocations = self._registrations = self._dedups = self._evictions = 0

    @property
    def available_blocks(self) -> int:
        """Blocks that hold nothing, and published ones; held ones among these cannot be allocated."""
        with self._lock:
            return len(self._free) + len(self._by_hash)

    def allocate(self, count: int, *, tenant: str = "") -> MutableBlocks | None:
        """Return that many empty blocks, taking back published ones that nobody holds; None if too few can be had.

        What was taken back before that was known stays taken back. A tenant with a quota gives up its own blocks
        first, and never gets more than its quota.
        """
        with self._lock:
            self._settle()
            free = self._free
            if not self._make_room(count, tenant):
                return None
            block_ids = free[len(free) - count :]
            del free[len(free) - count :]
            self._tenants.charge(tenant, count)
            self._allocations += count
            return MutableBlocks(self, block_ids, tenant)

    def match(self, sequence_hashes: Sequence[int]) -> ImmutableBlocks:
        """Hold the longest prefix that is published; the handle may be empty.

        Args:
            sequence_hashes: Consecutive blocks of one sequence, first block first.
        """
        with self._lock:
            self._settle()
            block_ids = list(map(self._by_hash.get, sequence_hashes))
            return self._held(sequence_hashes, block_ids)

    def scan(self, sequence_hashes: Iterable[int]) -> ImmutableBlocks:
        """Hold those of these blocks that are published, whichever they are."""
        with self._lock:
            self._settle()
            found = [item for item in dict.fromkeys(sequence_hashes) if item in self._by_hash]
            self._tenants.pin(found)
            return ImmutableBlocks(self, [self._by_hash[item] for item in found], found, found)

    def contains(self, sequence_hashes: Sequence[int]) -> list[bool]:
        """Whether each block is published."""
        with self._lock:
            return [item in self._by_hash for item in sequence_hashes]

    def lease(self, sequence_hashes: Sequence[int], duration_s: float) -> int:
        """Keep the longest published prefix for a while without holding a handle; return its length."""
        held = self.match(sequence_hashes)
        if not held.block_ids:
            return 0
        with self._lock:
            heapq.heappush(self._leases, (self._clock.monotonic() + duration_s, id(held), held))
        return len(held)

    def trim(self) -> int:
        """Take back published blocks down to the low watermark; return how many were."""
        with self._lock:
            self._settle()
            used = self._capacity - len(self._free)
            return self._evict(used - int(self._capacity * self._watermarks.low), None)

    def reset_unheld(self) -> int:
        """Take back every published block that nobody holds; return how many were."""
        with self._lock:
            self._settle()
            return self._evict(self._capacity, None)

    def used_by(self, tenant: str) -> int:
        """Blocks counted to a tenant."""
        with self._lock:
            return self._tenants.used.get(tenant, 0)

    def stats(self) -> PoolStats:
        """Return counts."""
        with self._lock:
            self._settle()
            registered, reset = len(self._by_hash), len(self._free)
            return PoolStats(
                self._capacity,
                reset,
                self._capacity - reset - registered,
                registered,
                self._allocations,
                self._registrations,
                self._dedups,
                self._evictions,
            )

    def check_integrity(self) -> None:
        """Verify that every block is in one state and all books agree.

        Raises:
            InternalError: with what is wrong.
        """
        with self._lock:
            self._settle()
            self._tenants.check_integrity()
            published = set(self._by_hash.values())
            if len(published) != len(self._by_hash) or published & set(self._free):
                raise InternalError("a block is published twice, or published and empty")
            if len(set(self._free)) != len(self._free):
                raise InternalError("a block is empty twice")
            for item, block_id in self._by_hash.items():
                block = self._blocks[block_id]
                if block is None or block.sequence_hash != item or item not in self._tenants:
                    raise InternalError(f"block {block_id} is published as {item:#x} and holds {block}")
            if len(self._tenants) != len(self._by_hash):
                raise InternalError("the eviction orders hold other blocks than are published")
            if sum(self._tenants.used.values()) != self._capacity - len(self._free):
                raise InternalError("tenants are charged for other blocks than are used")

    def register(self, block_ids: list[int], blocks: Sequence[BlockDescriptor], tenant: str) -> ImmutableBlocks:
        """Publish complete blocks; for ``CompleteBlocks``."""
        with self._lock:
            publish = self._by_hash.setdefault
            hashes = [block.sequence_hash for block in blocks]
            places = list(map(publish, hashes, block_ids))
            fresh = blocks
            if places != block_ids:
                fresh = self._dedup(block_ids, places, blocks, tenant)
            for block, place in zip(blocks, places, strict=True):
                self._blocks[place] = block
            if tenant:
                for block in fresh:
                    self._tenant[self._by_hash[block.sequence_hash]] = tenant
            order = self._tenants.insert(tenant, [(block.sequence_hash, block.parent_hash) for block in fresh])
            if isinstance(order, SupportsPriority):
                order.prioritise((block.sequence_hash, block.priority) for block in fresh)
            self._registrations += len(fresh)
            tails = hashes if self._tenants.shared else _tails(blocks)
            self._tenants.pin(tails)
            if self._registry is not None:
                self._registry.mark([block.sequence_hash for block in fresh], self.tier)
            self._relieve()
            return ImmutableBlocks(self, places, hashes, tails)

    def reset(self, block_ids: list[int], tenant: str) -> None:
        """Take back private blocks; for handles."""
        with self._lock:
            self._free.extend(block_ids)
            self._tenants.charge(tenant, -len(block_ids))

    def hold(self, sequence_hashes: Sequence[int]) -> ImmutableBlocks | None:
        """Hold published blocks once more; for handles."""
        with self._lock:
            if not all(item in self._by_hash for item in sequence_hashes):
                return None
            return self.scan(sequence_hashes)

    def let_go(self, sequence_hashes: Sequence[int], tails: Sequence[int]) -> None:
        """End one holder's claim; for handles. The blocks count as used now."""
        with self._lock:
            self._tenants.unpin(tails)
            self._tenants.touch(sequence_hashes)

    def abandon(self, handle: BlocksHandle) -> None:
        """Take note of a dropped handle, without the lock: the collector may call at any moment."""
        self._abandoned.append(handle)

    def _held(self, hashes: Sequence[int], places: list[int | None]) -> ImmutableBlocks:
        found = places.index(None) if None in places else len(places)
        hashes = hashes[:found]
        block_ids = cast("list[int]", places[:found])
        # A child that another tenant registered before its parent does not keep the parent.
        tails = hashes if self._tenants.shared else hashes[-1:]
        self._tenants.pin(tails)
        return ImmutableBlocks(self, block_ids, hashes, tails)

    def _settle(self) -> None:
        """Take up what was dropped and what has expired."""
        while self._abandoned:
            self._abandoned.popleft().take_back()
        while self._leases and self._leases[0][0] <= self._clock.monotonic():
            heapq.heappop(self._leases)[2].release()

    def _make_room(self, count: int, tenant: str) -> bool:
        excess = self._tenants.excess(tenant, count)
        if excess and self._evict(excess, tenant) < excess:
            return False
        missing = count - len(self._free)
        return missing <= 0 or self._evict(missing, None) == missing

    def _relieve(self) -> None:
        used = self._capacity - len(self._free)
        if used > self._capacity * self._watermarks.high:
            self._evict(used - int(self._capacity * self._watermarks.low), None)

    def _evict(self, count: int, tenant: str | None) -> int:
        blocks: list[BlockDescriptor] = []
        places: list[int] = []
        while len(places) < count and (victim := self._tenants.evict(tenant)) is not None:
            place = self._by_hash.pop(victim)
            block = self._blocks[place]
            assert block is not None
            self._blocks[place] = None
            blocks.append(block)
            places.append(place)
        if places:
            self._uncharge(places)
            self._evictions += len(places)
            if self._registry is not None:
                self._registry.unmark([block.sequence_hash for block in blocks], self.tier)
            if self._on_evict is not None:
                self._on_evict(blocks, places)
            self._free.extend(places)
        return len(places)

    def _uncharge(self, places: Sequence[int]) -> None:
        for tenant, count in Counter(self._tenant[place] for place in places).items():
            self._tenants.charge(tenant, -count)
        for place in places:
            self._tenant[place] = ""

    def _dedup(
        self, block_ids: list[int], places: list[int], blocks: Sequence[BlockDescriptor], tenant: str
    ) -> list[BlockDescriptor]:
        """Free the blocks whose hash is known; return the others' descriptors."""
        pairs = list(zip(block_ids, places, blocks, strict=True))
        known = [block_id for block_id, place, _ in pairs if block_id != place]
        self._free.extend(known)
        self._tenants.charge(tenant, -len(known))
        self._dedups += len(known)
        return [block for block_id, place, block in pairs if block_id == place]


def _tails(blocks: Sequence[BlockDescriptor]) -> list[int]:
    """Return the blocks that the next one does not continue."""
    followed = {block.parent_hash for block in blocks}
    return [block.sequence_hash for block in blocks if block.sequence_hash not in followed]
