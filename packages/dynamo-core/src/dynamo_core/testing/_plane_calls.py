"""Conformance of request planes: calls, items and credit."""

from __future__ import annotations

import asyncio

import pytest

from dynamo_core.errors import (
    InvalidRequestError,
    NotFoundError,
    PayloadTooLargeError,
    UnavailableError,
)
from dynamo_core.ids import EndpointId
from dynamo_core.planes import CallOptions, RequestContext, ResponseSink
from dynamo_core.streams import call_unary, open_stream
from dynamo_core.testing._plane_suite import (
    ENDPOINT,
    PlaneSuite,
    RecordingReceiver,
    collect,
    count,
    echo,
    patient_count,
    unary,
)


class PlaneCalls(PlaneSuite, suite=True):
    """Calls, their items and their credit."""

    async def test_items_come_in_order_and_end_cleanly(self) -> None:
        async with self.serving(count) as (client, served):
            stream = await open_stream(client, served.address, ENDPOINT, b"100")
            assert await self.within(collect(stream)) == [b"%d" % i for i in range(100)]

    async def test_end_comes_once_and_last(self) -> None:
        async with self.serving(count) as (client, served):
            receiver = RecordingReceiver()
            call = await client.open(served.address, ENDPOINT, b"3", receiver)
            await self.within(receiver.ended.wait())
            call.cancel()
            call.cancel(kill=True)
            call.grant(5)
            assert await self.within(unary(client, served, b"1")) == b"0"
            assert receiver.items == [b"0", b"1", b"2"]
            assert receiver.error is None

    async def test_call_without_items_ends_cleanly(self) -> None:
        async with self.serving(count) as (client, served):
            receiver = RecordingReceiver()
            await client.open(served.address, ENDPOINT, b"0", receiver)
            await self.within(receiver.ended.wait())
            assert (receiver.items, receiver.error) == ([], None)

    async def test_items_of_one_tick_come_together(self) -> None:
        async with self.serving(count) as (client, served):
            receiver = RecordingReceiver()
            await client.open(served.address, ENDPOINT, b"64", receiver)
            await self.within(receiver.ended.wait())
            assert len(receiver.items) == 64
            assert len(receiver.batches) < 64

    @pytest.mark.parametrize("size", [0, 1, 65_535, 1 << 20])
    async def test_payload_and_item_are_kept_whole(self, size: int) -> None:
        payload = (bytes(range(256)) * (size // 256 + 1))[:size]
        async with self.serving(echo) as (client, served):
            assert await self.within(unary(client, served, payload)) == payload

    async def test_payload_over_the_limit_is_refused(self) -> None:
        if self.max_payload_bytes is None:
            return
        async with self.serving(echo) as (client, served):
            receiver = RecordingReceiver()
            with pytest.raises(PayloadTooLargeError):
                await client.open(served.address, ENDPOINT, bytes(self.max_payload_bytes + 1), receiver)
            assert await self.within(unary(client, served, b"still there")) == b"still there"
            assert not receiver.ended.is_set()

    async def test_request_id_and_headers_arrive(self) -> None:
        seen: list[tuple[str, dict[str, str]]] = []

        async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
            seen.append((context.request_id, dict(context.headers)))
            sink.send(b"")

        options = CallOptions(request_id="r-1", headers={"traceparent": "00-1-2-01", "x": "é"})
        async with self.serving(handler) as (client, served):
            await self.within(call_unary(client, served.address, ENDPOINT, b"", options))
            await self.within(unary(client, served, b""))
        assert seen[0] == ("r-1", {"traceparent": "00-1-2-01", "x": "é"})
        assert seen[1][1] == {}

    async def test_concurrent_calls_do_not_mix(self) -> None:
        async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
            for i in range(10):
                sink.send(payload + b":%d" % i)
                await asyncio.sleep(0)

        async with self.serving(handler) as (client, served):
            streams = [await open_stream(client, served.address, ENDPOINT, b"%d" % n) for n in range(50)]
            found = await self.within(asyncio.gather(*(collect(stream) for stream in streams)))
            assert found == [[b"%d:%d" % (n, i) for i in range(10)] for n in range(50)]

    async def test_one_plane_serves_several_endpoints(self) -> None:
        other = EndpointId("conformance", "backend", "other")

        async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
            sink.send(b"other")

        async with self.running(await self.make_plane(), await self.make_plane()) as (server, client):
            first = await server.serve(ENDPOINT, echo)
            second = await server.serve(other, handler)
            assert await self.within(unary(client, first, b"echo")) == b"echo"
            assert await self.within(call_unary(client, second.address, other, b"")) == b"other"
            await first.close()
            assert await self.within(call_unary(client, second.address, other, b"")) == b"other"

    async def test_plane_can_call_itself(self) -> None:
        async with self.running(await self.make_plane()) as (plane,):
            served = await plane.serve(ENDPOINT, echo)
            assert await self.within(unary(plane, served, b"x")) == b"x"

    async def test_credit_holds_a_patient_handler(self) -> None:
        blocked, credits = asyncio.Event(), list[int]()

        async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
            for i in range(8):
                if sink.credit <= 0:
                    credits.append(i)
                    blocked.set()
                await sink.wait_credit()
                sink.send(b"%d" % i)

        async with self.serving(handler) as (client, served):
            receiver = RecordingReceiver()
            call = await client.open(served.address, ENDPOINT, b"", receiver, CallOptions(credit_items=3))
            await self.within(asyncio.gather(blocked.wait(), receiver.wait_items(3)))
            blocked.clear()
            call.grant(2)
            await self.within(asyncio.gather(blocked.wait(), receiver.wait_items(5)))
            assert not receiver.ended.is_set()
            call.grant(100)
            await self.within(receiver.ended.wait())
            assert credits == [3, 5]
            assert receiver.items == [b"%d" % i for i in range(8)]

    async def test_call_without_credit_does_not_hold_another(self) -> None:
        async with self.serving(patient_count) as (client, served):
            held = RecordingReceiver()
            call = await client.open(served.address, ENDPOINT, b"5", held, CallOptions(credit_items=1))
            await self.within(held.wait_items(1))
            stream = await open_stream(client, served.address, ENDPOINT, b"20")
            assert len(await self.within(collect(stream))) == 20
            assert len(held.items) == 1
            call.cancel(kill=True)

    async def test_reader_grants_what_it_consumes(self) -> None:
        async with self.serving(patient_count) as (client, served):
            options = CallOptions(credit_items=2)
            stream = await open_stream(client, served.address, ENDPOINT, b"50", options)
            assert len(await self.within(collect(stream))) == 50

    async def test_impatient_handler_goes_into_debt(self) -> None:
        found: list[int] = []

        async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
            for _ in range(5):
                sink.send(b"x")
            found.append(sink.credit)

        async with self.serving(handler) as (client, served):
            receiver = RecordingReceiver()
            await client.open(served.address, ENDPOINT, b"", receiver, CallOptions(credit_items=2))
            await self.within(receiver.ended.wait())
            assert found == [-3]
            assert len(receiver.items) == 5

    async def test_items_sent_after_the_handler_returned_are_dropped(self) -> None:
        sinks: list[ResponseSink] = []

        async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
            sinks.append(sink)
            sink.send(b"in time")

        async with self.serving(handler) as (client, served):
            receiver = RecordingReceiver()
            await client.open(served.address, ENDPOINT, b"", receiver)
            await self.within(receiver.ended.wait())
            sinks[0].send(b"late")
            await self.within(sinks[0].wait_credit())
            assert await self.within(unary(client, served, b"")) == b"in time"
            assert receiver.items == [b"in time"]

    async def test_unreachable_address_raises(self) -> None:
        async with self.running(await self.make_plane()) as (plane,):
            receiver = RecordingReceiver()
            with pytest.raises(UnavailableError) as caught:
                await self.within(plane.open(self.unreachable_address(), ENDPOINT, b"", receiver))
            assert caught.value.reason == "transport.cannot_connect"
            assert caught.value.migratable
            assert not receiver.ended.is_set()

    async def test_endpoint_that_is_not_served_is_refused(self) -> None:
        async with self.serving(echo) as (client, served):
            error = await self.refusal(client, served.address, endpoint=EndpointId("conformance", "backend", "absent"))
            assert isinstance(error, UnavailableError | NotFoundError)

    async def test_schema_is_checked(self) -> None:
        async with self.serving(echo, schema="dynamo.a.v1") as (client, served):
            error = await self.refusal(client, served.address, options=CallOptions(schema="dynamo.b.v1"))
            assert isinstance(error, InvalidRequestError)
            assert "dynamo.a.v1" in error.message
            for schema in ("dynamo.a.v1", ""):
                options = CallOptions(schema=schema)
                assert await self.within(call_unary(client, served.address, ENDPOINT, b"x", options)) == b"x"
