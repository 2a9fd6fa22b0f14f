"""The engines that are followed, by worker."""

from __future__ import annotations

from collections.abc import Callable, Collection

from dynamo_core.events import KvEventBatch
from dynamo_core.ids import WorkerId
from dynamo_router._engine_address import EngineAddress
from dynamo_router._engine_events import EngineEventSource, SourceState


class EngineListeners:
    """One source for each dp rank of each worker that names where its engine publishes."""

    def __init__(self) -> None:
        self._sources: dict[int, dict[int, EngineEventSource]] = {}

    async def open(self, address: EngineAddress, apply: Callable[[KvEventBatch], object]) -> None:
        """Follow a worker's engines.

        Raises:
            InvalidRequestError: if an address cannot be used; those before it are followed until ``close``.
        """
        sources = self._sources.setdefault(address.worker_id, {})
        for rank, endpoint in address.endpoints.items():
            sources[rank] = EngineEventSource(
                apply,
                WorkerId(address.worker_id, rank),
                endpoint,
                replay_endpoint=address.replay_endpoints.get(rank, ""),
                topic=address.topic,
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

    def counts(self, workers: Collection[int] | None = None) -> dict[SourceState, int]:
        """Return how many engines there are in each state, of all workers or of some."""
        states = [
            source.state
            for worker_id, sources in self._sources.items()
            if workers is None or worker_id in workers
            for source in sources.values()
        ]
        return {state: states.count(state) for state in SourceState}
