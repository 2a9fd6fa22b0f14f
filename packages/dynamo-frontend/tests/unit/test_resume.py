"""Streams that a client comes back to: exactly the missing events, from the same generation."""

import asyncio
import json
import re

import pytest

from dynamo_core.telemetry import Metrics
from dynamo_core.testing import FakeClock
from dynamo_frontend._http.request import HttpRequest
from dynamo_frontend._http.response import HttpResponse
from dynamo_frontend._metrics import ResumeMetrics
from dynamo_frontend._resume.ring import EventRing
from dynamo_frontend._resume.streams import ResumableStreams, ResumeLimits

TEXT = "The capital of Japan is Tokyo."
MESSAGES = [{"role": "user", "content": "Hello"}]
ASK = {"x-dynamo-stream-resume": "true", "x-request-id": "r1"}
REQUESTS = {
    "/v1/chat/completions": {"messages": MESSAGES, "stream_options": {"include_usage": True}},
    "/v1/completions": {"prompt": "Hello", "max_tokens": 100},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 100},
    "/v1/responses": {"input": "Hello"},
    "/inference/v1/generate": {"token_ids": [5, 6], "sampling_params": {"temperature": 0, "max_tokens": 100}},
}
_TIME = re.compile(rb'"created(?:_at)?":[0-9]+')


def body_of(path):
    greedy = {} if path.endswith("/generate") else {"temperature": 0}
    return {"model": "tiny", "stream": True, **greedy, **REQUESTS[path]}


def parts(body):
    """Every event as (number, what follows the id line); comments left out."""
    found = []
    for event in bytes(body).split(b"\n\n")[:-1]:
        match = re.match(rb"id: [\w-]{16}\.([0-9]+)\n", event)
        if match:
            found.append((int(match[1]), _TIME.sub(b"", event[match.end() :])))
    return found


def last_id(body, number):
    return re.search(rb"id: ([\w-]{16}\.%d)\n" % number, bytes(body))[1].decode()


async def open_stream(stack, request_bytes, path, headers=ASK):
    transport = stack.connect()
    data = json.dumps(body_of(path)).encode()
    transport.protocol.data_received(request_bytes("POST", path, data, headers))
    return transport


async def resume(stack, path, event_id, **headers):
    return await stack.post(path, body_of(path), {"last-event-id": event_id, **headers})


@pytest.mark.parametrize("path", REQUESTS)
async def test_cut_at_every_event(stack, request_bytes, path):
    stack.say(TEXT)
    await stack.start()
    whole = await stack.post(path, body_of(path), ASK)
    expected = parts(whole.body)
    assert [number for number, _ in expected] == list(range(1, len(expected) + 1))
    assert len(expected) > 6
    for count in range(1, len(expected)):
        stack.script.requests.clear()
        transport = await open_stream(stack, request_bytes, path)
        await transport.wait(lambda sent=transport, least=count: len(parts(sent._body)) >= least)
        event_id = last_id(transport._body, count)
        transport.abort()
        rest = await resume(stack, path, event_id)
        assert parts(rest.body) == expected[count:], f"cut after event {count}"
        assert len(stack.script.requests) == 1, "a second generation was started"
        assert rest.headers["x-request-id"] == "r1"
    shown = (await stack.get("/metrics")).body.decode()
    assert f'dynamo_frontend_stream_resumes_total{{outcome="resumed"}} {len(expected) - 1}.0' in shown


async def test_a_stream_can_be_resumed_again_and_after_its_end(stack, request_bytes):
    stack.say(TEXT)
    await stack.start()
    whole = await stack.post("/v1/completions", body_of("/v1/completions"), ASK)
    event_id = last_id(whole.body, 2)
    for _ in range(2):
        rest = await resume(stack, "/v1/completions", event_id)
        assert parts(rest.body) == parts(whole.body)[2:]


async def test_it_goes_on_while_nobody_is_there_and_moves_to_a_new_connection(stack, request_bytes):
    stack.say(TEXT)
    gate = asyncio.Event()

    async def wait(request):
        await gate.wait()

    await stack.start(sse_keep_alive_s=0.001)
    stack.script.before = wait
    transport = await open_stream(stack, request_bytes, "/v1/completions")
    async with asyncio.timeout(20):
        while not transport.written:
            await asyncio.sleep(0)
            transport.protocol.check_time(stack.context.clock.monotonic() + 1)
    assert b"id: " not in transport._body, "a sign of life is no event"
    transport.abort()
    gate.set()
    async with asyncio.timeout(20):
        while stack.script.sent < len(stack.script.output):
            await asyncio.sleep(0)
    assert stack.script.stopped == 0


