"""The supervisor: a scaling target whose replicas are processes on this machine."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import structlog

from dynamo_core.clock import Clock
from dynamo_core.component import Spawner
from dynamo_core.errors import ConfigurationError, InvalidRequestError, NotFoundError, UnavailableError
from dynamo_core.planning import PoolState
from dynamo_core.telemetry import Metrics
from dynamo_runtime import _metrics
from dynamo_runtime._lifecycle import finishes_before
from dynamo_runtime._settings import SupervisorSettings
from dynamo_runtime._supervisor.child import ChildProcess, WriteLine, write_line
from dynamo_runtime._supervisor.pool import DeviceAllocator, Phase, Pool, Replica
from dynamo_runtime._supervisor.spec import Backoff, ProcessSpec

EXIT_MISCONFIGURED = 2
LEAST_DRAIN_S = 0.5
"""What a role gets to drain even if those before it used up the time."""

_log = structlog.get_logger(__name__)


class Supervisor:
    """Keeps processes: starts, scales, drains, and replaces those that end on their own.

    Implements ``ScalingTarget``. Pools start together and drain one after the other, last first.

    Args:
        specs: Roles, in the order in which others depend on them: workers before frontends.
        settings: Limits and restarts.
        clock: Time.
        spawn: Starts background tasks; a role that cannot start at all raises in one.
        metrics: Scope for the supervisor's metrics.
        write: Takes the children's output lines.
    """

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        settings: SupervisorSettings,
        *,
        clock: Clock,
        spawn: Spawner,
        metrics: Metrics,
        write: WriteLine = write_line,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._spawn = spawn
        self._write = write
        self._pools = {spec.role: Pool(spec) for spec in specs}
        self._devices = DeviceAllocator()
        self._keepers: dict[Replica, asyncio.Task[None]] = {}
        self._children: dict[Replica, ChildProcess] = {}
        self._last_decision_id = 0
        self._draining = False
        self._gauge = metrics.gauge(_metrics.REPLICAS, "Replicas by role and state.", ("role", "state"))
        self._restarts = metrics.counter(_metrics.RESTARTS, "Processes started again after an end.", ("role",))
        self._kills = metrics.counter(_metrics.KILLS, "Processes killed because they did not drain.", ("role",))
        self._startup = metrics.histogram(_metrics.STARTUP_SECONDS, "Time from ask to ready.", ("role",))

    @property
    def replicas(self) -> dict[str, list[Replica]]:
        """Replicas by role."""
        return {role: list(pool.replicas) for role, pool in self._pools.items()}

    def settled(self, role: str) -> bool:
        """Whether the role has once had all the replicas that were asked for."""
        return self._pools[role].settled or self._pools[role].desired == 0

    def pools(self) -> dict[str, PoolState]:
        """Return the pools by role, without waiting."""
        return {role: pool.state() for role, pool in self._pools.items()}

    async def start(self) -> None:
        """Start all replicas; returns at once, they become ready in their own time."""
        for pool in self._pools.values():
            self._adjust(pool)

    async def state(self) -> Mapping[str, PoolState]:
        """See ``ScalingTarget.state``."""
        return self.pools()

    async def scale(self, replicas: Mapping[str, int], *, decision_id: int = 0) -> None:
        """See ``ScalingTarget.scale``. Either all counts are applied or, on an error, none.

        Raises:
            UnavailableError: if the supervisor itself is draining.
        """
        if self._draining:
            raise UnavailableError("the supervisor is draining and starts nothing", reason="backend.draining")
        for role, count in replicas.items():
            self._check(role, count)
        if decision_id and decision_id <= self._last_decision_id:
            return
        self._last_decision_id = max(self._last_decision_id, decision_id)
        for role, count in replicas.items():
            pool = self._pools[role]
            if count != pool.desired:
                _log.info("scaling", role=role, replicas=count, previous=pool.desired, decision_id=decision_id)
            pool.desired = count
            self._adjust(pool)

    async def drain(self, timeout_s: float) -> None:
        """Drain all roles, last first; those that do not end in time are killed. Cancelling leaves the rest running."""
        self._draining = True
        deadline_s = self._clock.monotonic() + timeout_s
        for pool in reversed(self._pools.values()):
            remaining_s = max(LEAST_DRAIN_S, deadline_s - self._clock.monotonic())
            for replica in list(pool.replicas):
                self._leave(replica, min(pool.spec.drain_timeout_s, remaining_s))
            await self._wait_ended(pool)

    async def stop(self) -> None:
        """Kill what still runs. Idempotent."""
        self._draining = True
        for replica, child in list(self._children.items()):
            replica.leave(0.0)
            child.kill()
        await asyncio.gather(*(child.wait() for child in self._children.values()))
        for keeper in list(self._keepers.values()):
            keeper.cancel()

    async def close(self) -> None:
        """See ``ScalingTarget.close``: replicas stay; ``stop`` ends them."""

    def _check(self, role: str, count: int) -> None:
        if role not in self._pools:
            raise NotFoundError(f"role {role!r} is not one of {', '.join(self._pools)}", reason="scaling.unknown_role")
        limit = self._settings.max_replicas
        if not 0 <= count <= limit:
            raise InvalidRequestError(
                f"replicas of {role} must be from 0 to {limit}, not {count}; raise --max-replicas for more",
                param="replicas",
            )

    def _adjust(self, pool: Pool) -> None:
        for replica in pool.surplus():
            self._leave(replica, pool.spec.drain_timeout_s)
        while len(pool.staying) < pool.desired:
            replica = pool.add(self._clock.monotonic())
            self._keepers[replica] = self._spawn(self._keep(pool, replica), name=replica.name)
        self._publish(pool)

    def _leave(self, replica: Replica, drain_timeout_s: float) -> None:
        if not replica.leaving.is_set():
            replica.leave(drain_timeout_s)

    async def _wait_ended(self, pool: Pool) -> None:
        keepers = [self._keepers[replica] for replica in pool.replicas if replica in self._keepers]
        if keepers:
            await asyncio.wait(keepers)

    async def _keep(self, pool: Pool, replica: Replica) -> None:
        devices = self._devices.take(pool.spec.gpus)
        try:
            await self._run_until_left(pool, replica, Backoff(self._settings), devices)
        finally:
            self._devices.release(devices)
            self._keepers.pop(replica, None)
            pool.remove(replica)
            self._publish(pool)

    async def _run_until_left(self, pool: Pool, replica: Replica, backoff: Backoff, devices: tuple[int, ...]) -> None:
        while not replica.leaving.is_set():
            status, complaint = await self._run_once(pool, replica, devices)
            if replica.leaving.is_set():
                return
            ready_for_s = 0.0 if replica.ready_at_s is None else self._clock.monotonic() - replica.ready_at_s
            delay_s = None if status == EXIT_MISCONFIGURED else backoff.next_delay_s(ready_for_s)
            if delay_s is None:
                self._give_up(pool, replica, status, complaint)
                await replica.leaving.wait()
                return
            _log.warning("process ended", process=replica.name, status=status, error=complaint, restart_in_s=delay_s)
            replica.restart(self._clock.monotonic())
            self._publish(pool)
            await finishes_before(self._clock.sleep(delay_s), replica.leaving.wait())
            self._restarts.labels(role=pool.spec.role).inc()

    def _give_up(self, pool: Pool, replica: Replica, status: int, complaint: str) -> None:
        replica.phase = Phase.FAILED
        self._publish(pool)
        if pool.settled:
            _log.error("process given up", process=replica.name, status=status, error=complaint)
            return
        what = f"{replica.name}: {complaint}" if complaint else f"{replica.name} ended with status {status}"
        if status == EXIT_MISCONFIGURED:
            raise ConfigurationError(what)
        raise UnavailableError(f"{what}, {self._settings.restart_limit + 1} times", reason="supervisor.crash_loop")

    async def _run_once(self, pool: Pool, replica: Replica, devices: tuple[int, ...]) -> tuple[int, str]:
        env = dict(pool.spec.env)
        if devices:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
        try:
            child = await ChildProcess.launch(replica.name, pool.spec.command, env, self._write)
        except OSError as error:
            raise ConfigurationError(f"{replica.name}: cannot run {pool.spec.command[0]}: {error.strerror}") from error
        self._children[replica] = child
        replica.pid = child.pid
        ready = asyncio.create_task(self._await_ready(pool, replica, child))
        try:
            return await self._attend(pool, replica, child), child.error_line
        finally:
            ready.cancel()
            child.kill()
            await child.wait()
            replica.pid = 0
            self._children.pop(replica, None)

    async def _await_ready(self, pool: Pool, replica: Replica, child: ChildProcess) -> None:
        line = await child.ready()
        if line is None or replica.leaving.is_set():
            return
        replica.status_url = line.status_url
        startup_s = pool.became_ready(replica, self._clock.monotonic())
        self._startup.labels(role=pool.spec.role).observe(startup_s)
        self._publish(pool)
        _log.info("process ready", process=replica.name, startup_s=round(startup_s, 3), status_url=line.status_url)

    async def _attend(self, pool: Pool, replica: Replica, child: ChildProcess) -> int:
        ended = asyncio.create_task(child.wait())
        try:
            await finishes_before(_settle(ended), replica.leaving.wait())
            if not ended.done():
                self._publish(pool)
                child.terminate()
                if not await finishes_before(_settle(ended), self._clock.sleep(replica.drain_timeout_s)):
                    self._kills.labels(role=pool.spec.role).inc()
                    _log.warning("process killed", process=replica.name, drain_timeout_s=replica.drain_timeout_s)
                    child.kill()
            return await ended
        finally:
            ended.cancel()

    def _publish(self, pool: Pool) -> None:
        for phase in Phase:
            self._gauge.labels(role=pool.spec.role, state=phase.value).set(pool.count(phase))


async def _settle(task: asyncio.Task[int]) -> None:
    await asyncio.wait({task})
