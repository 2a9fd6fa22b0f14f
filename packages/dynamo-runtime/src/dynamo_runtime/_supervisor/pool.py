"""State of one role: its replicas, what was asked for, and how long starts take."""

from __future__ import annotations

import asyncio
import enum
import statistics
from collections import deque

from dynamo_core.planning import PoolState
from dynamo_runtime._supervisor.spec import ProcessSpec

STARTUP_SAMPLES = 16


class Phase(enum.Enum):
    """Where a replica stands."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Replica:
    """One replica, over all its restarts.

    Attributes:
        name: ``role-ordinal``.
        ordinal: From 1, unique among the role's live replicas.
        phase: Where it stands; waiting for a restart counts as starting.
        leaving: Set when it has to go.
        drain_timeout_s: Time it then gets.
        asked_at_s: Monotonic time at which the present start was asked for.
        ready_at_s: Monotonic time since which it is ready; None before.
        status_url: Its status server, once known.
        pid: Its present process; 0 between two.
    """

    def __init__(self, role: str, ordinal: int, asked_at_s: float) -> None:
        self.name = f"{role}-{ordinal}"
        self.ordinal = ordinal
        self.phase = Phase.STARTING
        self.leaving = asyncio.Event()
        self.drain_timeout_s = 0.0
        self.asked_at_s = asked_at_s
        self.ready_at_s: float | None = None
        self.status_url = ""
        self.pid = 0

    def restart(self, at_s: float) -> None:
        """Begin a start anew."""
        self.phase = Phase.STARTING
        self.asked_at_s = at_s
        self.ready_at_s = None

    def leave(self, drain_timeout_s: float) -> None:
        """Have it drained, with this time for it."""
        self.phase = Phase.DRAINING
        self.drain_timeout_s = drain_timeout_s
        self.leaving.set()


class Pool:
    """Replicas of one role."""

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec = spec
        self.desired = spec.replicas
        self.replicas: list[Replica] = []
        self.settled = False
        self._startups_s: deque[float] = deque(maxlen=STARTUP_SAMPLES)

    def count(self, phase: Phase) -> int:
        """Return how many replicas are in a phase."""
        return sum(replica.phase is phase for replica in self.replicas)

    @property
    def staying(self) -> list[Replica]:
        """Replicas that were not asked to leave."""
        return [replica for replica in self.replicas if replica.phase is not Phase.DRAINING]

    def add(self, at_s: float) -> Replica:
        """Add a replica with the lowest free ordinal."""
        taken = {replica.ordinal for replica in self.replicas}
        ordinal = next(number for number in range(1, len(taken) + 2) if number not in taken)
        replica = Replica(self.spec.role, ordinal, at_s)
        self.replicas.append(replica)
        return replica

    def remove(self, replica: Replica) -> None:
        """Forget a replica that ended."""
        if replica in self.replicas:
            self.replicas.remove(replica)

    def surplus(self) -> list[Replica]:
        """Return the replicas beyond ``desired``: failed ones first, then starting ones, then the newest."""
        order = {Phase.FAILED: 0, Phase.STARTING: 1, Phase.READY: 2}
        candidates = sorted(self.staying, key=lambda replica: (order[replica.phase], -replica.ordinal))
        return candidates[: max(0, len(candidates) - self.desired)]

    def became_ready(self, replica: Replica, at_s: float) -> float:
        """Note that a replica is ready; return how long its start took."""
        replica.phase = Phase.READY
        replica.ready_at_s = at_s
        startup_s = at_s - replica.asked_at_s
        self._startups_s.append(startup_s)
        self.settled = self.settled or self.count(Phase.READY) >= self.desired
        return startup_s

    def state(self) -> PoolState:
        """Return the state as the planner reads it."""
        return PoolState(
            ready=self.count(Phase.READY),
            starting=self.count(Phase.STARTING),
            draining=self.count(Phase.DRAINING),
            desired=self.desired,
            failed=self.count(Phase.FAILED),
            startup_s=statistics.median(self._startups_s) if self._startups_s else None,
        )


class DeviceAllocator:
    """Hands out GPU indexes, lowest free first."""

    def __init__(self) -> None:
        self._taken: set[int] = set()

    def take(self, count: int) -> tuple[int, ...]:
        """Return that many free indexes."""
        free = (index for index in range(len(self._taken) + count) if index not in self._taken)
        devices = tuple(index for index, _ in zip(free, range(count), strict=False))
        self._taken.update(devices)
        return devices

    def release(self, devices: tuple[int, ...]) -> None:
        """Return indexes."""
        self._taken.difference_update(devices)
