"""Serves ``generate``: decode, admit, hand to the engine, watch, and end every request with the right word."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import structlog

from dynamo_core.clock import Clock
from dynamo_core.engine import Engine, SupportsSubmit
from dynamo_core.errors import (
    BackendProtocolError,
    CancelledRequestError,
    DeadlineExceededError,
    DynamoError,
    InvalidRequestError,
    UnavailableError,
)
from dynamo_core.planes import RequestContext, ResponseSink
from dynamo_core.requests import GenerateRequest
from dynamo_core.tokens import token_count
from dynamo_core.wire import GENERATE_REQUEST
from dynamo_worker._admission import Admission
from dynamo_worker._chunk_guard import ChunkGuard
from dynamo_worker._metrics import WorkerMetrics
from dynamo_worker._response_stream import ResponseStream, unknown_engine_error
from dynamo_worker._settings import WorkerSettings

log = structlog.get_logger(__name__)


class GenerateHandler:
    """The request handler of one engine.

    Args:
        engine: A started engine.
        settings: Limits.
        admission: Slots before the engine.
        clock: Time.
        metrics: Where counts go.
        vocab_size: First token id that does not exist; 0 if unknown.
        on_suspicion: Hears why the engine may be dead; called at most once per failed request.
    """

    def __init__(  # noqa: PLR0913 - built once, every argument by name
        self,
        engine: Engine,
        *,
        settings: WorkerSettings,
        admission: Admission,
        clock: Clock,
        metrics: WorkerMetrics,
        vocab_size: int = 0,
        on_suspicion: Callable[[str], None],
    ) -> None:
        self.active: dict[str, ResponseStream] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self.last_end_s = clock.monotonic()
        self.on_activity: Callable[[], None] = lambda: None
        self._engine = engine
        self._submit = engine.submit if isinstance(engine, SupportsSubmit) else None
        self._settings = settings
        self._admission = admission
        self._clock = clock
        self._metrics = metrics
        self._vocab_size = vocab_size
        self._on_suspicion = on_suspicion
        self._refusal: DynamoError | None = None
        self._background: set[asyncio.Task[None]] = set()

    async def __call__(self, payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        """Serve one call. Cancellation aborts the request in the engine."""
        request = _decode(payload)
        self._check_open()
        if request.health_check:  # a probe asks whether the engine lives, not whether it has room
            await self._serve(request, context, sink)
            return
        if not self._admission.try_acquire():
            await self._queue(context)
        try:
            self._check_open()
            await self._serve(request, context, sink)
        finally:
            self._admission.release()

    @property
    def accepting(self) -> bool:
        """Whether new requests are taken."""
        return self._refusal is None

    async def wait_idle(self) -> None:
        """Return once no request runs. Cancellation only ends the wait."""
        await self._idle.wait()

    def refuse_new(self, error: DynamoError) -> None:
        """Refuse new requests and those that wait, from now on."""
        self._refusal = error
        self._admission.refuse_waiting(error.message)

    def accept_new(self) -> None:
        """Accept requests again."""
        self._refusal = None

    def end_all(self, error: DynamoError) -> None:
        """End every running request with an error at once; output held for slow readers is lost."""
        for stream in list(self.active.values()):
            stream.end(error, drop_held=True)

    def sweep(self) -> None:
        """Enforce the limits that no event enforces: queue age, stalls, ignored cancellations."""
        self._admission.shed_old()
        now = self._clock.monotonic()
        for request_id, stream in list(self.active.items()):
            self._sweep_one(request_id, stream, now)

    def _check_open(self) -> None:
        if self._refusal is not None:
            self._metrics.rejected.labels(reason="draining").inc()
            raise UnavailableError(self._refusal.message, reason=self._refusal.reason)

    async def _queue(self, context: RequestContext) -> None:
        waiting = asyncio.ensure_future(self._admission.acquire())

        def leave() -> None:
            waiting.cancel()

        context.on_stop(leave)
        try:
            await waiting
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if context.stopped and not (task and task.cancelling()):
                raise _stop_error(context) from None
            raise

    async def _serve(self, request: GenerateRequest, context: RequestContext, sink: ResponseSink) -> None:
        request = self._with_free_id(request)
        stream = self._open(request, sink)
        context.on_stop(lambda: self._stop(request.request_id, stream))
        pump: asyncio.Task[None] | None = None
        outcome = "cancelled"
        try:
            pump = self._begin(request, context, stream)
            await stream.wait()
            outcome = "cancelled" if context.stopped else "success"
        except DynamoError as error:
            outcome = error.error_class.value
            self._judge(error)
            raise
        finally:
            self._close(request.request_id, stream, pump, outcome)

    def _open(self, request: GenerateRequest, sink: ResponseSink) -> ResponseStream:
        stream = ResponseStream(
            sink,
            ChunkGuard(request, vocab_size=self._vocab_size),
            buffer_bytes=self._settings.response_buffer_bytes,
            clock=self._clock,
            metrics=self._metrics,
        )
        if request.deadline_s is not None:
            stream.deadline_at_s = stream.started_at_s + request.deadline_s
        self.active[request.request_id] = stream
        self._idle.clear()
        self.on_activity()
        self._metrics.prompt_tokens.observe(token_count(request.token_ids))
        return stream

    def _begin(
        self, request: GenerateRequest, context: RequestContext, stream: ResponseStream
    ) -> asyncio.Task[None] | None:
        if self._submit is None:
            return asyncio.ensure_future(self._pump(request, context, stream))
        try:
            self._submit(request, stream)
        except DynamoError:
            stream.engine_done = True
            raise
        except Exception as error:
            stream.engine_done = True
            raise unknown_engine_error(error) from error
        return None

    async def _pump(self, request: GenerateRequest, context: RequestContext, stream: ResponseStream) -> None:
        chunks: Any = self._engine.generate(request, context)
        try:
            async for chunk in chunks:
                stream.push(chunk)
                if stream.ended:
                    break
            else:
                stream.finish()
        except DynamoError as error:
            stream.fail(error)
        except Exception as error:  # noqa: BLE001 - engines raise anything; the caller gets a typed error
            stream.fail(unknown_engine_error(error))
        finally:
            if hasattr(chunks, "aclose"):
                await chunks.aclose()

    def _close(self, request_id: str, stream: ResponseStream, pump: asyncio.Task[None] | None, outcome: str) -> None:
        stream.end(None, drop_held=True)
        if not stream.engine_done and stream.stopped_at_s is None:
            self._abort(request_id)
        if pump is not None and not pump.done():
            pump.cancel()
            self._keep(pump)
        del self.active[request_id]
        self.last_end_s = self._clock.monotonic()
        if not self.active:
            self._idle.set()
        self.on_activity()
        self._measure(stream, outcome)

    def _measure(self, stream: ResponseStream, outcome: str) -> None:
        self._metrics.requests.labels(outcome=outcome).inc()
        self._metrics.duration.observe(self.last_end_s - stream.started_at_s)
        if stream.first_output_at_s is not None:
            self._metrics.first_output.observe(stream.first_output_at_s - stream.started_at_s)
        self._metrics.output_tokens.inc(stream.guard.new_tokens)
        if stream.guard.usage is not None:
            self._metrics.cached_tokens.inc(stream.guard.usage.cached_tokens)

    def _stop(self, request_id: str, stream: ResponseStream) -> None:
        if stream.stopped_at_s is None and not stream.engine_done and self.active.get(request_id) is stream:
            stream.stopped_at_s = self._clock.monotonic()
            self._abort(request_id)

    def _abort(self, request_id: str) -> None:
        self._keep(asyncio.ensure_future(self._abort_in_engine(request_id)))

    async def _abort_in_engine(self, request_id: str) -> None:
        try:
            await self._engine.abort(request_id)
        except Exception as error:  # noqa: BLE001 - the request is over either way; the engine is now under suspicion
            self._on_suspicion(f"abort failed: {type(error).__name__}: {error}")

    def _keep(self, task: asyncio.Task[None]) -> None:
        # asyncio holds tasks weakly; each ends with the abort or the iterator it closes.
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _sweep_one(self, request_id: str, stream: ResponseStream, now: float) -> None:
        if stream.deadline_at_s is not None and now >= stream.deadline_at_s:
            stream.end(DeadlineExceededError("The request's deadline passed."), drop_held=True)
            return
        if stream.stopped_at_s is not None:
            if now - stream.stopped_at_s >= self._settings.cancel_timeout_s:
                stream.end(CancelledRequestError("The request was cancelled."), drop_held=True)
                self._on_suspicion("the engine did not end a cancelled request")
            return
        limit = self._settings.stall_timeout_s
        if limit and not stream.holding and now - stream.progress_at_s >= limit:
            log.warning("engine output stalled", request_id=request_id, seconds=now - stream.progress_at_s)
            stream.end(
                DeadlineExceededError(f"The engine produced nothing for {limit} s.", reason="backend.response_timeout")
            )
            self._on_suspicion(f"a request got no output for {limit} s")

    def _judge(self, error: DynamoError) -> None:
        if isinstance(error, BackendProtocolError) or error.reason == "backend.unknown":
            log.warning("engine broke a request", reason=error.reason, detail=error.diagnostic or error.message)
        if error.reason in ("backend.unknown", "backend.engine_shutdown") and self._refusal is None:
            self._on_suspicion(error.diagnostic or error.message)

    def _with_free_id(self, request: GenerateRequest) -> GenerateRequest:
        request_id = request.request_id
        number = 1
        while request_id in self.active:
            # A retry can arrive while the connection of the attempt before it is still being torn down.
            number += 1
            request_id = f"{request.request_id}~{number}"
        return request if number == 1 else msgspec.structs.replace(request, request_id=request_id)


def _decode(payload: bytes) -> GenerateRequest:
    try:
        return GENERATE_REQUEST.decode(payload)
    except BackendProtocolError as error:
        raise InvalidRequestError(f"the request cannot be read: {error.message}", reason="request.invalid") from error


def _stop_error(context: RequestContext) -> DynamoError:
    remaining = context.remaining_s()
    if remaining is not None and remaining <= 0:
        return DeadlineExceededError("The deadline passed while the request waited for the engine.")
    return CancelledRequestError("The caller left while the request waited for the engine.")
