"""The data-parallel ranks of a started engine: one set of weights, a scheduler, a KV cache and a thread for each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from dynamo_core.engine import EngineContext
from dynamo_core.errors import ConflictError, InvalidRequestError
from dynamo_core.load import ForwardPassMetrics
from dynamo_core.requests import GenerateRequest
from dynamo_worker._reference._assembly import LoadedEngine
from dynamo_worker._reference._constraints import Constraints
from dynamo_worker._reference._events import BlockEvents
from dynamo_worker._reference._grammar import GrammarCompiler
from dynamo_worker._reference._lora_store import LoraStore
from dynamo_worker._reference._metrics import EngineMetrics
from dynamo_worker._reference._model import LlamaModel
from dynamo_worker._reference._running import Running, Shared
from dynamo_worker._reference._settings import ReferenceSettings


class Ranks:
    """Started ranks.

    Args:
        loaded: What was loaded, a core for each rank.
        settings: Options.
        context: What the host gave.
        notify: Hears of every step.
        events: Receivers of each rank's block events.

    Attributes:
        loras: Adapters, for all ranks.
        constraints: Output constraints, for all ranks.
    """

    def __init__(
        self,
        loaded: LoadedEngine,
        settings: ReferenceSettings,
        context: EngineContext,
        notify: Callable[[ForwardPassMetrics], None],
        events: Sequence[BlockEvents],
    ) -> None:
        config = loaded.config
        self.loras = LoraStore(config)
        self.constraints = Constraints(GrammarCompiler(settings.model_folder, config.vocab_size, config.eos_token_ids))
        shared = Shared(
            loaded, settings, context, self.loras, self.constraints, EngineMetrics(context.metrics, len(events)), notify
        )
        self._all = [
            Running(core, shared, dp_rank=rank, on_exit=heard.unbind)
            for rank, (core, heard) in enumerate(zip(loaded.cores, events, strict=True))
        ]

    @property
    def first(self) -> Running:
        """Rank 0, which embeds, and whose blocks can be read and written."""
        return self._all[0]

    def __getitem__(self, dp_rank: int) -> Running:
        return self._all[dp_rank]

    def start(self) -> None:
        """Start the threads."""
        for running in self._all:
            running.thread.start()

    def choose(self, request: GenerateRequest) -> Running:
        """Return the rank that a request names, else the one with the fewest requests.

        Raises:
            InvalidRequestError: if there is no such rank.
        """
        wanted = request.routing.dp_rank
        if wanted is None:
            return min(self._all, key=lambda running: running.num_requests)
        if not 0 <= wanted < len(self._all):
            raise InvalidRequestError(
                f"dp_rank {wanted} is not one of 0..{len(self._all) - 1}; name one of them or none", param="dp_rank"
            )
        return self._all[wanted]

    def abort_id(self, request_id: str) -> None:
        """End all attempts of a request."""
        for running in self._all:
            running.abort_id(request_id)

    async def drain(self) -> None:
        """Refuse what is new, wait for what runs."""
        for running in self._all:
            running.refuse_new()
        for running in self._all:
            await running.wait_idle()

    async def close(self) -> None:
        """Fail what still runs and end the threads. Idempotent."""
        await asyncio.gather(*(running.close() for running in self._all))

    async def sleep(self, level: int, events: Sequence[BlockEvents]) -> None:
        """Give memory back on all ranks.

        Raises:
            ConflictError: if requests run, or the engine sleeps already.
        """
        busy = sum(running.num_requests for running in self._all)
        if busy:
            raise ConflictError(f"{busy} requests run; drain the worker before it sleeps")
        for running, heard in zip(self._all, events, strict=True):
            heard.on_drop(await running.sleep(level))

    async def wake(self, load: Callable[[], LlamaModel]) -> None:
        """Take memory again; dropped weights are loaded once for all ranks. Harmless when awake."""
        dropped = any(running.sleep_level > 1 for running in self._all)
        model = await asyncio.to_thread(load) if dropped else None
        for running in self._all:
            await running.wake(model)

    async def clear(self, events: Sequence[BlockEvents]) -> int:
        """Drop the cached blocks that no request holds, and those of lower tiers; return how many on the device."""
        return sum([await running.clear(heard) for running, heard in zip(self._all, events, strict=True)])
