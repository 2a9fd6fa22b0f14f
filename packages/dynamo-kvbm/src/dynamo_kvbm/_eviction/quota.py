"""Quotas of tenants in a tier that is told whose blocks are whose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby

from dynamo_kvbm._eviction.base import EvictionOrder, SupportsHints
from dynamo_kvbm._eviction.tenants import Tenants


class QuotaOrder:
    """An ``EvictionOrder`` made of one for each tenant.

    Without a name for the tenant, ``evict`` takes from the one that uses the largest share of what it may use.

    Args:
        capacity_blocks: Size of the tier.
        quotas: Most blocks of each tenant that has a quota; the others share the tier.
        eviction: Makes an order for a capacity.
        tenant_of: Says whose a block is when it comes; it stays theirs until it goes.

    Raises:
        ConfigurationError: if a quota is none, or exceeds the tier.
    """

    def __init__(
        self,
        capacity_blocks: int,
        quotas: Mapping[str, int],
        eviction: Callable[[int], EvictionOrder],
        tenant_of: Callable[[int], str],
    ) -> None:
        self._tenants = Tenants(capacity_blocks, quotas, eviction)
        self._tenant_of = tenant_of
        self._owners: dict[int, tuple[str, int | None]] = {}  # held blocks: whose, and their parents
        self._children: dict[int, set[int]] = {}

    def __len__(self) -> int:
        return len(self._owners)

    def __contains__(self, sequence_hash: int) -> bool:
        return sequence_hash in self._owners

    def used_by(self, tenant: str) -> int:
        """Blocks of a tenant."""
        return self._tenants.used.get(tenant, 0)

    def tenant_of(self, sequence_hash: int) -> str:
        """Return whose a block will be if it comes now."""
        return self._tenant_of(sequence_hash)

    def is_full(self, tenant: str, coming: int) -> bool:
        """Whether a tenant must give up a block before it may have this many more."""
        return self._tenants.excess(tenant, coming) > 0

    def evict_from(self, tenant: str) -> int | None:
        """Remove and return the next unpinned leaf of a tenant."""
        return self._forget(self._tenants.evict(tenant))

    def insert(self, blocks: Sequence[tuple[int, int | None]]) -> None:
        """Add blocks, each to its tenant's order."""
        for tenant, run in groupby(blocks, key=lambda block: self._tenant_of(block[0])):
            self._insert(tenant, list(run))

    def touch(self, sequence_hashes: Sequence[int]) -> None:
        """Note a use of held blocks."""
        self._tenants.touch(sequence_hashes)

    def pin(self, sequence_hashes: Iterable[int]) -> None:
        """Keep blocks from eviction."""
        self._tenants.pin(list(sequence_hashes))

    def unpin(self, sequence_hashes: Iterable[int]) -> None:
        """Take back one pin of each block."""
        self._tenants.unpin(list(sequence_hashes))

    def prioritise(self, priorities: Iterable[tuple[int, int]]) -> None:
        """Set the priority of held blocks, in orders that weigh them."""
        self._tenants.prioritise(priorities)

    def expect(self, sequence_hashes: Sequence[int], next_use_s: float | None) -> None:
        """Say when held blocks will be used next, to orders that listen."""
        for order, hashes in self._tenants.by_order(sequence_hashes):
            if isinstance(order, SupportsHints):
                order.expect(hashes, next_use_s)

    def discard(self, sequence_hash: int) -> bool:
        """Remove a block unless it is pinned or not held."""
        held = sequence_hash in self._owners
        if not held or not self._tenants.discard(sequence_hash, self._children.get(sequence_hash, ())):
            return False
        self._forget(sequence_hash)
        return True

    def evict(self) -> int | None:
        """Remove and return the next unpinned leaf of the tenant that uses the largest share."""
        return self._forget(self._tenants.evict(None))

    def check_integrity(self) -> None:
        """Verify the books. Raises ``InternalError`` with what is wrong."""
        self._tenants.check_integrity()

    def _insert(self, tenant: str, blocks: Sequence[tuple[int, int | None]]) -> None:
        self._tenants.insert(tenant, blocks)
        self._tenants.charge(tenant, len(blocks))
        for item, parent in blocks:
            self._owners[item] = (tenant, parent)
            if parent is not None:
                self._children.setdefault(parent, set()).add(item)
        for item, _ in blocks:
            for child in self._children.get(item, ()):
                if self._owners[child][0] != tenant:
                    self._tenants.adopt(item, child)

    def _forget(self, sequence_hash: int | None) -> int | None:
        if sequence_hash is None:
            return None
        tenant, parent = self._owners.pop(sequence_hash)
        self._tenants.charge(tenant, -1)
        if parent is not None:
            self._children[parent].discard(sequence_hash)
            if not self._children[parent]:
                del self._children[parent]
        return sequence_hash