async def test_a_stream_whose_first_token_took_long_can_be_resumed(stack, request_bytes):
    stack.say(TEXT)
    gate = asyncio.Event()

    async def wait(request):
        await gate.wait()

    await stack.start()
    stack.script.before = wait
    transport = await open_stream(stack, request_bytes, "/v1/completions")
    async with asyncio.timeout(20):
        while stack.frontend._streams._work or not stack.script.requests:
            await asyncio.sleep(0)
    gate.set()
    await transport.wait(lambda: bool(transport.replies))
    rest = await resume(stack, "/v1/completions", last_id(transport.replies[0].body, 2))
    assert parts(rest.body) == parts(transport.replies[0].body)[2:]


async def test_the_newest_connection_wins(stack, request_bytes):
    stack.say(TEXT * 20)
    await stack.start()
    first = await open_stream(stack, request_bytes, "/v1/completions")
    await first.wait(lambda: len(parts(first._body)) >= 3)
    rest = await resume(stack, "/v1/completions", last_id(first._body, 3))
    assert first.aborted
    assert parts(rest.body)[0][0] == 4
    assert rest.body.endswith(b"data: [DONE]\n\n")


async def test_without_asking_nothing_changes(stack, request_bytes):
    stack.say(TEXT)
    await stack.start()
    reply = await stack.post("/v1/completions", body_of("/v1/completions"))
    assert b"id: " not in reply.body
    transport = await open_stream(stack, request_bytes, "/v1/completions", {})
    await transport.wait(lambda: b"data:" in transport._body)
    transport.abort()
    async with asyncio.timeout(20):
        while not stack.script.stopped:
            await asyncio.sleep(0)


async def test_all_streams_can_be_made_resumable(stack):
    stack.say(TEXT)
    await stack.start(stream_resume=True)
    assert parts((await stack.chat(stream=True)).body)
    whole = await stack.chat()
    assert whole.json["choices"][0]["message"]["content"] == TEXT


async def test_time_runs_out_and_the_worker_is_stopped(stack, request_bytes):
    stack.say(TEXT * 50)
    await stack.start(stream_grace_s=0.01)
    transport = await open_stream(stack, request_bytes, "/v1/messages")
    await transport.wait(lambda: len(parts(transport._body)) >= 3)
    event_id = last_id(transport._body, 3)
    transport.abort()
    async with asyncio.timeout(20):
        while stack.frontend._streams._streams:
            await asyncio.sleep(0)
    reply = await resume(stack, "/v1/messages", event_id)
    assert reply.status == 404
    assert reply.json["error"]["type"] == "not_found_error", "in the API's own form"


@pytest.mark.parametrize("event_id", ["x", "0123456789abcdef.1", "0123456789abcdef.99999999999999999999"])
async def test_unknown_ids_are_refused(stack, event_id):
    await stack.start()
    reply = await resume(stack, "/v1/chat/completions", event_id)
    assert (reply.status, reply.json["error"]["code"]) == (404, "stream.expired")
    assert reply.json["error"]["param"] == "Last-Event-ID"


async def test_only_who_began_a_stream_can_resume_it(stack, request_bytes):
    stack.say(TEXT)
    await stack.start()
    mine = {**ASK, "authorization": "Bearer mine"}
    whole = await stack.post("/v1/completions", body_of("/v1/completions"), mine)
    event_id = last_id(whole.body, 2)
    assert (await resume(stack, "/v1/completions", event_id)).status == 404
    assert (await resume(stack, "/v1/chat/completions", event_id, authorization="Bearer mine")).status == 404
    assert (await resume(stack, "/v1/completions", event_id, authorization="Bearer mine")).status == 200
    beyond = event_id.partition(".")[0] + ".999"
    assert (await resume(stack, "/v1/completions", beyond, authorization="Bearer mine")).status == 404


async def test_an_error_before_the_stream_is_an_error(stack):
    await stack.start()
    reply = await stack.post("/v1/completions", {**body_of("/v1/completions"), "temperature": 9}, ASK)
    assert (reply.status, reply.json["error"]["param"]) == (400, "temperature")


def test_ring_keeps_the_newest():
    ring = EventRing(10)
    for number in range(1, 6):
        ring.add(b"%d..." % number)
    assert (ring.first, ring.last, ring.size_bytes) == (4, 5, 8)
    assert ring.after(3) == [b"4...", b"5..."]
    assert ring.after(5) == []
    assert ring.after(2) is None
    assert ring.after(6) is None
    ring.add(b"longer than the ring")
    assert ring.after(5) == [b"longer than the ring"]


