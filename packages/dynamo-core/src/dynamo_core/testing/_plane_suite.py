"""What the tests of request planes share: factories, a recording receiver and small handlers."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import ClassVar

from dynamo_core.errors import (
    DynamoError,
)
from dynamo_core.ids import EndpointId
from dynamo_core.planes import CallOptions, RequestContext, RequestHandler, RequestPlane, ResponseSink, ServedEndpoint
from dynamo_core.streams import StreamBuffer, call_unary
from dynamo_core.testing._suite import ConformanceSuite

ENDPOINT = EndpointId("conformance", "backend", "generate")


class RecordingReceiver:
    """A receiver that keeps everything it is told, and fails if it is told anything after the end."""

    def __init__(self) -> None:
        self.batches: list[list[bytes]] = []
        self.ended = asyncio.Event()
        self.error: DynamoError | None = None
        self._news = asyncio.Event()

    @property
    def items(self) -> list[bytes]:
        """All items in order."""
        return [item for batch in self.batches for item in batch]

    def on_items(self, items: Sequence[bytes]) -> None:
        """Keep a batch."""
        assert not self.ended.is_set(), "items after the end"
        assert items, "an empty batch"
        self.batches.append([bytes(item) for item in items])
        self._news.set()

    def on_end(self, error: DynamoError | None) -> None:
        """Keep the end."""
        assert not self.ended.is_set(), "a second end"
        self.error = error
        self.ended.set()

    async def wait_items(self, count: int) -> None:
        """Return once ``count`` items have come in all."""
        while len(self.items) < count:
            self._news.clear()
            await self._news.wait()


class PlaneSuite(ConformanceSuite):
    """Factories that both suites of the request plane share."""

    max_payload_bytes: ClassVar[int | None] = None

    @abstractmethod
    async def make_plane(self) -> RequestPlane:
        """Return a new plane, not started, that reaches the other planes of this test; called up to twice."""
        ...

    @abstractmethod
    def unreachable_address(self) -> str:
        """Return an address of this plane's scheme that nobody serves."""
        ...

    @asynccontextmanager
    async def serving(
        self, handler: RequestHandler, *, schema: str = ""
    ) -> AsyncGenerator[tuple[RequestPlane, ServedEndpoint]]:
        """Serve a handler on one plane; yield another plane, to call from, and the endpoint."""
        async with self.running(await self.make_plane(), await self.make_plane()) as (server, client):
            yield client, await server.serve(ENDPOINT, handler, schema=schema)

    async def refusal(
        self, plane: RequestPlane, address: str, *, endpoint: EndpointId = ENDPOINT, options: CallOptions | None = None
    ) -> DynamoError:
        """Open a call that must be refused; return why, whether ``open`` raised it or the call ended with it."""
        receiver = RecordingReceiver()
        try:
            await plane.open(address, endpoint, b"", receiver, options or CallOptions())
        except DynamoError as error:
            return error
        await self.within(receiver.ended.wait())
        assert receiver.items == []
        assert receiver.error is not None
        return receiver.error


async def echo(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
    """Answer with the payload."""
    sink.send(payload)


async def count(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
    """Send that many items at once."""
    for i in range(int(payload)):
        sink.send(b"%d" % i)


async def patient_count(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
    """Send that many items, each once there is credit."""
    for i in range(int(payload)):
        await sink.wait_credit()
        if context.stopped:
            return
        sink.send(b"%d" % i)


async def forever(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
    """Never answer."""
    await asyncio.Event().wait()


async def collect(stream: StreamBuffer) -> list[bytes]:
    """Read a stream to its end."""
    return [item async for item in stream]


async def unary(plane: RequestPlane, served: ServedEndpoint, payload: bytes) -> bytes:
    """Call for one item."""
    return await call_unary(plane, served.address, ENDPOINT, payload)
