"""What a caller of ``generate`` sees, for good engines and for every kind of bad one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dynamo_core.component import Health
from dynamo_core.engine import ChunkSink, EngineConfig, EngineContext
from dynamo_core.enums import FinishReason, HealthState
from dynamo_core.errors import (
    BackendProtocolError,
    CancelledRequestError,
    DeadlineExceededError,
    DynamoError,
    InternalError,
    InvalidRequestError,
    UnavailableError,
)
from dynamo_core.requests import GenerateChunk, GenerateRequest, SamplingOptions, Usage
from dynamo_core.tokens import PackedTokens, pack_tokens


def count_to(number: int) -> Any:
    def script(request: GenerateRequest, sink: ChunkSink) -> None:
        start = request.accepted_tokens
        for index in range(start, number):
            sink.push(GenerateChunk(pack_tokens([100 + index]), index))
        sink.push(GenerateChunk(first_index=number, finish_reason=FinishReason.LENGTH))

    return script


async def test_tokens_arrive_in_order_with_usage_filled_in(process: Any, kit: Any) -> None:
    await process.worker(kit.ScriptedEngine(count_to(4)))
    reply = await process.ask(kit.request())
    assert reply.error is None
    assert reply.tokens == [100, 101, 102, 103]
    assert reply.finish is FinishReason.LENGTH
    assert reply.chunks[-1].usage == Usage(prompt_tokens=3, completion_tokens=4)


async def test_a_continuation_counts_from_the_accepted_tokens(process: Any, kit: Any) -> None:
    await process.worker(kit.ScriptedEngine(count_to(4)))
    reply = await process.ask(kit.request(prompt=[1, 2, 3, 100, 101], prompt_tokens=3, attempt=1))
    assert reply.tokens == [102, 103]
    assert [chunk.first_index for chunk in reply.chunks] == [2, 3, 4]
    assert {chunk.attempt for chunk in reply.chunks} == {1}
    assert reply.chunks[-1].usage == Usage(prompt_tokens=3, completion_tokens=4)


async def test_each_choice_has_its_own_place(process: Any, kit: Any) -> None:
    engine = kit.ScriptedEngine()
    await process.worker(engine)
    reply = await process.open(kit.request(sampling=SamplingOptions(n=2)))
    engine.push("r1", 5, 0, choice=1)
    engine.push("r1", 6, 0, choice=0)
    engine.sinks["r1"].push(GenerateChunk(first_index=1, choice=1, finish_reason=FinishReason.STOP))
    await process.clock.settle()
    assert not reply.done.is_set()
    engine.sinks["r1"].push(GenerateChunk(first_index=1, choice=0, finish_reason=FinishReason.EOS))
    await reply.done.wait()
    assert (reply.of_choice(0), reply.of_choice(1)) == ([6], [5])
    assert [chunk.usage for chunk in reply.chunks[:-1]] == [None] * 3


GARBAGE: dict[str, Any] = {
    "negative id": GenerateChunk(PackedTokens((-1).to_bytes(4, "little", signed=True)), 0),
    "huge id": GenerateChunk(pack_tokens([3, 2112]), 0),
    "half a token": GenerateChunk(PackedTokens(b"abc"), 0),
    "a list of ids": GenerateChunk([1, 2], 0),  # type: ignore[arg-type]  # what a careless engine yields
    "wrong choice": GenerateChunk(pack_tokens([1]), 0, choice=1),
    "negative choice": GenerateChunk(pack_tokens([1]), 0, choice=-1),
    "hole": GenerateChunk(pack_tokens([1]), 1),
    "too many": GenerateChunk(pack_tokens([1, 2, 3, 4, 5]), 0),
    "no chunk": None,
    "a dict": {"token_ids": [1]},
    "unknown finish": GenerateChunk(finish_reason=FinishReason.UNKNOWN),
    "unencodable": GenerateChunk(pack_tokens([1]), 0, extra={"x": object()}),
}


@pytest.mark.parametrize("name", GARBAGE)
async def test_garbage_ends_its_request_and_harms_no_other(process: Any, kit: Any, name: str) -> None:
    config = EngineConfig("scripted")
    config = EngineConfig("scripted", runtime_config=type(config.runtime_config)(runtime_data={"vocab_size": 2112}))
    engine = kit.ScriptedEngine(config=config)
    await process.worker(engine)
    bad = await process.open(kit.request("bad"))
    good = await process.open(kit.request("good"))
    engine.sinks["bad"].push(GARBAGE[name])
    count_to(2)(engine.requests["good"], engine.sinks["good"])
    await bad.done.wait()
    await good.done.wait()
    assert isinstance(bad.error, BackendProtocolError)
    assert bad.chunks == []
    assert (good.error, good.tokens) == (None, [100, 101])
    await process.clock.settle()
    assert engine.aborted == ["bad"]
    assert process.metric("dynamo_worker_protocol_errors_total") == 1


async def test_a_repeated_token_index_is_refused(process: Any, kit: Any) -> None:
    engine = kit.ScriptedEngine()
    await process.worker(engine)
    reply = await process.open(kit.request())
    engine.push("r1", 7, 0)
    engine.push("r1", 7, 0)
    await reply.done.wait()
    assert reply.tokens == [7]
    assert isinstance(reply.error, BackendProtocolError)
    assert "first_index 0" in reply.error.message


class PullEngine:
    """An engine in the pull form that runs one function per request; nothing more than the contract asks for."""

    def __init__(self, body: Any) -> None:
        self.body = body
        self.closed = 0
        self.aborted: list[str] = []

    async def start(self, context: EngineContext) -> EngineConfig:
        return EngineConfig("pull")

    async def generate(self, request: GenerateRequest, context: Any) -> AsyncIterator[GenerateChunk]:
        try:
            async for chunk in self.body(request, context):
                yield chunk
        finally:
            self.closed += 1

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    async def drain(self) -> None:
        pass

    async def cleanup(self) -> None:
        pass


async def two_then_end(request: GenerateRequest, context: Any) -> AsyncIterator[GenerateChunk]:
    yield GenerateChunk(pack_tokens([1]), 0)
    yield GenerateChunk(pack_tokens([2]), 1)


async def test_an_iterator_without_finish_reason_is_a_broken_stream(process: Any, kit: Any) -> None:
    await process.worker(PullEngine(two_then_end))
    reply = await process.ask(kit.request())
    assert reply.tokens == [1, 2]
    assert isinstance(reply.error, BackendProtocolError)
    assert reply.error.reason == "backend.stream_incomplete"
    assert reply.error.migratable


@pytest.mark.parametrize("error", [MemoryError("out of memory"), RuntimeError("boom"), KeyError("x")])
async def test_untyped_errors_mid_stream_are_internal_and_the_engine_stays(
    process: Any, kit: Any, error: Exception
) -> None:
    async def body(request: GenerateRequest, context: Any) -> AsyncIterator[GenerateChunk]:
        yield GenerateChunk(pack_tokens([1]), 0)
        if request.request_id == "bad":
            raise error
        yield GenerateChunk(first_index=1, finish_reason=FinishReason.EOS)

    worker = await process.worker(PullEngine(body))
    bad = await process.ask(kit.request("bad"))
    assert bad.tokens == [1]
    assert isinstance(bad.error, InternalError)
    assert bad.error.reason == "backend.unknown"
    assert type(error).__name__ in bad.error.diagnostic
    good = await process.ask(kit.request("good"))
    assert good.error is None
    assert worker.health().state is HealthState.READY  # the probe that followed was answered
    assert process.metric("dynamo_worker_probes_total", outcome="answered") == 1


async def test_an_engine_that_fails_every_request_leaves_discovery(process: Any, kit: Any) -> None:
    async def body(request: GenerateRequest, context: Any) -> AsyncIterator[GenerateChunk]:
        raise MemoryError("the device is gone")
        yield GenerateChunk()

    worker = await process.worker(PullEngine(body))
    reply = await process.ask(kit.request())
    assert isinstance(reply.error, InternalError)
    await process.clock.settle()
    assert worker.health().state is HealthState.FAILED
    assert await process.models() == []
    assert await process.instances() == []
    assert len(process.stop_requests) == 1
    late = await process.ask(kit.request("late"))
    assert isinstance(late.error, UnavailableError)
    assert late.error.reason == "backend.engine_shutdown"
    assert late.error.migratable


async def test_typed_errors_pass_through_and_raise_no_suspicion(process: Any, kit: Any) -> None:
    def script(request: GenerateRequest, sink: ChunkSink) -> None:
        raise InvalidRequestError("too long", param="token_ids")

    worker = await process.worker(kit.ScriptedEngine(script))
    reply = await process.ask(kit.request())
    assert isinstance(reply.error, InvalidRequestError)
    assert reply.error.param == "token_ids"
    assert worker.health() == Health(HealthState.READY, "serving scripted")
    assert process.metric("dynamo_worker_probes_total", outcome="answered") == 0


async def test_an_error_chunk_is_an_error(process: Any, kit: Any) -> None:
    engine = kit.ScriptedEngine()
    await process.worker(engine)
    reply = await process.open(kit.request())
    record = InvalidRequestError("bad image").to_record()
    engine.sinks["r1"].push(GenerateChunk(finish_reason=FinishReason.ERROR, error=record))
    await reply.done.wait()
    assert isinstance(reply.error, InvalidRequestError)
    assert reply.error.message == "bad image"


async def test_output_before_an_engine_error_still_arrives(process: Any, kit: Any) -> None:
    engine = kit.ScriptedEngine()
    await process.worker(engine)
    reply = await process.open(kit.request())
    engine.push("r1", 9, 0)
    engine.sinks["r1"].fail(UnavailableError("shard lost", reason="backend.disconnected"))
    await reply.done.wait()
    assert reply.tokens == [9]
    assert isinstance(reply.error, UnavailableError)
    assert reply.error.reason == "backend.disconnected"


async def test_a_stalled_engine_is_found_out_and_leaves(process: Any, kit: Any) -> None:
    engine = kit.ScriptedEngine()
    worker = await process.worker(engine, stall_timeout_s=10.0, probe_timeout_s=3.0)
    stalled = await process.open(kit.request("stalled"))
    engine.push("stalled", 1, 0)
    await process.clock.advance(6)
    lively = await process.open(kit.request("lively"))
    await process.clock.advance(5)
    assert isinstance(stalled.error, DeadlineExceededError)
    assert stalled.error.reason == "backend.response_timeout"
    assert worker.health().state is HealthState.READY  # the probe is under way
    await process.clock.advance(4)
    assert worker.health().state is HealthState.FAILED
    assert isinstance(lively.error, UnavailableError)
    assert lively.error.reason == "backend.engine_shutdown"
    assert await process.models() == []


async def test_cancelling_aborts_in_the_engine_and_delivers_its_last_chunk(process: Any, kit: Any) -> None:
    engine = kit.ScriptedEngine()
    await process.worker(engine)
    reply = await process.open(kit.request())
    engine.push("r1", 1, 0)
    await process.clock.settle()
    reply.call.cancel()
    await process.clock.settle()
    assert engine.aborted == ["r1"]
    engine.finish("r1", 1, FinishReason.CANCELLED)
    await reply.done.wait()
    assert reply.error is None
    assert reply.finish is FinishReason.CANCELLED
    assert process.metric("dynamo_worker_requests_total", outcome="cancelled") == 1


async def test_a_killed_call_aborts_in_the_engine(process: Any, kit: Any) -> None:
    engine = kit.ScriptedEngine()
    await process.worker(engine)
    reply = await process.open(kit.request())
    reply.call.cancel(kill=True)
    await process.clock.settle()
    assert engine.aborted == ["r1"]
    assert isinstance(reply.error, CancelledRequestError)
    engine.push("r1", 1, 0)  # a late chunk goes nowhere
    assert reply.chunks == []


async def test_a_failing_abort_puts_the_engine_under_suspicion(process: Any, kit: Any) -> None:
    class NoAbort(kit.ScriptedEngine):
        async def abort(self, request_id: str) -> None:
            raise RuntimeError("cannot")

    worker = await process.worker(NoAbort(lambda request, sink: request.health_check and count_to(1)(request, sink)))
    reply = await process.open(kit.request())
    reply.call.cancel(kill=True)
    await process.clock.settle()
    assert process.metric("dynamo_worker_probes_total", outcome="answered") == 1
    assert worker.health().state is HealthState.READY


async def test_an_engine_that_ignores_a_cancellation_is_left_behind(process: Any, kit: Any) -> None:
    engine = kit.ScriptedEngine()
    worker = await process.worker(engine, cancel_timeout_s=2.0)
    reply = await process.open(kit.request())
    reply.call.cancel()
    await process.clock.advance(3)
    assert isinstance(reply.error, CancelledRequestError)
    await process.clock.advance(4)  # and does not answer the probe
    assert worker.health().state is HealthState.FAILED


async def test_the_calls_deadline_aborts_in_the_engine(process: Any, kit: Any) -> None:
    engine = kit.ScriptedEngine()
    await process.worker(engine)
    reply = await process.open(kit.request(), deadline_s=1.0)
    await process.clock.advance(1.0)
    assert isinstance(reply.error, DeadlineExceededError)
    assert engine.aborted == ["r1"]


async def test_the_requests_own_deadline_holds_too(process: Any, kit: Any) -> None:
    engine = kit.ScriptedEngine()
    await process.worker(engine)
    reply = await process.open(kit.request(deadline_s=1.0))
    await process.clock.advance(1.5)
    assert isinstance(reply.error, DeadlineExceededError)
    assert engine.aborted == ["r1"]


async def test_pull_engines_are_closed_when_the_caller_leaves(process: Any, kit: Any) -> None:
    async def body(request: GenerateRequest, context: Any) -> AsyncIterator[GenerateChunk]:
        yield GenerateChunk(pack_tokens([1]), 0)
        await asyncio.Event().wait()

    engine = PullEngine(body)
    await process.worker(engine)
    reply = await process.open(kit.request())
    reply.call.cancel(kill=True)
    await process.clock.settle()
    assert (engine.closed, engine.aborted) == (1, ["r1"])


async def test_equal_request_ids_do_not_meet_in_the_engine(process: Any, kit: Any) -> None:
    engine = kit.ScriptedEngine()
    await process.worker(engine)
    first = await process.open(kit.request("same"))
    second = await process.open(kit.request("same"))
    assert set(engine.sinks) == {"same", "same~2"}
    engine.push("same", 1, 0)
    engine.push("same~2", 2, 0)
    engine.finish("same", 1)
    engine.finish("same~2", 1)
    await first.done.wait()
    await second.done.wait()
    assert (first.tokens, second.tokens) == ([1], [2])


async def test_an_unreadable_payload_is_the_callers_fault(process: Any, kit: Any) -> None:
    worker = await process.worker(kit.ScriptedEngine())
    reply = kit.Reply()
    await process.plane.open(worker.address, worker.endpoint, b"\xc1", reply)
    await reply.done.wait()
    assert isinstance(reply.error, InvalidRequestError)
    assert isinstance(reply.error, DynamoError)
    assert reply.error.reason == "request.invalid"
