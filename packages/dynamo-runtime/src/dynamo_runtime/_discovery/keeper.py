"""Liveness: own leases are kept alive and restored, other processes' dead leases are ended."""

from __future__ import annotations

import msgspec

from dynamo_core.clock import Clock
from dynamo_runtime._discovery.files import FileStore, LeaseSeen
from dynamo_runtime._discovery.lease import KEEPALIVES_PER_TTL, OwnLease
from dynamo_runtime._discovery.owner import Owner, certainly_gone


class _Sighting(msgspec.Struct):
    heartbeat: tuple[int, int]
    since_s: float


class LeaseObserver:
    """Tells which leases are dead.

    A lease is dead if its process is certainly gone, or if its heartbeat has not changed for its time to live as this
    process measures it. No wall-clock time is compared with another, so a clock that jumps ends nothing.

    Args:
        store: The directory.
        clock: Time.
    """

    def __init__(self, store: FileStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._sightings: dict[int, _Sighting] = {}
        self._looked_at_s = clock.monotonic()
        self._shortest_ttl_s: float | None = None

    @property
    def shortest_ttl_s(self) -> float | None:
        """Shortest time to live among the leases of the last look."""
        return self._shortest_ttl_s

    def dead(self, own: set[int]) -> list[LeaseSeen]:
        """Return the dead leases, those in ``own`` aside."""
        now_s = self._clock.monotonic()
        idle_s, self._looked_at_s = now_s - self._looked_at_s, now_s
        seen = [lease for lease in self._store.leases() if lease.lease_id not in own]
        self._shortest_ttl_s = min((lease.lease.ttl_s for lease in seen if lease.lease is not None), default=None)
        self._sightings = {lease.lease_id: self._sight(lease, now_s, idle_s) for lease in seen}
        return [lease for lease in seen if self._is_dead(lease, now_s)]

    def _sight(self, lease: LeaseSeen, now_s: float, idle_s: float) -> _Sighting:
        known = self._sightings.get(lease.lease_id)
        ttl_s = lease.lease.ttl_s if lease.lease is not None else 0.0
        # If this process itself stood still for long, all may have stood still: silence then proves nothing.
        if known is None or known.heartbeat != lease.heartbeat or idle_s > ttl_s / 2:
            return _Sighting(lease.heartbeat, now_s)
        return known

    def _is_dead(self, lease: LeaseSeen, now_s: float) -> bool:
        if lease.lease is None:
            return True
        silent_s = now_s - self._sightings[lease.lease_id].since_s
        return silent_s >= lease.lease.ttl_s or certainly_gone(lease.lease.owner)


def keep_alive(store: FileStore, leases: list[OwnLease], owner: Owner, now_s: float) -> list[OwnLease]:
    """Send the heartbeats that are due; return the leases that were gone and are there again, without records."""
    restored: list[OwnLease] = []
    for lease in leases:
        if lease.revoked or now_s < lease.due_at_s:
            continue
        if not store.touch_lease(lease.id):
            lease.present = False
            store.create_lease(lease.id, lease.ttl_s, owner)
            restored.append(lease)
        lease.due_at_s = now_s + lease.ttl_s / KEEPALIVES_PER_TTL
    return restored
