from __future__ import annotations

from typing import Any

from dynamo_core.enums import FinishReason
from dynamo_core.errors import CapacityExhaustedError
from dynamo_core.requests import GenerateChunk, TokenLogprob
from dynamo_core.tokens import pack_tokens


async def test_output_is_merged_while_there_is_no_credit_and_arrives_complete(process: Any, kit: Any) -> None:
    engine = kit.ScriptedEngine()
    await process.worker(engine)
    reply = await process.open(kit.request(max_tokens=1000), credit=4, grant=False)
    for index in range(1000):
        engine.push("r1", index, index)
    engine.finish("r1", 1000)
    await process.clock.settle()
    assert reply.items == 4
    assert process.metric("dynamo_worker_held_chunks_total") == 997
    reply.call.grant(16)
    await reply.done.wait()
    assert reply.error is None
    assert reply.tokens == list(range(1000))
    assert reply.items == 6  # four singles, one merged run, the finish
    assert reply.finish is FinishReason.LENGTH


async def test_chunks_that_carry_more_than_tokens_are_not_merged(process: Any, kit: Any) -> None:
    engine = kit.ScriptedEngine()
    await process.worker(engine)
    reply = await process.open(kit.request(max_tokens=10), credit=1, grant=False)
    for index in range(4):
        logprobs = (TokenLogprob(index, -0.5),) if index == 2 else ()
        engine.push("r1", index, index, logprobs=logprobs)
    engine.finish("r1", 4)
    await process.clock.settle()
    reply.call.grant(100)
    await reply.done.wait()
    assert reply.tokens == [0, 1, 2, 3]
    assert [len(chunk.logprobs) for chunk in reply.chunks] == [0, 0, 1, 0, 0]
    assert [chunk.first_index for chunk in reply.chunks] == [0, 1, 2, 3, 4]


async def test_a_reader_too_far_behind_is_dropped_and_its_request_aborted(process: Any, kit: Any) -> None:
    engine = kit.ScriptedEngine()
    await process.worker(engine, response_buffer_bytes=1024)
    slow = await process.open(kit.request("slow", max_tokens=None), credit=1, grant=False)
    quick = await process.open(kit.request("quick"))
    for index in range(300):
        engine.push("slow", index, index)
    engine.push("quick", 1, 0)
    engine.finish("quick", 1)
    await slow.done.wait()
    await quick.done.wait()
    assert isinstance(slow.error, CapacityExhaustedError)
    assert slow.error.reason == "capacity.reader_too_slow"
    assert slow.items == 1
    assert quick.tokens == [1]
    await process.clock.settle()
    assert engine.aborted == ["slow"]


async def test_a_reader_that_waits_is_not_taken_for_a_stalled_engine(process: Any, kit: Any) -> None:
    engine = kit.ScriptedEngine()
    await process.worker(engine, stall_timeout_s=5.0)
    reply = await process.open(kit.request(), credit=1, grant=False)
    engine.sinks["r1"].push(GenerateChunk(pack_tokens([1, 2]), 0))
    engine.finish("r1", 2)
    await process.clock.advance(20)
    assert not reply.done.is_set()
    reply.call.grant(1)
    await reply.done.wait()
    assert (reply.error, reply.tokens) == (None, [1, 2])
