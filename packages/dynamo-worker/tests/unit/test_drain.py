from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dynamo_core.enums import HealthState
from dynamo_core.errors import ConflictError, InvalidRequestError, UnavailableError, UnsupportedOperationError


async def test_running_requests_finish_and_new_ones_are_sent_elsewhere(process: Any, kit: Any) -> None:
    engine = kit.ScriptedEngine()
    worker = await process.worker(engine)
    running = await process.open(kit.request("running"))
    engine.push("running", 1, 0)
    draining = asyncio.ensure_future(worker.drain(30.0))
    await process.clock.settle()
    assert await process.models() == []
    assert await process.instances() == []
    assert worker.health().state is HealthState.DRAINING
    assert worker.status()["state"] == "draining"
    late = await process.open(kit.request("late"))
    await late.done.wait()
    assert isinstance(late.error, UnavailableError)
    assert late.error.reason == "backend.draining"
    assert late.error.migratable
    engine.push("running", 2, 1)
    engine.finish("running", 2)
    await process.clock.run(draining)
    assert (running.error, running.tokens) == (None, [1, 2])
    assert engine.drained
    assert worker.status()["safe_to_delete"] is True
    assert list(engine.sinks) == ["running"]


async def test_what_outlives_the_drain_ends_as_migratable(process: Any, kit: Any) -> None:
    engine = kit.ScriptedEngine()
    worker = await process.worker(engine, engine_request_limit=2)
    replies = [await process.open(kit.request(name)) for name in ("a", "b", "queued")]
    engine.push("a", 1, 0)
    await process.clock.run(worker.drain(5.0))
    assert process.clock.monotonic() == pytest.approx(5.0)
    for reply in replies:
        await reply.done.wait()
    assert [reply.error.reason for reply in replies] == [
        "backend.engine_shutdown",
        "backend.engine_shutdown",
        "backend.draining",
    ]
    assert all(reply.error.migratable for reply in replies)
    assert replies[0].tokens == [1]
    await process.clock.settle()
    assert sorted(engine.aborted) == ["a", "b"]


async def test_a_slow_reader_does_not_hold_up_the_drain(process: Any, kit: Any) -> None:
    engine = kit.ScriptedEngine()
    worker = await process.worker(engine)
    reply = await process.open(kit.request(), credit=1, grant=False)
    engine.push("r1", 1, 0)
    engine.push("r1", 2, 1)
    engine.finish("r1", 2)
    await process.clock.run(worker.drain(5.0))
    await reply.done.wait()
    assert reply.error.reason == "backend.engine_shutdown"


async def test_an_engine_that_never_drains_costs_a_second(process: Any, kit: Any) -> None:
    class Stuck(kit.ScriptedEngine):
        async def drain(self) -> None:
            await asyncio.Event().wait()

    worker = await process.worker(Stuck())
    await process.clock.run(worker.drain(0.0))
    assert process.clock.monotonic() == pytest.approx(1.0)


async def test_stop_ends_running_requests_and_cleans_up_once(process: Any, kit: Any) -> None:
    engine = kit.ScriptedEngine()
    worker = await process.worker(engine)
    reply = await process.open(kit.request())
    await worker.stop()
    await worker.stop()
    await reply.done.wait()
    assert reply.error.reason == "backend.engine_shutdown"
    assert engine.cleanups == 1
    assert await process.instances() == []
    assert process.context.admin_routes == {}
    assert process.context.health.report() == {}


async def test_stop_follows_a_failed_start(process: Any, kit: Any) -> None:
    class Broken(kit.ScriptedEngine):
        async def start(self, context: Any) -> Any:
            raise OSError("no device")

    engine = Broken()
    with pytest.raises(Exception, match="Broken could not start: OSError: no device"):
        await process.worker(engine)
    await process.workers[0].stop()
    assert engine.cleanups == 1


async def test_admin_routes_drain_and_resume(process: Any, kit: Any) -> None:
    engine = kit.ScriptedEngine()
    worker = await process.worker(engine)
    routes = process.context.admin_routes
    assert (await routes["status"]({}))["state"] == "serving"
    drained = await routes["drain"]({"timeout_s": 1})
    assert (drained["state"], drained["discovery_registered"], drained["safe_to_delete"]) == ("drained", False, True)
    resumed = await routes["resume"]({})
    assert (resumed["state"], resumed["discovery_registered"]) == ("serving", True)
    assert len(await process.models()) == 1
    reply = await process.open(kit.request())
    engine.finish("r1", 0)
    await reply.done.wait()
    assert reply.error is None
    assert not engine.drained
    with pytest.raises(ConflictError, match="only a draining worker can resume"):
        await worker.resume()
    with pytest.raises(InvalidRequestError, match="timeout_s"):
        await routes["drain"]({"timeout_s": "soon"})


async def test_controls_reach_the_engine(process: Any, kit: Any) -> None:
    class Controlled(kit.ScriptedEngine):
        def controls(self) -> list[str]:
            return ["pause", "flush"]

        async def control(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
            return {"name": name, **arguments}

    await process.worker(Controlled())
    routes = process.context.admin_routes
    assert await routes["controls"]({}) == {"controls": ["flush", "pause"]}
    assert await routes["control"]({"name": "pause", "arguments": {"s": 1}}) == {"name": "pause", "s": 1}
    with pytest.raises(InvalidRequestError, match="name"):
        await routes["control"]({})
    assert "clear_kv_blocks" not in routes


async def test_a_second_worker_of_the_process_has_its_own_routes(process: Any, kit: Any) -> None:
    await process.worker(kit.ScriptedEngine())
    second = await process.worker(kit.ScriptedEngine())
    own = f"{second.status()['instance_id']}/status"
    assert (await process.context.admin_routes[own]({}))["instance_id"] == second.status()["instance_id"]
    with pytest.raises(UnsupportedOperationError, match="no controls"):
        await process.context.admin_routes["control"]({"name": "x"})
