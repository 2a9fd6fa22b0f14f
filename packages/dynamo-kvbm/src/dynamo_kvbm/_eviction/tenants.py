"""Shares of a pool or tier: every tenant has an eviction order of its own, so a scan pushes out its own blocks only.

A block of one tenant may continue a block of another, for example a shared system prompt. Such a child pins its parent
in the other order, which keeps that order leaf-first too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from dynamo_core.errors import ConfigurationError, InternalError
from dynamo_kvbm._eviction.base import EvictionOrder, SupportsPriority


class Tenants:
    """Eviction orders and used blocks by tenant.

    Args:
        capacity_blocks: Size of the pool.
        quotas: Most blocks of each tenant that has a quota; the others share the pool.
        eviction: Makes an order for a capacity.

    Raises:
        ConfigurationError: if a quota is none, or exceeds the pool.
    """

    def __init__(
        self, capacity_blocks: int, quotas: Mapping[str, int], eviction: Callable[[int], EvictionOrder]
    ) -> None:
        for tenant, quota in quotas.items():
            if not 0 < quota <= capacity_blocks:
                raise ConfigurationError(f"quota {quota} of tenant {tenant!r} must be 1 to {capacity_blocks} blocks")
        self._capacity = capacity_blocks
        self._quotas = dict(quotas)
        self._eviction = eviction
        self._orders: dict[str, EvictionOrder] = {}
        # Child to the order and hash of a parent that another tenant registered.
        self._foreign: dict[int, tuple[EvictionOrder, int]] = {}
        self.used: dict[str, int] = {}

    @property
    def shared(self) -> bool:
        """Whether more than one tenant has blocks."""
        return len(self._orders) > 1

    def excess(self, tenant: str, count: int) -> int:
        """Return how many blocks a tenant must give up before it may take ``count`` more."""
        quota = self._quotas.get(tenant)
        return 0 if quota is None else max(0, self.used.get(tenant, 0) + count - quota)

    def charge(self, tenant: str, count: int) -> None:
        """Count blocks to a tenant, or back from it if negative; a tenant without blocks is forgotten."""
        left = self.used.get(tenant, 0) + count
        self.used[tenant] = left
        if not left and tenant and tenant not in self._quotas:
            del self.used[tenant]
            self._orders.pop(tenant, None)

    def insert(self, tenant: str, blocks: Sequence[tuple[int, int | None]]) -> EvictionOrder:
        """Add blocks, each with its parent, in sequence order; return the order that holds them."""
        order = self._orders.get(tenant)
        if order is None:
            order = self._orders[tenant] = self._eviction(self._quotas.get(tenant, self._capacity))
        order.insert(blocks)
        if len(self._orders) > 1:
            self._pin_foreign_parents(order, blocks)
        return order

    def adopt(self, parent: int, child: int) -> None:
        """Pin a parent for a child of another tenant that was there before it."""
        order = self._order_of(parent)
        order.pin([parent])
        self._foreign[child] = (order, parent)

    def discard(self, sequence_hash: int, children: Iterable[int]) -> bool:
        """Remove a block unless something else than these children of it pins it; return whether it was removed."""
        order = self._order_of(sequence_hash)
        pinning = [child for child in children if child in self._foreign]
        order.unpin([sequence_hash] * len(pinning))
        if not order.discard(sequence_hash):
            order.pin([sequence_hash] * len(pinning))
            return False
        for child in pinning:
            del self._foreign[child]
        self._unpin_foreign_parent(sequence_hash)
        return True

    def prioritise(self, priorities: Iterable[tuple[int, int]]) -> None:
        """Set priorities in orders that weigh blocks."""
        for item, priority in priorities:
            order = self._order_of(item)
            if isinstance(order, SupportsPriority):
                order.prioritise([(item, priority)])

    def by_order(self, sequence_hashes: Sequence[int]) -> Iterable[tuple[EvictionOrder, Sequence[int]]]:
        """Return held blocks by the order that holds them, in the sequence they came in."""
        if len(self._orders) == 1:
            return [(next(iter(self._orders.values())), sequence_hashes)]
        grouped: dict[int, tuple[EvictionOrder, list[int]]] = {}
        for item in sequence_hashes:
            order = self._order_of(item)
            grouped.setdefault(id(order), (order, []))[1].append(item)
        return grouped.values()

    def touch(self, sequence_hashes: Sequence[int]) -> None:
        """Note a use of blocks in sequence order."""
        for order, hashes in self.by_order(sequence_hashes):
            order.touch(hashes)

    def pin(self, sequence_hashes: Sequence[int]) -> None:
        """Keep blocks, and what they continue, from eviction."""
        for order, hashes in self.by_order(sequence_hashes):
            order.pin(hashes)

    def unpin(self, sequence_hashes: Sequence[int]) -> None:
        """Take back one pin of each block."""
        for order, hashes in self.by_order(sequence_hashes):
            order.unpin(hashes)

    def evict(self, tenant: str | None) -> int | None:
        """Remove the next block of a tenant, or of the one that uses the largest share of its quota."""
        if tenant is not None:
            order = self._orders.get(tenant)
            return None if order is None else self._evict_from(order)
        if len(self._orders) == 1:
            return self._evict_from(next(iter(self._orders.values())))
        for name in sorted(self._orders, key=self._share, reverse=True):
            victim = self._evict_from(self._orders[name])
            if victim is not None:
                return victim
        return None

    def __len__(self) -> int:
        return sum(map(len, self._orders.values()))

    def __contains__(self, sequence_hash: int) -> bool:
        return any(sequence_hash in order for order in self._orders.values())

    def check_integrity(self) -> None:
        """Verify every order. Raises ``InternalError`` with what is wrong."""
        for order in self._orders.values():
            order.check_integrity()
        for tenant, quota in self._quotas.items():
            if self.used.get(tenant, 0) > quota:
                raise InternalError(f"tenant {tenant!r} uses {self.used[tenant]} of {quota} blocks")

    def _share(self, tenant: str) -> float:
        return self.used.get(tenant, 0) / self._quotas.get(tenant, self._capacity)

    def _order_of(self, sequence_hash: int) -> EvictionOrder:
        for order in self._orders.values():
            if sequence_hash in order:
                return order
        raise InternalError(f"block {sequence_hash:#x} is in no tenant's order")

    def _pin_foreign_parents(self, order: EvictionOrder, blocks: Sequence[tuple[int, int | None]]) -> None:
        for item, parent in blocks:
            if parent is None or parent in order:
                continue
            other = next((one for one in self._orders.values() if parent in one), None)
            if other is not None:
                other.pin([parent])
                self._foreign[item] = (other, parent)

    def _evict_from(self, order: EvictionOrder) -> int | None:
        victim = order.evict()
        if victim is not None:
            self._unpin_foreign_parent(victim)
        return victim

    def _unpin_foreign_parent(self, sequence_hash: int) -> None:
        if (foreign := self._foreign.pop(sequence_hash, None)) is not None:
            foreign[0].unpin([foreign[1]])
