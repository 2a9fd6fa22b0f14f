"""GPU limits: what a fleet may be in the long run, and what may be asked for at this instant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dynamo_core.errors import ConfigurationError
from dynamo_core.planning import PoolState


@dataclass(frozen=True)
class RoleLimits:
    """Bounds of one role.

    Attributes:
        role: Its name.
        gpus: GPUs of one replica.
        min_replicas: Floor, enforced even without data.
        max_replicas: Ceiling.
    """

    role: str
    gpus: int = 1
    min_replicas: int = 1
    max_replicas: int = 8

    def clamp(self, replicas: int) -> int:
        """Return the nearest allowed count."""
        return max(self.min_replicas, min(self.max_replicas, replicas))


@dataclass(frozen=True)
class Budget:
    """Bounds of the whole fleet.

    The ceiling is hard at every instant. The floor is met to within one engine of the larger kind.

    Attributes:
        roles: Bounds of each role, in the order in which they are served when GPUs are short.
        max_gpus: Ceiling of the sum.
        min_gpus: Floor of the sum; 0 for none.
    """

    roles: tuple[RoleLimits, ...]
    max_gpus: int
    min_gpus: int = 0

    def __post_init__(self) -> None:
        for limit in self.roles:
            if limit.gpus < 1 or not 0 <= limit.min_replicas <= limit.max_replicas:
                raise ConfigurationError(
                    f"role {limit.role!r}: {limit.gpus} GPUs and {limit.min_replicas}..{limit.max_replicas} replicas; "
                    "need at least 1 GPU and a minimum of at least 0 that is not above the maximum"
                )
        floor = sum(limit.gpus * limit.min_replicas for limit in self.roles)
        if floor > self.max_gpus:
            raise ConfigurationError(
                f"the minimum replicas take {floor} GPUs, more than max_gpu_budget {self.max_gpus}; lower the minima"
            )
        if self.min_gpus > self.max_gpus:
            raise ConfigurationError(
                f"min_gpu_budget {self.min_gpus} exceeds max_gpu_budget {self.max_gpus}; lower the former"
            )

    def gpus(self, replicas: Mapping[str, int]) -> int:
        """Return the GPUs that these replicas take."""
        return sum(limit.gpus * replicas.get(limit.role, 0) for limit in self.roles)

    def clamp(self, wanted: Mapping[str, int]) -> dict[str, int]:
        """Return the allowed fleet nearest to the wanted one, shrunk in proportion if it is too large."""
        fleet = {limit.role: limit.clamp(wanted[limit.role]) for limit in self.roles if limit.role in wanted}
        if self.gpus(fleet) > self.max_gpus:
            fleet = self._shrunk(fleet)
        return self._grown(fleet)

    def grant(self, wanted: Mapping[str, int], pools: Mapping[str, PoolState]) -> dict[str, int]:
        """Return what may be asked for now: growth waits for the GPUs that shrinking and draining replicas still hold.

        A fleet that is over the ceiling already, by someone else's hand, is never grown further.
        """
        granted = dict(wanted)
        held = {role: _held(pool) for role, pool in pools.items()}
        free = self.max_gpus - self.gpus({role: held[role] + pool.draining for role, pool in pools.items()})
        for limit in self.roles:
            growth = wanted.get(limit.role, 0) - held.get(limit.role, 0)
            if growth > 0:
                given = max(0, min(growth, free // limit.gpus))
                free -= given * limit.gpus
                # What is held may exceed what is desired; then asking for the held count asks for nothing new.
                granted[limit.role] = held[limit.role] + given
        return granted

    def _shrunk(self, fleet: dict[str, int]) -> dict[str, int]:
        scale = self.max_gpus / self.gpus(fleet)
        limits = [limit for limit in self.roles if limit.role in fleet]
        left = self.max_gpus
        shrunk: dict[str, int] = {}
        for place, limit in enumerate(limits):
            reserved = sum(later.gpus * later.min_replicas for later in limits[place + 1 :])
            affordable = (left - reserved) // limit.gpus
            last = place == len(limits) - 1
            share = fleet[limit.role] if last else int(fleet[limit.role] * scale)
            shrunk[limit.role] = max(limit.min_replicas, min(share, affordable))
            left -= shrunk[limit.role] * limit.gpus
        return shrunk

    def _grown(self, fleet: dict[str, int]) -> dict[str, int]:
        """Add engines where the fleet is thinnest until the floor of the sum is met."""
        grown = dict(fleet)
        while grown and self.gpus(grown) < self.min_gpus:
            fitting = [
                limit
                for limit in self.roles
                if limit.role in grown
                and grown[limit.role] < limit.max_replicas
                and self.gpus(grown) + limit.gpus <= self.max_gpus
            ]
            if not fitting:
                break
            thinnest = min(fitting, key=lambda limit: grown[limit.role] / max(fleet[limit.role], 1))
            grown[thinnest.role] += 1
        return grown


def _held(pool: PoolState) -> int:
    """Return the replicas that hold GPUs, or will without anything more being asked."""
    return max(pool.desired, pool.ready + pool.starting)
