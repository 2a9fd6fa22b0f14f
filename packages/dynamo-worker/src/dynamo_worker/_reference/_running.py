"""A started engine on the event loop: who submitted what, and what came of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from dynamo_core.engine import ChunkSink, EngineContext
from dynamo_core.errors import (
    CapacityExhaustedError,
    ConflictError,
    DynamoError,
    UnavailableError,
)
from dynamo_core.ids import WorkerId
from dynamo_core.kv import BlockDescriptor
from dynamo_core.load import ForwardPassMetrics, ReportedLoad
from dynamo_core.requests import GenerateRequest
from dynamo_worker._reference._assembly import LoadedEngine
from dynamo_worker._reference._constraints import Constraints
from dynamo_worker._reference._core import ActiveRequest, Output, StepStats
from dynamo_worker._reference._delivery import Delivery
from dynamo_worker._reference._grammar import GrammarCompiler
from dynamo_worker._reference._lora_store import LoraStore
from dynamo_worker._reference._metrics import EngineMetrics
from dynamo_worker._reference._model import LlamaModel
from dynamo_worker._reference._scheduler import waiting_prefill_tokens
from dynamo_worker._reference._settings import ReferenceSettings
from dynamo_worker._reference._step_thread import StepThread
from dynamo_worker._reference._validation import require_servable

_SEED_MASK = (1 << 64) - 1


class Running:
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
        self.constraints = Constraints(
            GrammarCompiler(settings.model_folder, loaded.config.vocab_size, loaded.config.eos_token_ids)
        )
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
        self.require_open()
        require_servable(
            request,
            vocab_size=self.config.vocab_size,
            max_context=self.max_context,
            eos=self.config.eos_token_ids,
        )
        self.constraints.require_available(request)
        lora = self.loras.resolve(request)
        adapter = self.loras.acquire(lora)
        if lora != request.routing.lora:
            request = msgspec.structs.replace(request, routing=msgspec.structs.replace(request.routing, lora=lora))
        active = self.core.activate(request, self._seed_of(request), adapter)
        self._deliveries[active] = Delivery(sink)
        if request.sampling.guided is not None and not self.constraints.apply_kept(active):
            self.constraints.prepare(active, self._enqueue_late)
        elif not self.thread.post(lambda: self.core.add(active)):
            self._forget(active)
            raise _stopped()
        self._idle.clear()
        return active

    def abort(self, active: ActiveRequest) -> None:
        delivery = self._deliveries.get(active)
        if delivery is not None and not delivery.is_aborted:
            delivery.is_aborted = True
            if self.constraints.give_up(active):  # it never came to the core, which gives its last chunks
                self.thread.post(lambda: self.core.add(active))
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

    def require_open(self) -> None:
        """Raise if no request is taken now."""
        if self._is_draining:
            raise UnavailableError("the engine drains; send the request to another worker", reason="backend.draining")
        if self._sleep_level:
            raise UnavailableError("the engine sleeps; wake it or use another worker", reason="backend.draining")
        if len(self._deliveries) >= self._max_requests:
            raise CapacityExhaustedError(
                f"{len(self._deliveries)} requests run or wait, which is the limit; retry later or on another worker",
                reason="capacity.worker_overloaded",
            )

    async def close(self) -> None:
        """Fail what still runs and end the thread. Idempotent."""
        for active in self.constraints.give_up_all():
            self._enqueue_late(active, _stopped())
        await self.thread.close()

    def _enqueue_late(self, active: ActiveRequest, error: DynamoError | None) -> None:
        if error is None and not self.thread.post(lambda: self.core.add(active)):
            error = _stopped()
        if error is not None:
            self._deliver([(active, error)], None, 0.0)

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
        self._metrics.observe(self.core, len(self.constraints), stats, wall_time_s)
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


def _stopped() -> UnavailableError:
    return UnavailableError("the engine has stopped", reason="backend.engine_shutdown")
