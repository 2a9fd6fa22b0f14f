"""The engines that a selection service follows, by worker."""

from __future__ import annotations

from collections.abc import Callable

from dynamo_core.errors import InvalidRequestError
from dynamo_core.events import KvEventBatch
from dynamo_core.ids import WorkerId
from dynamo_router._engine_events import EngineEventSource, SourceState, rank_endpoint
from dynamo_router._service_bodies import WorkerBody


class EngineListeners:
    """One source for each dp rank of each worker that names where its engine publishes."""

    def __init__(self) -> None:
        self._sources: dict[int, dict[int, EngineEventSource]] = {}

    async def open(self, body: WorkerBody, apply: Callable[[KvEventBatch], object]) -> None:
        """Follow a worker's engines.

        Raises:
            InvalidRequestError: if an address cannot be used or a rank is not the worker's.
        """
        known = {worker.dp_rank for worker in body.workers()}
        if unknown := sorted(body.kv_events_endpoints.keys() - known):
            raise InvalidRequestError(
                f"kv_events_endpoints names dp rank {unknown[0]}, the worker has {min(known)}..{max(known)}; "
                "set data_parallel_size, or leave it out",
                param="kv_events_endpoints",
            )
        sources = self._sources.setdefault(body.worker_id, {})
        for rank, endpoint in body.kv_events_endpoints.items():
            sources[rank] = EngineEventSource(
                apply,
                WorkerId(body.worker_id, rank),
                endpoint,
                replay_endpoint=rank_endpoint(body.replay_endpoint, rank),
            )
            await sources[rank].start()

    async def close(self, worker_id: int) -> None:
        """Stop following a worker's engines. Idempotent."""
        for source in self._sources.pop(worker_id, {}).values():
            await source.close()

    async def close_all(self) -> None:
        """Stop following all engines. Idempotent."""
        for worker_id in list(self._sources):
            await self.close(worker_id)

    def states(self, worker_id: int) -> dict[int, SourceState]:
        """Return how far each of a worker's engines has been heard."""
        return {rank: source.state for rank, source in self._sources.get(worker_id, {}).items()}

    def counts(self) -> dict[SourceState, int]:
        """Return how many engines there are in each state."""
        states = [source.state for sources in self._sources.values() for source in sources.values()]
        return {state: states.count(state) for state in SourceState}
