from __future__ import annotations

from typing import Any

from dynamo_core.cards import ModelRuntimeConfig
from dynamo_core.engine import EngineConfig
from dynamo_core.errors import CancelledRequestError, CapacityExhaustedError, DeadlineExceededError


async def test_requests_wait_for_a_slot_oldest_first(process: Any, kit: Any) -> None:
    engine = kit.ScriptedEngine()
    await process.worker(engine, engine_request_limit=1)
    replies = {name: await process.open(kit.request(name)) for name in ("a", "b", "c")}
    assert list(engine.sinks) == ["a"]
    assert process.metric("dynamo_worker_engine_requests") == 1
    assert process.metric("dynamo_worker_queued_requests") == 2
    for name in ("a", "b", "c"):
        engine.push(name, 1, 0)
        engine.finish(name, 1)
        await replies[name].done.wait()
        await process.clock.settle()
    assert list(engine.sinks) == ["a", "b", "c"]
    assert process.metric("dynamo_worker_engine_requests") == 0


async def test_a_full_queue_refuses_before_the_engine_sees_the_request(process: Any, kit: Any) -> None:
    engine = kit.ScriptedEngine()
    await process.worker(engine, engine_request_limit=1, request_queue_limit=1)
    await process.open(kit.request("a"))
    await process.open(kit.request("b"))
    refused = await process.open(kit.request("c"))
    await refused.done.wait()
    assert isinstance(refused.error, CapacityExhaustedError)
    assert refused.error.reason == "capacity.worker_overloaded"
    assert refused.error.migratable
    assert list(engine.sinks) == ["a"]
    assert process.metric("dynamo_worker_rejected_requests_total", reason="queue_full") == 1


async def test_without_a_queue_the_second_request_is_refused(process: Any, kit: Any) -> None:
    await process.worker(kit.ScriptedEngine(), engine_request_limit=1, request_queue_limit=0)
    await process.open(kit.request("a"))
    refused = await process.open(kit.request("b"))
    await refused.done.wait()
    assert isinstance(refused.error, CapacityExhaustedError)


async def test_a_request_that_waited_too_long_is_refused_and_the_newest_goes_next(process: Any, kit: Any) -> None:
    engine = kit.ScriptedEngine()
    await process.worker(engine, engine_request_limit=1, request_queue_timeout_ms=1000)
    running = await process.open(kit.request("running"))
    old = await process.open(kit.request("old"))
    await process.clock.advance(0.6)
    middle = await process.open(kit.request("middle"))
    newest = await process.open(kit.request("newest"))
    await process.clock.advance(0.5)
    assert isinstance(old.error, CapacityExhaustedError)
    assert process.metric("dynamo_worker_rejected_requests_total", reason="queue_age") == 1
    engine.push("running", 1, 0)
    engine.finish("running", 1)
    await running.done.wait()
    await process.clock.settle()
    assert list(engine.sinks) == ["running", "newest"]
    engine.push("newest", 1, 0)
    engine.finish("newest", 1)
    await newest.done.wait()
    await process.clock.settle()
    assert list(engine.sinks) == ["running", "newest", "middle"]
    assert middle.error is None


async def test_a_caller_that_leaves_the_queue_is_forgotten(process: Any, kit: Any) -> None:
    engine = kit.ScriptedEngine()
    await process.worker(engine, engine_request_limit=1)
    first = await process.open(kit.request("first"))
    left = await process.open(kit.request("left"))
    left.call.cancel()
    await left.done.wait()
    assert isinstance(left.error, CancelledRequestError)
    late = await process.open(kit.request("late"), deadline_s=0.5)
    await process.clock.advance(0.5)
    assert isinstance(late.error, DeadlineExceededError)
    assert process.metric("dynamo_worker_queued_requests") == 0
    engine.finish("first", 0)
    await first.done.wait()
    assert list(engine.sinks) == ["first"]


async def test_the_limit_follows_from_the_engine_when_unset(process: Any, kit: Any) -> None:
    runtime = ModelRuntimeConfig(max_num_seqs=1, data_parallel_size=1)
    engine = kit.ScriptedEngine(config=EngineConfig("scripted", runtime_config=runtime))
    await process.worker(engine)
    for name in ("a", "b", "c"):
        await process.open(kit.request(name))
    assert list(engine.sinks) == ["a", "b"]
