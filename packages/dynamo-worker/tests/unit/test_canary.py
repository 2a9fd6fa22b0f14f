from __future__ import annotations

from typing import Any

import pytest

from dynamo_core.engine import ChunkSink
from dynamo_core.enums import FinishReason, HealthState
from dynamo_core.errors import InvalidRequestError, UnavailableError
from dynamo_core.requests import GenerateChunk, GenerateRequest
from dynamo_core.tokens import pack_tokens


def answer(request: GenerateRequest, sink: ChunkSink) -> None:
    sink.push(GenerateChunk(pack_tokens([5]), 0, finish_reason=FinishReason.LENGTH))


async def test_an_idle_engine_is_probed_through_the_real_path(process: Any, kit: Any) -> None:
    engine = kit.ScriptedEngine(answer)
    worker = await process.worker(engine, canary_idle_s=10.0)
    await process.clock.advance(9.9)
    assert engine.requests == {}
    await process.clock.advance(0.2)
    (probe,) = engine.requests.values()
    assert probe.health_check
    assert probe.stop.max_tokens == 1
    await process.clock.advance(10)
    assert len(engine.requests) == 2
    assert worker.health().state is HealthState.READY
    assert process.metric("dynamo_worker_probes_total", outcome="answered") == 2


async def test_traffic_puts_canaries_off(process: Any, kit: Any) -> None:
    engine = kit.ScriptedEngine(answer)
    await process.worker(engine, canary_idle_s=10.0)
    for number in range(5):
        await process.clock.advance(6)
        await process.open(kit.request(f"r{number}"))
    assert not any(request.health_check for request in engine.requests.values())


async def test_an_unanswered_canary_takes_the_worker_out(process: Any, kit: Any) -> None:
    engine = kit.ScriptedEngine()
    worker = await process.worker(engine, canary_idle_s=10.0, probe_timeout_s=3.0)
    await process.clock.advance(14)
    assert worker.health().state is HealthState.FAILED
    assert "canary went unanswered" in worker.health().reason
    assert await process.models() == []
    assert len(process.stop_requests) == 1
    assert process.metric("dynamo_worker_probes_total", outcome="failed") == 1
    await process.clock.advance(60)
    assert len(engine.requests) == 1
    (death,) = [task for task in process.tasks if task.get_name().endswith("death")]
    assert not death.done(), "what still runs is drained first"
    await worker.stop()
    with pytest.raises(UnavailableError, match="canary went unanswered"):
        await death
    process.tasks.remove(death)


async def test_an_engine_that_refuses_the_probe_is_alive(process: Any, kit: Any) -> None:
    def script(request: GenerateRequest, sink: ChunkSink) -> None:
        raise InvalidRequestError("this engine makes pictures")

    worker = await process.worker(kit.ScriptedEngine(script), canary_idle_s=10.0)
    await process.clock.advance(25)
    assert worker.health().state is HealthState.READY


async def test_probes_pass_a_full_queue(process: Any, kit: Any) -> None:
    def script(request: GenerateRequest, sink: ChunkSink) -> None:
        if request.health_check:
            answer(request, sink)
        elif request.request_id == "fatal":
            raise RuntimeError("bad input")

    worker = await process.worker(kit.ScriptedEngine(script), engine_request_limit=2)
    await process.open(kit.request("a"))
    fatal = await process.open(kit.request("fatal"))
    await process.open(kit.request("b"))
    await fatal.done.wait()
    await process.clock.settle()
    assert process.metric("dynamo_worker_probes_total", outcome="answered") == 1
    assert worker.health().state is HealthState.READY


async def test_an_engine_that_says_it_is_gone_is_believed_after_a_probe(process: Any, kit: Any) -> None:
    def script(request: GenerateRequest, sink: ChunkSink) -> None:
        raise UnavailableError("the engine core exited", reason="backend.engine_shutdown")

    worker = await process.worker(kit.ScriptedEngine(script))
    reply = await process.open(kit.request())
    await reply.done.wait()
    await process.clock.settle()
    assert reply.error.migratable
    assert worker.health().state is HealthState.FAILED
