"""``ReferenceEngine``: the engine contract around an ``EngineCore`` on its own thread.

It runs Llama-architecture models from safetensors in NumPy: continuous batching, paged KV cache, prefix caching,
chunked prefill, preemption, seeded sampling, offload and onboarding of KV blocks.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import msgspec

from dynamo_core.cards import ModelRuntimeConfig
from dynamo_core.engine import ChunkSink, EngineConfig, EngineContext, KvEventSink
from dynamo_core.errors import (
    CapacityExhaustedError,
    ConflictError,
    DynamoError,
    InvalidRequestError,
    UnavailableError,
)
from dynamo_core.ids import WorkerId
from dynamo_core.kv import BlockAccess, BlockDescriptor
from dynamo_core.load import ForwardPassMetrics, ReportedLoad
from dynamo_core.planes import RequestContext
from dynamo_core.requests import GenerateChunk, GenerateRequest
from dynamo_worker._mailbox import Mailbox
from dynamo_worker._reference._assembly import LoadedEngine, load_engine, load_model
from dynamo_worker._reference._core import ActiveRequest, Output, StepStats
from dynamo_worker._reference._delivery import Delivery
from dynamo_worker._reference._events import BlockEvents
from dynamo_worker._reference._lora_store import LoraStore
from dynamo_worker._reference._metrics import EngineMetrics
from dynamo_worker._reference._model import LlamaModel
from dynamo_worker._reference._scheduler import waiting_prefill_tokens
from dynamo_worker._reference._settings import ReferenceSettings
from dynamo_worker._reference._step_thread import StepThread
from dynamo_worker._reference._validation import require_servable

CAPABILITIES = ("logit_bias", "logprobs", "lora", "min_p", "n", "penalties", "seed", "top_k")
_SEED_MASK = (1 << 64) - 1


class ReferenceEngine:
    """A small, real engine; the embedded default and the example for engine authors.

    Log-probabilities are those of the model's own distribution, before bias, penalties and temperature. The draw of a
    sampled token is a function of (seed, choice, output position); a request without a seed gets one from the
    engine's. Equal greedy requests give equal tokens however they are batched, cut, cached or preempted.

    Args:
        settings: Options.
    """

    def __init__(self, settings: ReferenceSettings) -> None:
        self._settings = settings
        self._events = BlockEvents()
        self._context: EngineContext | None = None
        self._running: _Running | None = None
        self._listener: Callable[[ForwardPassMetrics], None] | None = None

    @classmethod
    def from_args(cls, args: Sequence[str]) -> ReferenceEngine:
        """Build an engine from command-line arguments; nothing is loaded.

        Raises:
            ConfigurationError: for an unknown flag, a bad value, or a model folder that is not there.
        """
        return cls(ReferenceSettings.from_args(args))

    async def start(self, context: EngineContext) -> EngineConfig:
        """Load the model.

        Raises:
            ConfigurationError: if it cannot be loaded or does not fit the options.
        """
        loaded = await asyncio.to_thread(load_engine, self._settings, self._events, context.kv_connector)
        self._running = _Running(loaded, self._settings, context, self._notify, self._events.unbind)
        self._running.thread.start()
        for name, folder in self._settings.adapters.items():
            await self._running.loras.load(name, folder)
        await self._running.thread.call(lambda: self._events.bind(context.kv_connector, loaded.core.cache))
        return _engine_config(self._settings, loaded)

    async def generate(self, request: GenerateRequest, context: RequestContext) -> AsyncIterator[GenerateChunk]:
        """Yield tokens as they come; stopping the context or closing the iterator frees the request within a step.

        Raises:
            InvalidRequestError: for a request it cannot serve, before the first chunk.
            CapacityExhaustedError: if too many requests wait.
            UnavailableError: if the engine drains or has stopped.
        """
        running = self._require_running()
        mailbox = Mailbox()
        active = running.submit(request, mailbox)
        context.on_stop(lambda: running.abort(active))
        try:
            while True:
                for chunk in await mailbox.take():
                    yield chunk
                    if chunk.usage is not None:
                        return
        finally:
            running.abort(active)

    def submit(self, request: GenerateRequest, sink: ChunkSink) -> None:
        """Accept a request whose chunks are pushed; raises as ``generate``."""
        self._require_running().submit(request, sink)

    async def abort(self, request_id: str) -> None:
        """End all attempts of a request within one step."""
        if self._running is not None:
            self._running.abort_id(request_id)

    async def drain(self) -> None:
        """Finish what runs, refuse what is new."""
        if self._running is not None:
            await self._running.drain()

    async def cleanup(self) -> None:
        """Stop the thread, fail what still runs, release the memory."""
        running, self._running = self._running, None
        if running is not None:
            await running.thread.close()

    def set_kv_event_sink(self, sink: KvEventSink, *, dp_rank: int = 0) -> None:
        """Report KV changes to ``sink``; the engine has the one rank 0."""
        self._events.sink = sink

    def set_forward_pass_listener(self, listener: Callable[[ForwardPassMetrics], None]) -> None:
        """Report each step to ``listener``."""
        self._listener = listener

    def load(self, *, dp_rank: int = 0) -> ReportedLoad:
        """Return the present load."""
        return self._require_running().load()

    def block_access(self) -> BlockAccess:
        """Return access to the device blocks, for use on the step thread."""
        return self._require_running().core.cache

    async def export_blocks(self, sequence_hashes: Sequence[int]) -> list[bytes]:
        """Return the bytes of the longest prefix of these blocks that the device holds."""
        running = self._require_running()
        return await running.thread.call(lambda: running.core.read_blocks(sequence_hashes))

    async def import_blocks(self, blocks: Sequence[BlockDescriptor], data: Sequence[bytes | memoryview]) -> int:
        """Put consecutive blocks of one sequence into the cache; return how many, from the start, are there now.

        Blocks whose parents the device lacks are not taken: nobody could find them.

        Raises:
            InvalidRequestError: if a piece has another size than a block.
        """
        running = self._require_running()
        return await running.thread.call(lambda: running.core.write_blocks(blocks, data))

    async def match_blocks(self, sequence_hashes: Sequence[int]) -> int:
        """Return how many of these blocks, from the start, the device holds."""
        running = self._require_running()
        return await running.thread.call(lambda: running.core.match_blocks(sequence_hashes))

    async def hold_blocks(self, sequence_hashes: Sequence[int]) -> int:
        """Keep the longest prefix of these blocks that the device holds until released; return its length."""
        running = self._require_running()
        return await running.thread.call(lambda: running.core.hold_blocks(sequence_hashes))

    async def release_blocks(self, sequence_hashes: Sequence[int]) -> None:
        """Let go of blocks that ``hold_blocks`` kept."""
        running = self._require_running()
        await running.thread.call(lambda: running.core.release_blocks(sequence_hashes))

    async def read_blocks_into(self, sequence_hashes: Sequence[int], buffer: memoryview) -> int:
        """Copy the longest prefix of these blocks that the device holds to the start of ``buffer``."""
        running = self._require_running()
        return await running.thread.call(lambda: running.core.read_blocks_into(sequence_hashes, buffer))

    async def clear_kv_blocks(self) -> int:
        """Drop the cached blocks that no request holds, and those of lower tiers; return how many on the device."""
        running = self._require_running()
        return await running.thread.call(self._clear)

    async def load_lora(self, name: str, path: str) -> None:
        """Load an adapter in PEFT's layout; raises as ``SupportsLora`` says, and for adapters that do not fit."""
        await self._require_running().loras.load(name, Path(path))

    async def unload_lora(self, name: str) -> None:
        """Unload an adapter once no request uses it; new requests for it are refused at once."""
        await self._require_running().loras.unload(name)

    async def list_loras(self) -> list[str]:
        """Names of loaded adapters."""
        return self._require_running().loras.names

    async def sleep(self, level: int = 1) -> None:
        """Give the KV cache's memory back, at level 2 that of the weights too. Requests are refused until ``wake``.

        Raises:
            ConflictError: if requests run.
            InvalidRequestError: for another level.
        """
        if level not in (1, 2):
            raise InvalidRequestError(f"sleep level {level} is not 1 or 2", param="level")
        dropped = await self._require_running().sleep(level)
        self._events.on_drop(dropped)

    async def wake(self) -> None:
        """Take memory again and load dropped weights. Harmless when awake."""
        running = self._require_running()
        await running.wake(lambda: load_model(self._settings, running.config, running.max_context))

    def _clear(self) -> int:
        dropped = self._require_running().core.pool.clear()
        self._events.on_drop(dropped)
        if self._events.connector is not None:
            self._events.connector.clear()
        return len(dropped)

    def _notify(self, metrics: ForwardPassMetrics) -> None:
        if self._listener is not None:
            self._listener(metrics)

    def _require_running(self) -> _Running:
        if self._running is None:
            raise UnavailableError("the engine is not started", reason="backend.engine_shutdown")
        return self._running


