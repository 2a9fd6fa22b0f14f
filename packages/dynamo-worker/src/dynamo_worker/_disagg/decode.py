"""The decode role: brings the prompt's blocks from a prefill worker, then lets the engine go on from there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import msgspec
import structlog

from dynamo_core.clock import Clock
from dynamo_core.engine import ChunkSink, Engine, EngineConfig, EngineContext, SupportsSubmit
from dynamo_core.errors import DeadlineExceededError, DynamoError, UnavailableError, as_dynamo_error
from dynamo_core.planes import RequestContext
from dynamo_core.requests import GenerateChunk, GenerateRequest, PrefillResult
from dynamo_core.tokens import token_count
from dynamo_worker._deadline import within
from dynamo_worker._disagg.handoff import KvHandoff, SupportsKvHandoff, prompt_blocks
from dynamo_worker._disagg.peers import PrefillPeers
from dynamo_worker._disagg.pull import BlockPuller
from dynamo_worker._mailbox import Mailbox
from dynamo_worker._metrics import WorkerMetrics
from dynamo_worker._output_builder import OutputBuilder

_ATTEMPTS = 2

log = structlog.get_logger(__name__)


@dataclass(eq=False)
class _Waiting:
    request: GenerateRequest
    sink: ChunkSink
    task: asyncio.Task[None] | None = None
    is_aborted: bool = False


@dataclass(frozen=True)
class DecodeOptions:
    """How prompts come from elsewhere.

    Attributes:
        threshold_tokens: Uncached prompt tokens from which a prefill worker is asked; None never asks.
        timeout_s: Longest wait for a prompt from elsewhere, its transfer included.
        local_prefill: Whether the prompt is computed here if it cannot come from elsewhere.
    """

    threshold_tokens: int | None
    timeout_s: float
    local_prefill: bool


class DecodeEngine:
    """An engine whose prompts may come from elsewhere, around one that computes. The inner engine's life is its host's.

    Args:
        engine: Goes on from the blocks; it takes pushed sinks.
        blocks: The same engine's blocks.
        model: Served model name.
        peers: Prefill workers, for requests without a hand-off.
        puller: Brings blocks.
        options: When and how long.
        clock: Time.
        metrics: Where counts go.
    """

    def __init__(  # noqa: PLR0913 - built once, every argument by name
        self,
        engine: Engine,
        blocks: SupportsKvHandoff,
        *,
        model: str,
        peers: PrefillPeers,
        puller: BlockPuller,
        options: DecodeOptions,
        clock: Clock,
        metrics: WorkerMetrics,
    ) -> None:
        assert isinstance(engine, SupportsSubmit)
        self._engine: Engine = engine
        self._submit = engine.submit
        self._blocks = blocks
        self._block_size = blocks.block_access().layout.block_size
        self._model = model
        self._peers = peers
        self._puller = puller
        self._options = options
        self._clock = clock
        self._metrics = metrics
        self._waiting: set[_Waiting] = set()
        self._none_waits = asyncio.Event()
        self._none_waits.set()

    async def start(self, context: EngineContext) -> EngineConfig:
        """Start the inner engine."""
        return await self._engine.start(context)

    def submit(self, request: GenerateRequest, sink: ChunkSink) -> None:
        """Accept a request; one whose prompt may come from elsewhere reaches the engine when it has come."""
        if request.health_check or not self._may_come_from_elsewhere(request):
            self._submit(request, sink)
            return
        waiting = _Waiting(request, sink)
        self._waiting.add(waiting)
        self._none_waits.clear()
        waiting.task = asyncio.ensure_future(self._bring(request))
        waiting.task.add_done_callback(lambda task: self._on_brought(waiting, task))

    async def generate(self, request: GenerateRequest, context: RequestContext) -> AsyncIterator[GenerateChunk]:
        """The pull form of ``submit``; leaving it aborts the request."""
        mailbox = Mailbox()
        self.submit(request, mailbox)
        try:
            while True:
                for chunk in await mailbox.take():
                    yield chunk
                    if chunk.usage is not None:
                        return
        finally:
            await self.abort(request.request_id)

    async def abort(self, request_id: str) -> None:
        """Abort while the prompt comes, or in the inner engine."""
        for waiting in list(self._waiting):
            if waiting.request.request_id == request_id and waiting.task is not None:
                waiting.is_aborted = True
                waiting.task.cancel()
        await self._engine.abort(request_id)

    async def drain(self) -> None:
        """Wait for prompts that are coming, then drain the inner engine."""
        await self._none_waits.wait()
        await self._engine.drain()

    async def cleanup(self) -> None:
        """Clean the inner engine up, after the requests whose prompts are coming."""
        await self.close()
        await self._engine.cleanup()

    async def close(self) -> None:
        """Fail the requests whose prompts are coming. Idempotent."""
        tasks = [waiting.task for waiting in self._waiting if waiting.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._none_waits.wait()

    def _may_come_from_elsewhere(self, request: GenerateRequest) -> bool:
        if request.handoff is not None:
            return True
        threshold = self._options.threshold_tokens
        return threshold is not None and token_count(request.token_ids) >= max(threshold, self._block_size + 1)

    async def _bring(self, request: GenerateRequest) -> None:
        """Get the prompt's blocks here.

        Raises:
            DynamoError: if they cannot come and the prompt must not be computed here.
        """
        outcome = "remote"
        try:
            limit_s = self._options.timeout_s
            if request.deadline_s is not None:
                limit_s = min(limit_s, request.deadline_s)
            outcome = await within(self._clock, limit_s, self._bring_any(request, limit_s))
        except TimeoutError:
            outcome = "timeout"
            if not self._options.local_prefill:
                raise DeadlineExceededError(
                    f"The prompt did not come from a prefill worker within {self._options.timeout_s} s.",
                    reason="backend.prefill_timeout",
                ) from None
        except DynamoError as error:
            outcome = "failed"
            if not self._options.local_prefill:
                raise
            log.info("prompt is computed here", request_id=request.request_id, reason=error.reason, why=error.message)
        finally:
            self._metrics.remote_prefills.labels(outcome=outcome).inc()

    async def _bring_any(self, request: GenerateRequest, limit_s: float) -> str:
        blocks = prompt_blocks(request, self._block_size)
        if request.handoff is not None:
            await self._puller.pull(KvHandoff.from_result(request.handoff), blocks)
            return "handed_over"
        held = await self._blocks.match_blocks([block.sequence_hash for block in blocks])
        uncached = token_count(request.token_ids) - held * self._block_size
        if uncached < (self._options.threshold_tokens or 0):
            return "short"
        result = await self._ask_peers(request, limit_s)
        if result is None:
            return "no_peer"
        await self._puller.pull(KvHandoff.from_result(result), blocks)
        return "remote"

    async def _ask_peers(self, request: GenerateRequest, limit_s: float) -> PrefillResult | None:
        tried: set[int] = set()
        for attempt in range(_ATTEMPTS):
            instance = self._peers.choose(self._model, self._block_size, excluded=frozenset(tried))
            if instance is None:
                break
            tried.add(instance.instance_id)
            try:
                return await self._peers.prefill(instance, request, deadline_s=limit_s)
            except UnavailableError:
                if attempt + 1 == _ATTEMPTS:
                    raise
        if self._options.local_prefill:
            return None
        raise UnavailableError(
            f"No prefill worker serves {self._model} at {self._peers.endpoint}.", reason="backend.worker_unavailable"
        )

    def _on_brought(self, waiting: _Waiting, task: asyncio.Task[None]) -> None:
        self._waiting.discard(waiting)
        if not self._waiting:
            self._none_waits.set()
        if task.cancelled():
            self._end_waiting(waiting)
            return
        error = task.exception()
        if error is not None:
            waiting.sink.fail(as_dynamo_error(error))
            return
        try:
            self._submit(msgspec.structs.replace(waiting.request, handoff=None), waiting.sink)
        except DynamoError as refusal:
            waiting.sink.fail(refusal)

    def _end_waiting(self, waiting: _Waiting) -> None:
        if not waiting.is_aborted:
            waiting.sink.fail(UnavailableError("The engine was shut down.", reason="backend.engine_shutdown"))
            return
        for chunk in OutputBuilder(waiting.request).cancelled():
            waiting.sink.push(chunk)
