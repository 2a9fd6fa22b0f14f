"""The workers of a selection service, in pools with a router each: by model, routing group and role."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import msgspec

from dynamo_core.clock import Clock
from dynamo_core.enums import WorkerType
from dynamo_core.errors import ConfigurationError, InvalidRequestError, NotFoundError
from dynamo_core.telemetry import Metrics
from dynamo_router._listeners import EngineListeners
from dynamo_router._peers import PeerState
from dynamo_router._replicated import ReplicatedRouter
from dynamo_router._router import KvRouter
from dynamo_router._service_bodies import WorkerBody
from dynamo_router._settings import RouterSettings

# What a pool cannot change for a worker that stays in it.
_FIXED = ("model_name", "routing_group", "worker_type", "block_size", "data_parallel_start_rank", "data_parallel_size")


class PoolKey(NamedTuple):
    """Which pool: prefill workers have one of their own, all others of a model and group share one."""

    model: str
    group: str
    prefill: bool = False

    @property
    def dump_name(self) -> str:
        """Name in ``GET /dump``."""
        return f"{self.model}:{self.group}" + (":prefill" if self.prefill else "")

    def __str__(self) -> str:
        return f"{self.model}/{self.group}" + ("/prefill" if self.prefill else "")


class Pools:
    """Workers and the routers that choose among them.

    Args:
        settings: Settings of every router.
        clock: Time.
        metrics: Where they count.
        max_routers: Most pools.
    """

    def __init__(self, settings: RouterSettings, *, clock: Clock, metrics: Metrics, max_routers: int) -> None:
        self.routers: dict[PoolKey, ReplicatedRouter] = {}
        self.listeners = EngineListeners()
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._max_routers = max_routers
        self._workers: dict[int, WorkerBody] = {}
        self._send: Callable[[bytes], object] | None = None

    def __len__(self) -> int:
        return len(self._workers)

    @property
    def workers(self) -> Mapping[int, WorkerBody]:
        """Workers by id."""
        return self._workers

    def everyone(self) -> Iterable[WorkerBody]:
        """Return all workers in the order of their ids."""
        return [self._workers[key] for key in sorted(self._workers)]

    def worker(self, worker_id: int) -> WorkerBody:
        """Return a worker.

        Raises:
            NotFoundError: if it is not registered.
        """
        found = self._workers.get(worker_id)
        if found is None:
            raise NotFoundError(f"no worker '{worker_id}' is registered; GET /workers lists them", param="worker_id")
        return found

    def router_of(self, body: WorkerBody) -> KvRouter:
        """Return the router of a registered worker's pool."""
        return self.routers[_pool_of(body)]

    def router(self, model: str, group: str, *, prefill: bool = False) -> KvRouter:
        """Return a pool's router.

        Raises:
            NotFoundError: if no worker of it was ever registered.
        """
        key = PoolKey(model, group, prefill)
        router = self.routers.get(key)
        if router is None:
            known = ", ".join(sorted(map(str, self.routers))) or "none"
            what = "prefill worker" if prefill else "worker"
            raise NotFoundError(f"no {what} of model {model!r} in group {group!r} (known: {known})", param="model_name")
        return router

    async def put(self, body: WorkerBody) -> None:
        """Register a worker, in place of one with its id.

        Raises:
            InvalidRequestError: if it does not fit its pool, or its engines cannot be followed.
            ConfigurationError: if there are as many pools as may be.
        """
        if body.worker_id in self._workers:
            await self.remove(body.worker_id)
        self._register(body)
        await self._listen(body)

    async def change(self, body: WorkerBody) -> None:
        """Take over changed facts of a registered worker; its index and bookings stay if it stays in its pool.

        Raises:
            InvalidRequestError: as ``put`` does.
        """
        old = self.worker(body.worker_id)
        if any(getattr(old, name) != getattr(body, name) for name in _FIXED):
            await self.put(body)
            return
        for worker in body.workers():
            self.router_of(body).upsert_worker(worker, body.card())
        self._workers[body.worker_id] = body
        if old.engine() != body.engine():
            await self.listeners.close(body.worker_id)
            await self._listen(body)

    async def remove(self, worker_id: int) -> None:
        """Forget a worker.

        Raises:
            NotFoundError: if it is not registered.
        """
        body = self.worker(worker_id)
        del self._workers[worker_id]
        await self.listeners.close(worker_id)
        router = self.router_of(body)
        for worker in body.workers():
            router.remove_worker(worker)

    async def adopt(self, state: PeerState) -> None:
        """Take over a peer's workers and indexes; workers that are known already stay as they are.

        Raises:
            InvalidRequestError: if they do not fit together.
        """
        new = [body for body in state.workers if body.worker_id not in self._workers]
        for body in new:
            self._register(body)
        for body in new:
            snapshot = state.indexes.get(_pool_of(body).dump_name)
            # An engine with a replay socket tells its state itself, and numbers of its events begin anew here.
            if snapshot is not None and not body.replay_endpoint:
                mine = [worker for worker in snapshot.workers if worker.worker.instance_id == body.worker_id]
                if body.kv_events_endpoints:
                    mine = [msgspec.structs.replace(worker, last_event_id=None) for worker in mine]
                self.router_of(body).restore(msgspec.structs.replace(snapshot, workers=tuple(mine)))
            await self._listen(body)

    def share(self, send: Callable[[bytes], object]) -> None:
        """Tell other services what is booked here, through a function; what they say goes into ``hear``."""
        self._send = send
        for router in self.routers.values():
            router.share(send)

    def hear(self, publisher: int, payload: bytes) -> None:
        """Take what another service said."""
        for router in self.routers.values():
            router.hear(publisher, payload)

    def missed(self, publisher: int) -> None:
        """Note that messages of another service were lost."""
        for router in self.routers.values():
            router.missed(publisher)

    async def close(self) -> None:
        """Stop following engines, part from other services, and close the routers' logs. Idempotent."""
        await self.listeners.close_all()
        for router in self.routers.values():
            await router.leave()
            await router.stop()

    def _register(self, body: WorkerBody) -> None:
        router = self._router_for(body)
        for worker in body.workers():
            router.upsert_worker(worker, body.card())
        self._workers[body.worker_id] = body

    async def _listen(self, body: WorkerBody) -> None:
        try:
            await self.listeners.open(body.engine(), self.router_of(body).apply_events)
        except InvalidRequestError:
            await self.remove(body.worker_id)
            raise

    def _router_for(self, body: WorkerBody) -> ReplicatedRouter:
        key = _pool_of(body)
        if key not in self.routers:
            if len(self.routers) >= self._max_routers:
                raise ConfigurationError(f"{self._max_routers} models are routed, the limit; raise --max-routers")
            self.routers[key] = router = ReplicatedRouter(
                block_size=body.block_size,
                settings=self._settings,
                clock=self._clock,
                metrics=self._metrics,
                model=str(key),
            )
            if self._send is not None:
                router.share(self._send)
        return self.routers[key]


def _pool_of(body: WorkerBody) -> PoolKey:
    return PoolKey(body.model_name, body.routing_group, body.worker_type is WorkerType.PREFILL)