class _Running:
    """State of a started engine on the event loop: who submitted what."""

    def __init__(
        self,
        loaded: LoadedEngine,
        settings: ReferenceSettings,
        context: EngineContext,
        notify: Callable[[ForwardPassMetrics], None],
        on_exit: Callable[[], None],
    ) -> None:
        self.core = loaded.core
        self.thread = StepThread(loaded.core, self._deliver, context.clock.monotonic, on_exit)
        self.config = loaded.config
        self.max_context = loaded.max_context
        self.loras = LoraStore(loaded.config)
        self._sleep_level = 0
        self._context = context
        self._notify = notify
        self._metrics = EngineMetrics(context.metrics)
        self._max_requests = settings.max_waiting_requests + settings.max_num_seqs
        self._seed = context.seed if settings.seed is None else settings.seed
        self._submitted = 0
        self._deliveries: dict[ActiveRequest, Delivery] = {}
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    def submit(self, request: GenerateRequest, sink: ChunkSink) -> ActiveRequest:
        self._require_open()
        require_servable(
            request,
            vocab_size=self.config.vocab_size,
            max_context=self.max_context,
            eos=self.config.eos_token_ids,
        )
        lora = self.loras.resolve(request)
        adapter = self.loras.acquire(lora)
        if lora != request.routing.lora:
            request = msgspec.structs.replace(request, routing=msgspec.structs.replace(request.routing, lora=lora))
        active = self.core.activate(request, self._seed_of(request), adapter)
        if not self.thread.post(lambda: self.core.add(active)):
            self.loras.release(adapter)
            raise UnavailableError("the engine has stopped", reason="backend.engine_shutdown")
        self._deliveries[active] = Delivery(sink)
        self._idle.clear()
        return active

    def abort(self, active: ActiveRequest) -> None:
        delivery = self._deliveries.get(active)
        if delivery is not None and not delivery.is_aborted:
            delivery.is_aborted = True
            self.thread.post(lambda: self.core.abort(active))

    def abort_id(self, request_id: str) -> None:
        for active in self._deliveries:
            if active.request.request_id == request_id:
                self.abort(active)

    async def drain(self) -> None:
        self._is_draining = True
        await self._idle.wait()

    async def sleep(self, level: int) -> list[BlockDescriptor]:
        if self._deliveries:
            raise ConflictError(f"{len(self._deliveries)} requests run; drain the worker before it sleeps")
        if self._sleep_level:
            raise ConflictError("the engine sleeps already")
        self._sleep_level = level
        try:
            return await self.thread.call(lambda: self.core.sleep(drop_weights=level > 1))
        except ConflictError:
            self._sleep_level = 0
            raise

    async def wake(self, load: Callable[[], LlamaModel]) -> None:
        if not self._sleep_level:
            return
        model = await asyncio.to_thread(load) if self._sleep_level > 1 else None
        await self.thread.call(lambda: self.core.wake(model))
        self._sleep_level = 0

    def load(self) -> ReportedLoad:
        running, waiting = len(self.core.scheduler.running), list(self.core.scheduler.waiting)
        return ReportedLoad(
            kv_used_blocks=self.core.pool.num_used_blocks,
            kv_total_blocks=self.core.pool.num_blocks,
            active_requests=running,
            waiting_requests=max(len(waiting), len(self._deliveries) - running),
            waiting_prefill_tokens=waiting_prefill_tokens(waiting),
            cache_hit_rate=self.core.cache_hit_rate,
            reported_at_s=self._context.clock.time(),
        )

    def _require_open(self) -> None:
        if self._is_draining:
            raise UnavailableError("the engine drains; send the request to another worker", reason="backend.draining")
        if self._sleep_level:
            raise UnavailableError("the engine sleeps; wake it or use another worker", reason="backend.draining")
        if len(self._deliveries) >= self._max_requests:
            raise CapacityExhaustedError(
                f"{len(self._deliveries)} requests run or wait, which is the limit; retry later or on another worker",
                reason="capacity.worker_overloaded",
            )

    def _seed_of(self, request: GenerateRequest) -> int:
        if request.sampling.seed is not None:
            return request.sampling.seed & _SEED_MASK
        self._submitted += 1
        return (self._seed * 1_000_003 + self._submitted) & _SEED_MASK

    def _deliver(self, outputs: list[Output], stats: StepStats | None, wall_time_s: float) -> None:
        for active, item in outputs:
            delivery = self._deliveries[active]
            if isinstance(item, DynamoError):
                self._forget(active)
                delivery.fail(item)
                continue
            if item.usage is not None:
                self._forget(active)
            delivery.push(item)
        if not self._deliveries:
            self._idle.set()
        self._metrics.observe(self.core, stats, wall_time_s)
        if stats is not None:
            self._notify(self._forward_pass(stats, wall_time_s))

    def _forget(self, active: ActiveRequest) -> None:
        del self._deliveries[active]
        self.loras.release(active.sequences[0].adapter)

    def _forward_pass(self, stats: StepStats, wall_time_s: float) -> ForwardPassMetrics:
        return ForwardPassMetrics(
            worker=WorkerId(self._context.instance_id),
            wall_time_s=wall_time_s,
            scheduled=stats.scheduled,
            queued=stats.queued,
            timestamp_s=self._context.clock.time(),
        )


def _engine_config(settings: ReferenceSettings, loaded: LoadedEngine) -> EngineConfig:
    return EngineConfig(
        model=settings.model_name,
        model_path=str(settings.model_folder.resolve()),
        context_length=loaded.max_context,
        kv_block_size=settings.block_size if settings.enable_prefix_caching else 0,
        eos_token_ids=loaded.config.eos_token_ids,
        capabilities=CAPABILITIES,
        runtime_config=ModelRuntimeConfig(
            total_kv_blocks=settings.num_blocks,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
        ),
    )
