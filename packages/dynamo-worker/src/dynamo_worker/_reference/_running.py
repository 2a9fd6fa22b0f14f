"""A started engine on the event loop: who submitted what, and what came of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

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
from dynamo_worker._reference._core import ActiveRequest, EngineCore, Output, StepStats
from dynamo_worker._reference._delivery import Delivery
from dynamo_worker._reference._events import BlockEvents
from dynamo_worker._reference._lora_store import LoraStore
from dynamo_worker._reference._metrics import EngineMetrics
from dynamo_worker._reference._model import LlamaModel
from dynamo_worker._reference._scheduler import waiting_prefill_tokens
from dynamo_worker._reference._settings import ReferenceSettings
from dynamo_worker._reference._step_thread import StepThread
from dynamo_worker._reference._validation import require_servable

_SEED_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Shared:
    """What the ranks of an engine have in common."""

    loaded: LoadedEngine
    settings: ReferenceSettings
    context: EngineContext
    loras: LoraStore
    constraints: Constraints
    metrics: EngineMetrics
    notify: Callable[[ForwardPassMetrics], None]


class Running:
    """State of a started rank on the event loop: who submitted what.

    Args:
        core: The rank's core.
        shared: What all ranks have.
        dp_rank: Which rank.
        on_exit: Called on the step thread after its last step.
    """

    def __init__(self, core: EngineCore, shared: Shared, *, dp_rank: int, on_exit: Callable[[], None]) -> None:
        settings, context = shared.settings, shared.context
        self.core = core
        self.thread = StepThread(core, self._deliver, context.clock.monotonic, on_exit)
        self.config = shared.loaded.config
        self.max_context = shared.loaded.max_context
        self.loras = shared.loras
        self.constraints = shared.constraints
        self.sleep_level = 0
        self._dp_rank = dp_rank
        self._takes_images = settings.image_encoder
        self._context = context
        self._notify = shared.notify
        self._metrics = shared.metrics
        self._max_requests = settings.max_waiting_requests + settings.max_num_seqs
        self._seed = context.seed if settings.seed is None else settings.seed
        self._submitted = dp_rank << 32  # so that ranks draw apart
        self._deliveries: dict[ActiveRequest, Delivery] = {}
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_requests(self) -> int:
        """Requests that run or wait."""
        return len(self._deliveries)

    def submit(self, request: GenerateRequest, sink: ChunkSink) -> ActiveRequest:
        self.require_open()
        require_servable(
            request,
            vocab_size=self.config.vocab_size,
            max_context=self.max_context,
            eos=self.config.eos_token_ids,
            images=self._takes_images,
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

    def refuse_new(self) -> None:
        self._is_draining = True

    async def wait_idle(self) -> None:
        await self._idle.wait()

    async def sleep(self, level: int) -> list[BlockDescriptor]:
        if self.sleep_level:
            raise ConflictError("the engine sleeps already")
        self.sleep_level = level
        try:
            return await self.thread.call(lambda: self.core.sleep(drop_weights=level > 1))
        except ConflictError:
            self.sleep_level = 0
            raise

    async def wake(self, model: LlamaModel | None) -> None:
        if self.sleep_level:
            await self.thread.call(lambda: self.core.wake(model))
            self.sleep_level = 0

    async def clear(self, events: BlockEvents) -> int:
        return await self.thread.call(lambda: self._clear(events))

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
        if self.sleep_level:
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
        self._metrics.observe(self.core, self._dp_rank, len(self.constraints), stats, wall_time_s)
        if stats is not None:
            self._notify(self._forward_pass(stats, wall_time_s))

    def _clear(self, events: BlockEvents) -> int:
        dropped = self.core.pool.clear()
        events.on_drop(dropped)
        if events.connector is not None:
            events.connector.clear()
        return len(dropped)

    def _forget(self, active: ActiveRequest) -> None:
        del self._deliveries[active]
        self.loras.release(active.sequences[0].adapter)

    def _forward_pass(self, stats: StepStats, wall_time_s: float) -> ForwardPassMetrics:
        return ForwardPassMetrics(
            worker=WorkerId(self._context.instance_id, self._dp_rank),
            wall_time_s=wall_time_s,
            scheduled=stats.scheduled,
            queued=stats.queued,
            timestamp_s=self._context.clock.time(),
        )


def _stopped() -> UnavailableError:
    return UnavailableError("the engine has stopped", reason="backend.engine_shutdown")
