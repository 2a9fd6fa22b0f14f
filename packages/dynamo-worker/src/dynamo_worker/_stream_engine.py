"""The part of the engine contract that every adapter of a streaming library or server has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator

from dynamo_core.engine import ChunkSink
from dynamo_core.planes import RequestContext
from dynamo_core.requests import GenerateChunk, GenerateRequest
from dynamo_worker._output_builder import OutputBuilder
from dynamo_worker._request_tasks import RequestTasks


class StreamEngine(ABC):
    """An engine whose every request is a stream of its own: what a request goes through but for the stream itself."""

    def __init__(self) -> None:
        self._tasks = RequestTasks(self._stream)

    def submit(self, request: GenerateRequest, sink: ChunkSink) -> None:
        """Accept a request whose chunks are pushed; raises as ``generate``."""
        self._require_servable(request)
        self._tasks.submit(request, sink)

    async def generate(self, request: GenerateRequest, context: RequestContext) -> AsyncIterator[GenerateChunk]:
        """Yield chunks as they come; stopping the context or closing the iterator aborts the request in the engine.

        Raises:
            InvalidRequestError: for a request that the engine cannot serve.
            DynamoError: what the engine ended the request with, by its class.
            UnavailableError: if the engine drains, has stopped, or is lost.
        """
        self._require_servable(request)
        async for chunk in self._tasks.generate(request, context):
            yield chunk

    async def abort(self, request_id: str) -> None:
        """End a request, here and in the engine; unknown ids are ignored."""
        self._tasks.abort(request_id)

    async def drain(self) -> None:
        """Finish what runs, refuse what is new. Cancelling it ends the wait alone."""
        await self._tasks.drain()

    @abstractmethod
    def _stream(self, request: GenerateRequest, output: OutputBuilder) -> AsyncIterator[GenerateChunk]:
        """Yield the chunks of one request; cancelling it must free what the request holds in the engine."""

    @abstractmethod
    def _require_servable(self, request: GenerateRequest) -> None:
        """Check a request before it starts.

        Raises:
            InvalidRequestError: naming the field and the remedy.
            UnavailableError: if the engine is not started.
        """