class Wire:
    """A connection that records."""

    def __init__(self):
        self.closed = self.paused = self.done = False
        self.out = b""

    def write(self, data):
        self.out += data

    def write_body(self, data, *, chunked):
        self.out += data

    def write_last_chunk(self):
        pass

    def response_done(self, response):
        self.done = True

    def abort(self):
        self.closed = True


class Deployment:
    """Streams of a handler that the test drives."""

    def __init__(self, **limits):
        self.clock = FakeClock()
        self.metrics = Metrics()
        self.streams = ResumableStreams(ResumeLimits(always=True, **limits), self.clock, ResumeMetrics(self.metrics))
        self.producers = []
        self.disconnects = 0
        self.handle = self.streams.resumable(self._handle)

    async def _handle(self, request, response):
        response.on_disconnect(self._left)
        response.start(200, "text/event-stream")
        self.producers.append(response)

    def _left(self):
        self.disconnects += 1

    async def open(self):
        wire = Wire()
        response = HttpResponse(wire, head_only=False, chunked=True, keep_alive=True)
        await self.handle(HttpRequest("POST", "/x"), response)
        return wire, response

    def value(self, name):
        return self.metrics.registry.get_sample_value(name)


async def test_memory_of_all_streams_is_bounded():
    deployment = Deployment(stream_bytes=4000, total_bytes=12_000)
    for _ in range(5):
        _, response = await deployment.open()
        deployment.producers[-1].write(b"data: %s\n\n" % (b"x" * 3000))
        response.notify_disconnect()
        assert deployment.value("dynamo_frontend_replay_bytes") <= 12_000
    assert deployment.disconnects == 3, "the oldest were given up"
    assert deployment.value("dynamo_frontend_resumable_streams") == 2
    assert deployment.value("dynamo_frontend_abandoned_streams_total") == 3
    await deployment.streams.close()
    assert deployment.disconnects == 5
    assert deployment.value("dynamo_frontend_replay_bytes") == 0 or not deployment.streams._streams


async def test_a_stream_without_a_client_waits_when_its_share_is_full():
    deployment = Deployment(stream_bytes=4000)
    _, response = await deployment.open()
    producer = deployment.producers[0]
    response.notify_disconnect()
    assert producer.writable
    producer.write(b"data: %s\n\n" % (b"x" * 2100))
    assert not producer.writable
    resumed = []
    producer.on_drain(lambda: resumed.append(producer.writable))
    wire = Wire()
    again = HttpResponse(wire, head_only=False, chunked=True, keep_alive=True)
    deployment.handle(HttpRequest("POST", "/x", headers={"last-event-id": f"{producer.token}.0"}), again)
    assert resumed == [True]
    assert wire.out.count(b"id: ") == 1
    await deployment.streams.close()


async def test_grace_begins_with_each_loss_and_ends_by_the_clock():
    deployment = Deployment(grace_s=10.0)
    _, response = await deployment.open()
    producer = deployment.producers[0]
    response.notify_disconnect()
    await deployment.clock.advance(9.0)
    assert not deployment.disconnects
    again = HttpResponse(Wire(), head_only=False, chunked=True, keep_alive=True)
    deployment.handle(HttpRequest("POST", "/x", headers={"last-event-id": f"{producer.token}.0"}), again)
    await deployment.clock.advance(20.0)
    assert not deployment.disconnects, "a stream with a client has no end of time"
    again.notify_disconnect()
    await deployment.clock.advance(9.0)
    assert not deployment.disconnects
    await deployment.clock.advance(1.5)
    assert deployment.disconnects == 1
    assert producer.disconnected
    assert deployment.value("dynamo_frontend_resumable_streams") == 0
    await deployment.streams.close()


async def test_an_ended_stream_is_forgotten_and_nothing_is_told_to_its_handler():
    deployment = Deployment(grace_s=10.0)
    wire, _ = await deployment.open()
    deployment.producers[0].write(b"data: 1\n\n")
    deployment.producers[0].end()
    assert wire.done
    assert deployment.value("dynamo_frontend_resumable_streams") == 1
    await deployment.clock.advance(11.0)
    assert deployment.value("dynamo_frontend_resumable_streams") == 0
    assert deployment.disconnects == 0
    assert deployment.value("dynamo_frontend_abandoned_streams_total") == 0
    await deployment.streams.close()
