"""An engine whose requests need something from elsewhere before it can begin."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from dynamo_core.engine import ChunkSink, Engine, EngineConfig, EngineContext, SupportsSubmit
from dynamo_core.errors import DynamoError, UnavailableError, as_dynamo_error
from dynamo_core.planes import RequestContext
from dynamo_core.requests import GenerateChunk, GenerateRequest
from dynamo_worker._mailbox import Mailbox
from dynamo_worker._output_builder import OutputBuilder


class Preparation(Protocol):
    """What some requests need first."""

    def concerns(self, request: GenerateRequest) -> bool:
        """Whether this request needs it."""
        ...

    async def prepare(self, request: GenerateRequest) -> GenerateRequest:
        """Do it, and return the request as the engine should see it. It ends within a time limit of its own.

        Raises:
            DynamoError: if the request cannot be served without.
        """
        ...


@dataclass(eq=False)
class _Waiting:
    request: GenerateRequest
    sink: ChunkSink
    task: asyncio.Task[GenerateRequest] | None = None
    is_aborted: bool = False


class PreparingEngine:
    """An engine behind a preparation. The inner engine's life is its host's.

    Args:
        engine: Goes on once a request is prepared; it takes pushed sinks.
        preparation: What comes first.
    """

    def __init__(self, engine: Engine, preparation: Preparation) -> None:
        assert isinstance(engine, SupportsSubmit)
        self._engine: Engine = engine
        self._submit = engine.submit
        self._preparation = preparation
        self._waiting: set[_Waiting] = set()
        self._none_waits = asyncio.Event()
        self._none_waits.set()

    async def start(self, context: EngineContext) -> EngineConfig:
        """Start the inner engine."""
        return await self._engine.start(context)

    def submit(self, request: GenerateRequest, sink: ChunkSink) -> None:
        """Accept a request; one that needs a preparation reaches the engine after it."""
        if request.health_check or not self._preparation.concerns(request):
            self._submit(request, sink)
            return
        waiting = _Waiting(request, sink)
        self._waiting.add(waiting)
        self._none_waits.clear()
        waiting.task = asyncio.ensure_future(self._preparation.prepare(request))
        waiting.task.add_done_callback(lambda task: self._on_prepared(waiting, task))

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
        """Abort while it is prepared, or in the inner engine."""
        for waiting in list(self._waiting):
            if waiting.request.request_id == request_id and waiting.task is not None:
                waiting.is_aborted = True
                waiting.task.cancel()
        await self._engine.abort(request_id)

    async def drain(self) -> None:
        """Wait for requests that are being prepared, then drain the inner engine."""
        await self._none_waits.wait()
        await self._engine.drain()

    async def cleanup(self) -> None:
        """Clean the inner engine up, after the requests that are being prepared."""
        await self.close()
        await self._engine.cleanup()

    async def close(self) -> None:
        """Fail the requests that are being prepared. Idempotent."""
        tasks = [waiting.task for waiting in self._waiting if waiting.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._none_waits.wait()

    def _on_prepared(self, waiting: _Waiting, task: asyncio.Task[GenerateRequest]) -> None:
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
            self._submit(task.result(), waiting.sink)
        except DynamoError as refusal:
            waiting.sink.fail(refusal)

    def _end_waiting(self, waiting: _Waiting) -> None:
        if not waiting.is_aborted:
            waiting.sink.fail(UnavailableError("The engine was shut down.", reason="backend.engine_shutdown"))
            return
        for chunk in OutputBuilder(waiting.request).cancelled():
            waiting.sink.push(chunk)
