"""Every plane over connections refuses, queues and passes over alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import nats
import pytest

from dynamo_core import plugins
from dynamo_core.clock import SystemClock
from dynamo_core.discovery import Instance
from dynamo_core.errors import CapacityExhaustedError, ConfigurationError, DynamoError, UnavailableError
from dynamo_core.ids import EndpointId
from dynamo_core.planes import CallOptions, RequestContext, ResponseSink
from dynamo_core.streams import call_unary
from dynamo_core.telemetry import Metrics
from dynamo_core.testing import FakeClock
from dynamo_runtime._endpoints import call_any, never_began
from dynamo_runtime._plane.nats import SUBJECTS
from dynamo_runtime._plane.options import PlaneOptions

ENDPOINT = EndpointId("test", "backend", "generate")
SCHEMES = ("tcp", "unix", "nats")


class Gate:
    """A handler that answers once the gate is open."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.seen: list[bytes] = []

    async def handle(self, payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        self.seen.append(payload)
        await self.open.wait()
        sink.send(payload)


class Pair:
    """A serving and a calling plane of one scheme."""

    def __init__(self, server: Any, client: Any, address: str, metrics: Metrics) -> None:
        self.server = server
        self.client = client
        self.address = address
        self._metrics = metrics

    def call(self, payload: bytes, **options: Any) -> asyncio.Task[bytes]:
        return asyncio.create_task(call_unary(self.client, self.address, ENDPOINT, payload, CallOptions(**options)))

    def sample(self, name: str, **labels: str) -> float:
        return self._metrics.registry.get_sample_value(f"dynamo_runtime_plane_{name}", labels) or 0.0


@pytest.fixture(params=SCHEMES)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    def url() -> str:
        if request.param == "nats":
            return f"nats://{request.getfixturevalue('shared_nats').host_port}"
        return f"unix://{tmp_path}" if request.param == "unix" else "tcp://127.0.0.1:0"

    @asynccontextmanager
    async def opened(gate: Gate, **options: object) -> AsyncIterator[Pair]:
        metrics = Metrics()
        factory = plugins.load("request_planes", request.param)
        server = factory(url(), clock=SystemClock(), options={**options, "metrics": metrics})
        client = factory(url(), clock=SystemClock(), options={})
        await server.start()
        await client.start()
        try:
            served = await server.serve(ENDPOINT, gate.handle)
            yield Pair(server, client, served.address, metrics)
        finally:
            gate.open.set()
            await client.close()
            await server.close()

    return opened


Opened = Any


async def test_calls_beyond_the_limit_wait_in_order_and_those_beyond_the_queue_are_refused(
    pair: Opened, until: Any
) -> None:
    gate = Gate()
    async with pair(gate, max_calls=1, max_queued_calls=2, max_queue_age_s=60) as planes:
        calls = [planes.call(b"0")]
        await until(lambda: gate.seen == [b"0"])
        for number in (b"1", b"2"):
            calls.append(planes.call(number))
            await until(lambda: planes.sample("queued_calls") == len(calls) - 1)
        with pytest.raises(CapacityExhaustedError) as caught:
            await planes.call(b"3")
        assert caught.value.reason == "capacity.worker_overloaded"
        assert caught.value.migratable
        gate.open.set()
        assert await asyncio.gather(*calls) == [b"0", b"1", b"2"]
        assert gate.seen == [b"0", b"1", b"2"]
        assert planes.sample("faults_total", kind="overloaded") == 1
        await until(lambda: planes.sample("served_calls") == 0)
        assert await planes.call(b"4") == b"4"


async def test_a_call_that_waits_too_long_is_refused_unseen(pair: Opened, until: Any) -> None:
    gate = Gate()
    async with pair(gate, max_calls=1, max_queued_calls=2, max_queue_age_s=0.05) as planes:
        first = planes.call(b"0")
        await until(lambda: gate.seen == [b"0"])
        with pytest.raises(CapacityExhaustedError, match="waited"):
            await planes.call(b"1")
        gate.open.set()
        assert await first == b"0"
        assert gate.seen == [b"0"]


async def test_a_caller_that_leaves_the_queue_is_never_served(pair: Opened, until: Any) -> None:
    gate = Gate()
    async with pair(gate, max_calls=1, max_queued_calls=2, max_queue_age_s=60) as planes:
        first = planes.call(b"0")
        await until(lambda: gate.seen == [b"0"])
        leaving = planes.call(b"1")
        await until(lambda: planes.sample("queued_calls") == 1)
        staying = planes.call(b"2")
        await until(lambda: planes.sample("queued_calls") == 2)
        leaving.cancel()
        await until(lambda: planes.sample("queued_calls") == 1)
        gate.open.set()
        assert await asyncio.gather(first, staying) == [b"0", b"2"]
        assert gate.seen == [b"0", b"2"]


async def test_an_overloaded_and_a_draining_instance_are_passed_over(pair: Opened, until: Any) -> None:
    busy, free, leaving = Gate(), Gate(), Gate()
    free.open.set()
    async with pair(busy, max_calls=1) as full, pair(leaving) as draining, pair(free) as idle:
        running = full.call(b"0")
        await until(lambda: busy.seen)
        held = draining.call(b"0")
        await until(lambda: leaving.seen)
        served = draining.server.table.endpoints()[0]
        drained = asyncio.create_task(served.drain(60))
        await until(lambda: served.draining)
        instances = [Instance(ENDPOINT, number, each.address) for number, each in enumerate((full, draining, idle))]
        assert await call_any(full.client, instances, b"x") == b"x"
        assert free.seen == [b"x"]
        with pytest.raises(UnavailableError):
            await call_any(full.client, instances[:2], b"x")
        busy.open.set()
        leaving.open.set()
        await asyncio.gather(running, held, drained)


class Ear:
    """A receiver that hears when its call ends."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    def on_items(self, items: Any) -> None:
        del items

    def on_end(self, error: DynamoError | None) -> None:
        del error
        self.ended.set()


async def test_a_call_that_is_killed_as_it_arrives_leaves_nothing_behind(pair: Opened, until: Any) -> None:
    gate = Gate()
    async with pair(gate) as planes:
        for _ in range(3):
            # Both frames leave in one write, so the server meets the end before the handler has begun.
            ear = Ear()
            call = await planes.client.open(planes.address, ENDPOINT, b"killed", ear)
            call.cancel(kill=True)
            await ear.ended.wait()
        gate.open.set()
        # It arrives after those before it.
        assert await planes.call(b"x") == b"x"
        await until(lambda: planes.sample("served_calls") == 0)


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("transport.cannot_connect", True),
        ("backend.draining", True),
        ("backend.worker_unavailable", True),
        ("capacity.worker_overloaded", True),
        ("transport.disconnected", False),
        ("backend.engine_shutdown", False),
        ("capacity.slow_reader", False),
        ("request.deadline_exceeded", False),
    ],
)
def test_only_calls_that_no_handler_has_seen_are_made_elsewhere(reason: str, *, expected: bool) -> None:
    assert never_began(DynamoError("x", reason=reason)) is expected


@asynccontextmanager
async def mute(scheme: str, folder: Path, nats_url: str) -> AsyncIterator[tuple[str, list[object]]]:
    """A peer that is there and says nothing; yield its address and who came."""
    came: list[object] = []

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(writer)
        await reader.read()
        writer.close()

    async def note(message: object) -> None:
        came.append(message)

    if scheme == "nats":
        peer = await nats.connect(nats_url)
        await peer.subscribe(f"{SUBJECTS}.mute", cb=note)
        await peer.flush()
        yield f"{nats_url}/mute", came
        await peer.close()
    elif scheme == "unix":
        async with await asyncio.start_unix_server(say_nothing, folder / "mute.sock"):
            yield f"unix://{folder}/mute.sock", came
    else:
        async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as server:
            yield f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}", came


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_an_address_that_does_not_answer_is_left_alone_for_a_while(
    scheme: str, tmp_path: Path, shared_nats: Any
) -> None:
    metrics = Metrics()
    nats_url = f"nats://{shared_nats.host_port}"
    url = {"tcp": "tcp://127.0.0.1:0", "unix": f"unix://{tmp_path}", "nats": nats_url}[scheme]
    options = {"connect_timeout_s": 0.1, "path_retry_interval_s": 60, "metrics": metrics}
    plane = plugins.load("request_planes", scheme)(url, clock=SystemClock(), options=options)
    await plane.start()
    async with mute(scheme, tmp_path, nats_url) as (address, came):
        details: list[str] = []
        for _ in range(3):
            with pytest.raises(UnavailableError) as caught:
                await call_unary(plane, address, ENDPOINT, b"x")
            assert caught.value.reason == "transport.cannot_connect"
            details.append(caught.value.diagnostic)
        assert len(came) == 1
        assert "no answer within" in details[0]
        assert "tried again" in details[2]
        assert metrics.registry.get_sample_value("dynamo_runtime_plane_inhibited_addresses") == 1
        await plane.close()


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_an_address_that_did_not_answer_is_tried_again_after_its_pause(
    scheme: str, tmp_path: Path, shared_nats: Any
) -> None:
    clock = FakeClock()
    nats_url = f"nats://{shared_nats.host_port}"
    url = {"tcp": "tcp://127.0.0.1:0", "unix": f"unix://{tmp_path}", "nats": nats_url}[scheme]
    factory = plugins.load("request_planes", scheme)
    client = factory(url, clock=clock, options={"connect_timeout_s": 3, "path_retry_interval_s": 60})
    await client.start()
    async with mute(scheme, tmp_path, nats_url) as (address, came):
        for attempt in range(2):
            calling = asyncio.create_task(call_unary(client, address, ENDPOINT, b"x"))
            async with asyncio.timeout(20):
                while len(came) <= attempt:
                    await asyncio.sleep(0.005)
            await clock.advance(3.0)
            with pytest.raises(UnavailableError, match="cannot be reached"):
                await calling
            await clock.advance(60.0)
    await client.close()


def test_limits_that_make_no_sense_are_refused() -> None:
    for wrong in ({"max_queued_calls": -1}, {"max_queue_age_s": 0}, {"path_retry_interval_s": 0}):
        with pytest.raises(ConfigurationError):
            PlaneOptions(**wrong)


async def test_a_call_that_crosses_with_an_orderly_close_is_told_of_it(pair: Opened) -> None:
    for turns in range(4):
        gate = Gate()
        gate.open.set()
        async with pair(gate) as planes:
            assert await planes.call(b"first") == b"first"
            crossing = planes.call(b"crossing")
            for _ in range(turns):
                await asyncio.sleep(0)
            await planes.server.close()
            try:
                assert await asyncio.wait_for(crossing, 20) == b"crossing"
            except DynamoError as error:
                # One that was taken in just before is ended by the close, and is told so.
                assert never_began(error) or error.reason == "backend.engine_shutdown", error
