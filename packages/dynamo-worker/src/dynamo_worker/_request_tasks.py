"""One task a request, for engines that are streams of a server or a library: start, stop, end, each exactly once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from dynamo_core.engine import ChunkSink
from dynamo_core.errors import BackendProtocolError, DynamoError, InternalError, UnavailableError
from dynamo_core.planes import RequestContext
from dynamo_core.requests import GenerateChunk, GenerateRequest
from dynamo_worker._mailbox import Mailbox
from dynamo_worker._output_builder import OutputBuilder

Stream = Callable[[GenerateRequest, OutputBuilder], AsyncIterator[GenerateChunk]]


@dataclass(eq=False)
class RunningRequest:
    """A request with its task."""

    request: GenerateRequest
    sink: ChunkSink
    output: OutputBuilder
    is_aborted: bool = False
    task: asyncio.Task[None] | None = field(default=None)


class RequestTasks:
    """Runs the requests of an adapter. What the stream raises ends its own request only.

    Args:
        stream: Yields the chunks of one request; cancelling it must free what the request holds in the engine.
        eos_token_ids: End tokens of the model.
    """

    def __init__(self, stream: Stream, eos_token_ids: Sequence[int] = ()) -> None:
        self._stream = stream
        self._eos_token_ids = tuple(eos_token_ids)
        self._running: set[RunningRequest] = set()
        self._refusal: UnavailableError | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._running)

    def submit(self, request: GenerateRequest, sink: ChunkSink) -> RunningRequest:
        """Start a request.

        Raises:
            UnavailableError: if no more are taken.
        """
        if self._refusal is not None:
            raise UnavailableError(self._refusal.message, reason=self._refusal.reason)
        running = RunningRequest(request, sink, OutputBuilder(request, self._eos_token_ids))
        self._running.add(running)
        self._idle.clear()
        running.task = asyncio.ensure_future(self._run(running))
        running.task.add_done_callback(lambda task: self._on_done(running, task))
        return running

    async def generate(self, request: GenerateRequest, context: RequestContext) -> AsyncIterator[GenerateChunk]:
        """The pull form of ``submit``; leaving it aborts the request."""
        mailbox = Mailbox()
        running = self.submit(request, mailbox)
        context.on_stop(lambda: self._abort(running))
        try:
            while True:
                for chunk in await mailbox.take():
                    yield chunk
                    if chunk.usage is not None:
                        return
        finally:
            self._abort(running)

    def abort(self, request_id: str) -> None:
        """End a request as cancelled; unknown ids are ignored."""
        for running in list(self._running):
            if running.request.request_id == request_id:
                self._abort(running)

    async def drain(self) -> None:
        """Refuse new requests and wait for the running ones. Cancellation only ends the wait."""
        self._refusal = UnavailableError(
            "the engine drains; send the request to another worker", reason="backend.draining"
        )
        await self._idle.wait()

    async def close(self) -> None:
        """Fail what still runs and take nothing new. Idempotent."""
        self._refusal = UnavailableError("The engine was shut down.", reason="backend.engine_shutdown")
        tasks = [running.task for running in self._running if running.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._idle.wait()

    def _abort(self, running: RunningRequest) -> None:
        if running in self._running and not running.is_aborted and running.task is not None:
            running.is_aborted = True
            running.task.cancel()

    async def _run(self, running: RunningRequest) -> None:
        async for chunk in self._stream(running.request, running.output):
            running.sink.push(chunk)

    def _on_done(self, running: RunningRequest, task: asyncio.Task[None]) -> None:
        self._running.discard(running)
        if not self._running:
            self._idle.set()
        if task.cancelled() and running.is_aborted:
            for chunk in running.output.cancelled():
                running.sink.push(chunk)
            return
        error = _error_of(running, task)
        if error is not None:
            running.sink.fail(error)


def _error_of(running: RunningRequest, task: asyncio.Task[None]) -> DynamoError | None:
    if task.cancelled():
        return UnavailableError("The engine was shut down.", reason="backend.engine_shutdown")
    error = task.exception()
    if isinstance(error, DynamoError):
        return error
    if error is not None:
        wrapped = InternalError(
            "The engine failed on this request.",
            reason="backend.unknown",
            diagnostic=f"{type(error).__name__}: {error}",
        )
        wrapped.__cause__ = error
        return wrapped
    if not running.output.complete:
        return BackendProtocolError(
            "the engine ended its stream before every choice had a finish reason", reason="backend.stream_incomplete"
        )
    return None
