"""Conformance of request planes: the ways a call ends."""

from __future__ import annotations

import asyncio

from dynamo_core.errors import (
    CancelledRequestError,
    CapacityExhaustedError,
    DeadlineExceededError,
    InternalError,
    UnavailableError,
)
from dynamo_core.planes import CallOptions, RequestContext, ResponseSink
from dynamo_core.streams import open_stream
from dynamo_core.testing._plane_suite import (
    ENDPOINT,
    PlaneSuite,
    RecordingReceiver,
    forever,
    patient_count,
    unary,
)


class PlaneEnds(PlaneSuite, suite=True):
    """How calls end: errors, cancellation, deadlines, draining and loss."""

    async def test_typed_error_arrives_with_its_causes(self) -> None:
        async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
            sink.send(b"before")
            cause = UnavailableError("lost", reason="backend.disconnected", diagnostic="socket 7")
            raise CapacityExhaustedError("busy", param="n", retry_after_s=1.5, diagnostic="queue") from cause

        async with self.serving(handler) as (client, served):
            receiver = RecordingReceiver()
            await client.open(served.address, ENDPOINT, b"", receiver)
            await self.within(receiver.ended.wait())
            error = receiver.error
            assert receiver.items == [b"before"]
            assert isinstance(error, CapacityExhaustedError)
            assert (error.message, error.param, error.retry_after_s) == ("busy", "n", 1.5)
            cause = error.__cause__
            assert isinstance(cause, UnavailableError)
            assert (cause.reason, cause.diagnostic) == ("backend.disconnected", "socket 7")

    async def test_untyped_error_arrives_as_internal(self) -> None:
        async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
            raise ValueError("secret detail")

        async with self.serving(handler) as (client, served):
            error = await self.refusal(client, served.address)
            assert isinstance(error, InternalError)
            assert "secret detail" not in error.message
            assert not error.migratable

    async def test_soft_cancel_lets_the_handler_finish(self) -> None:
        calls: list[str] = []
        started = asyncio.Event()

        async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
            assert not context.stopped
            context.on_stop(lambda: calls.append("early"))
            started.set()
            await context.wait_stopped()
            context.on_stop(lambda: calls.append("late"))
            assert context.stopped
            sink.send(b"last words")

        async with self.serving(handler) as (client, served):
            receiver = RecordingReceiver()
            call = await client.open(served.address, ENDPOINT, b"", receiver)
            await self.within(started.wait())
            call.cancel()
            call.cancel()
            await self.within(receiver.ended.wait())
            assert receiver.items == [b"last words"]
            assert receiver.error is None
            assert calls == ["early", "late"]

    async def test_cancel_wakes_a_handler_that_waits_for_credit(self) -> None:
        async with self.serving(patient_count) as (client, served):
            receiver = RecordingReceiver()
            call = await client.open(served.address, ENDPOINT, b"5", receiver, CallOptions(credit_items=1))
            await self.within(receiver.wait_items(1))
            call.cancel()
            await self.within(receiver.ended.wait())
            assert receiver.error is None

    async def test_kill_ends_the_call_and_cancels_the_handler(self) -> None:
        started, cancelled = asyncio.Event(), asyncio.Event()

        async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
            started.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.set()
                raise

        async with self.serving(handler) as (client, served):
            receiver = RecordingReceiver()
            call = await client.open(served.address, ENDPOINT, b"", receiver)
            await self.within(started.wait())
            call.cancel(kill=True)
            await self.within(asyncio.gather(receiver.ended.wait(), cancelled.wait()))
            assert isinstance(receiver.error, CancelledRequestError)
            assert not receiver.error.migratable

    async def test_leaving_a_stream_kills_the_call(self) -> None:
        cancelled = asyncio.Event()

        async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
            sink.send(b"x")
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        async with self.serving(handler) as (client, served):
            async with await open_stream(client, served.address, ENDPOINT, b"") as stream:
                assert await self.within(stream.receive()) == [b"x"]
            await self.within(cancelled.wait())
            await self.until(lambda: served.in_flight == 0)

    async def test_deadline_ends_the_call_and_stops_the_handler(self) -> None:
        stopped = asyncio.Event()
        remaining: list[float | None] = []

        async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
            remaining.append(context.remaining_s())
            await context.wait_stopped()
            stopped.set()
            sink.send(b"too late")

        async with self.serving(handler) as (client, served):
            receiver = RecordingReceiver()
            await client.open(served.address, ENDPOINT, b"", receiver, CallOptions(deadline_s=0.2))
            await self.within(asyncio.gather(receiver.ended.wait(), stopped.wait()))
            assert isinstance(receiver.error, DeadlineExceededError)
            assert receiver.items == []
            assert remaining[0] is not None
            assert 0 < remaining[0] <= 0.2

    async def test_call_without_deadline_has_no_remaining_time(self) -> None:
        async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
            sink.send(repr(context.remaining_s()).encode())

        async with self.serving(handler) as (client, served):
            assert await self.within(unary(client, served, b"")) == b"None"

    async def test_drain_refuses_new_calls_and_waits_for_running_ones(self) -> None:
        started, release = asyncio.Event(), asyncio.Event()

        async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
            started.set()
            await release.wait()
            sink.send(b"done")

        async with self.serving(handler) as (client, served):
            receiver = RecordingReceiver()
            await client.open(served.address, ENDPOINT, b"", receiver)
            await self.within(started.wait())
            assert served.in_flight == 1
            draining = asyncio.create_task(served.drain(self.patience_s))
            await asyncio.sleep(0)
            error = await self.refusal(client, served.address)
            assert (type(error), error.reason) == (UnavailableError, "backend.draining")
            assert error.migratable
            release.set()
            assert await self.within(draining)
            await self.within(receiver.ended.wait())
            assert receiver.items == [b"done"]
            assert served.in_flight == 0

    async def test_drain_gives_up_in_time(self) -> None:
        async with self.serving(forever) as (client, served):
            await client.open(served.address, ENDPOINT, b"", RecordingReceiver())
            await self.until(lambda: served.in_flight == 1)
            assert not await self.within(served.drain(0.05))

    async def test_closing_an_endpoint_ends_its_calls_as_migratable(self) -> None:
        async with self.serving(forever) as (client, served):
            receiver = RecordingReceiver()
            await client.open(served.address, ENDPOINT, b"", receiver)
            await self.until(lambda: served.in_flight == 1)
            await self.within(served.close())
            await self.within(served.close())
            await self.within(receiver.ended.wait())
            assert isinstance(receiver.error, UnavailableError)
            assert receiver.error.reason == "backend.engine_shutdown"
            assert receiver.error.migratable

    async def test_closing_the_server_ends_its_calls_as_migratable(self) -> None:
        async with self.running(await self.make_plane(), await self.make_plane()) as (server, client):
            served = await server.serve(ENDPOINT, forever)
            receiver = RecordingReceiver()
            await client.open(served.address, ENDPOINT, b"", receiver)
            await self.until(lambda: served.in_flight == 1)
            await self.within(server.close())
            await self.within(server.close())
            await self.within(receiver.ended.wait())
            assert receiver.error is not None
            assert receiver.error.migratable

    async def test_closing_the_caller_stops_its_handlers(self) -> None:
        stopped = asyncio.Event()

        async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
            sink.send(b"x")
            context.on_stop(stopped.set)
            await context.wait_stopped()

        async with self.serving(handler) as (client, served):
            receiver = RecordingReceiver()
            await client.open(served.address, ENDPOINT, b"", receiver)
            await self.within(receiver.wait_items(1))
            await self.within(client.close())
            await self.within(asyncio.gather(stopped.wait(), receiver.ended.wait()))
            assert receiver.error is not None
            await self.until(lambda: served.in_flight == 0)

    async def test_cancelled_wait_kills_the_call(self) -> None:
        started, cancelled = asyncio.Event(), asyncio.Event()

        async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
            started.set()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        async with self.serving(handler) as (client, served):
            waiting = asyncio.create_task(unary(client, served, b""))
            await self.within(started.wait())
            waiting.cancel()
            await self.within(cancelled.wait())
