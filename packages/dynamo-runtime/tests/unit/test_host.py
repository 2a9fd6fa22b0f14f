from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from dynamo_core.component import ComponentContext, Health
from dynamo_core.discovery import INSTANCES_PREFIX
from dynamo_core.enums import HealthState
from dynamo_core.errors import ConfigurationError, ConflictError, DynamoError, UnavailableError
from dynamo_core.ids import EndpointId
from dynamo_core.settings import DynamoSettings
from dynamo_runtime._endpoints import announce_endpoint
from dynamo_runtime._host import Host, HostedComponent
from dynamo_runtime._settings import RuntimeSettings

LIMIT_S = 20.0
ECHO = EndpointId("test", "echo", "say")


def settings(**changes: Any) -> RuntimeSettings:
    planes = {"discovery": "mem://", "request_plane": "mem://", "event_bus": "mem://", "status_port": 0}
    return RuntimeSettings(**{**planes, **changes})


class Part:
    def __init__(self, context: ComponentContext, calls: list[str], label: str) -> None:
        self.context = context
        self.name = label
        self.calls = calls

    async def start(self) -> None:
        self.calls.append(f"start {self.name}")
        lease = await self.context.discovery.lease()
        await announce_endpoint(self.context.discovery, self.context.request_plane, lease, ECHO, echo)

    async def drain(self, timeout_s: float) -> None:
        announced = await self.context.discovery.list(INSTANCES_PREFIX)
        self.calls.append(f"drain {self.name} announced={len(announced)}")

    async def stop(self) -> None:
        self.calls.append(f"stop {self.name}")


async def echo(payload: bytes, call: Any, sink: Any) -> None:
    sink.send(payload)


class Plugin:
    settings_types: tuple[type[DynamoSettings], ...] = ()
    takes_extra_args = False

    def __init__(self, calls: list[str], label: str = "part", make: Callable[..., Part] = Part) -> None:
        self.calls = calls
        self.label = label
        self.make = make
        self.part: Part | None = None

    def create(self, context: ComponentContext, settings: Any, extra_args: list[str]) -> Part:
        self.part = self.make(context, self.calls, self.label)
        return self.part


class Running:
    """A host in a task, and a way to wait until it is ready."""

    def __init__(self, *plugins: Plugin, options: RuntimeSettings | None = None) -> None:
        self._ready = asyncio.Event()

        async def on_ready() -> None:
            self._ready.set()

        hosted = [HostedComponent(plugin.label, plugin) for plugin in plugins]
        self.host = Host(hosted, options or settings(), on_ready=on_ready)
        self.task = asyncio.create_task(self.host.run())

    async def ready(self) -> Running:
        waiting = asyncio.create_task(self._ready.wait())
        await asyncio.wait({waiting, self.task}, timeout=LIMIT_S, return_when=asyncio.FIRST_COMPLETED)
        assert self._ready.is_set()
        return self

    async def finish(self) -> None:
        self.host.stop.request("test is over")
        await asyncio.wait_for(self.task, LIMIT_S)

    async def get(self, path: str, method: str = "GET", **options: Any) -> tuple[int, Any]:
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, self.host.status_url + path, **options) as response,
        ):
            is_json = response.content_type == "application/json"
            return response.status, await response.json() if is_json else await response.text()


async def test_a_request_to_stop_leaves_discovery_then_drains_and_stops_in_reverse() -> None:
    calls: list[str] = []
    running = await Running(Plugin(calls, "a"), Plugin(calls, "b")).ready()
    await running.finish()
    assert calls == ["start a", "start b", "drain b announced=0", "drain a announced=0", "stop b", "stop a"]


async def test_a_component_may_ask_the_process_to_stop() -> None:
    plugin = Plugin([])
    running = await Running(plugin).ready()
    assert plugin.part is not None
    plugin.part.context.request_stop("all done")
    await asyncio.wait_for(running.task, LIMIT_S)
    assert running.host.stop.reason == "all done"


async def test_a_failing_background_task_stops_the_process_with_its_reason() -> None:
    class Failing(Part):
        async def start(self) -> None:
            async def work() -> None:
                raise UnavailableError("backend is gone", reason="backend.disconnected")

            self.context.spawn(work(), name="work")
            await super().start()

    calls: list[str] = []
    running = Running(Plugin(calls, make=Failing))
    with pytest.raises(UnavailableError) as caught:
        await asyncio.wait_for(running.task, LIMIT_S)
    assert caught.value.reason == "backend.disconnected"
    assert "stop part" in calls


async def test_an_untyped_failure_names_component_and_task() -> None:
    class Failing(Part):
        async def start(self) -> None:
            async def work() -> None:
                raise KeyError("block 7")

            self.context.spawn(work(), name="offload")

    with pytest.raises(DynamoError, match="part failed in offload: KeyError"):
        await asyncio.wait_for(Running(Plugin([], make=Failing)).task, LIMIT_S)


async def test_wrong_configuration_wins_over_what_it_causes() -> None:
    class Wrong(Part):
        async def start(self) -> None:
            raise ConfigurationError("no such model")

    with pytest.raises(ConfigurationError, match="no such model"):
        await asyncio.wait_for(Running(Plugin([], make=Wrong)).task, LIMIT_S)


async def test_background_tasks_of_a_component_end_with_the_process() -> None:
    cancelled: list[str] = []

    class Busy(Part):
        async def start(self) -> None:
            async def work() -> None:
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    cancelled.append("work")
                    raise

            self.context.spawn(work(), name="work")

    running = await Running(Plugin([], make=Busy)).ready()
    await running.finish()
    assert cancelled == ["work"]


async def test_a_stop_during_start_does_not_wait_for_it() -> None:
    class Slow(Part):
        async def start(self) -> None:
            self.calls.append("start slow")
            await asyncio.Event().wait()

    calls: list[str] = []
    running = Running(Plugin(calls, make=Slow))
    async with asyncio.timeout(LIMIT_S):
        while not calls:
            await asyncio.sleep(0)
    await running.finish()
    assert calls == ["start slow", "stop part"]


async def test_a_second_signal_cuts_the_drain_short() -> None:
    class Stuck(Part):
        async def drain(self, timeout_s: float) -> None:
            self.calls.append("drain begun")
            await asyncio.Event().wait()

    calls: list[str] = []
    running = await Running(Plugin(calls, make=Stuck)).ready()
    running.host.stop.request("first")
    async with asyncio.timeout(LIMIT_S):
        while "drain begun" not in calls:
            await asyncio.sleep(0)
    running.host.stop.abort.set()
    await asyncio.wait_for(running.task, LIMIT_S)
    assert calls[-1] == "stop part"


async def test_ready_tells_each_part_and_why() -> None:
    plugin = Plugin([])
    running = await Running(plugin).ready()
    assert plugin.part is not None
    health = Health(HealthState.READY)
    plugin.part.context.health.register("engine", lambda: health)
    status, body = await running.get("/ready")
    assert (status, body["parts"]["engine"]["state"]) == (200, "ready")
    health = Health(HealthState.FAILED, "out of memory")
    status, body = await running.get("/ready")
    assert (status, body["status"]) == (503, "notready")
    assert body["parts"]["engine"] == {"state": "failed", "reason": "out of memory"}
    assert (await running.get("/live"))[0] == 200
    await running.finish()


async def test_parts_of_several_components_do_not_hide_each_other() -> None:
    plugins = Plugin([], "worker-1"), Plugin([], "worker-2")
    running = await Running(*plugins).ready()
    for plugin in plugins:
        assert plugin.part is not None
        plugin.part.context.health.register("engine", lambda: Health(HealthState.READY))
    assert {"worker-1/engine", "worker-2/engine"} <= set(running.host.report())
    await running.finish()


async def test_metrics_carry_namespace_and_component() -> None:
    plugin = Plugin([], "worker")
    running = await Running(plugin, options=settings(namespace="blue")).ready()
    assert plugin.part is not None
    plugin.part.context.metrics.counter("dynamo_test_things_total", "Things.").inc()
    _, text = await running.get("/metrics")
    assert 'dynamo_test_things_total{dynamo_component="worker",dynamo_namespace="blue"} 1.0' in text
    await running.finish()


async def test_an_operator_takes_a_process_out_of_service_and_back() -> None:
    running = await Running(Plugin([])).ready()
    assert (await running.get("/engine/status"))[1]["state"] == "serving"

    _, drained = await running.get("/engine/drain", "POST")
    assert drained == {
        "state": "drained",
        "inflight_requests": 0,
        "discovery_registered": False,
        "safe_to_delete": True,
    }
    assert (await running.get("/ready"))[0] == 503

    _, resumed = await running.get("/engine/resume", "POST", json={})
    assert (resumed["state"], resumed["discovery_registered"]) == ("serving", True)
    assert (await running.get("/ready"))[0] == 200
    await running.finish()


async def test_admin_routes_of_components_answer_and_errors_are_json() -> None:
    async def double(arguments: dict[str, Any]) -> dict[str, Any]:
        if "value" not in arguments:
            raise ConflictError("no value")
        return {"value": 2 * arguments["value"]}

    plugin = Plugin([])
    running = await Running(plugin).ready()
    assert plugin.part is not None
    plugin.part.context.admin_routes["double"] = double
    assert await running.get("/engine/double", "POST", json={"value": 4}) == (200, {"value": 8})
    assert (await running.get("/engine/double"))[0] == 409
    status, body = await running.get("/engine/triple")
    assert status == 404 and "double" in body["error"]["message"]
    assert (await running.get("/engine/double", "POST", data="[1]"))[0] == 400
    assert (await running.get("/engine/double", "POST", data="{"))[0] == 400
    status, body = await running.get("/nothing")
    assert (status, body["error"]["type"]) == (404, "http")
    await running.finish()


async def test_a_supervisor_hears_once_that_the_process_is_ready() -> None:
    reading, writing = os.pipe()
    try:
        running = await Running(Plugin([]), options=settings(ready_fd=writing)).ready()
        line = json.loads(os.read(reading, 4096))
        assert line == {"status_url": running.host.status_url, "pid": os.getpid()}
        await running.finish()
    finally:
        os.close(reading)


async def test_a_busy_status_port_is_a_configuration_error() -> None:
    running = await Running(Plugin([])).ready()
    port = int(running.host.status_url.rsplit(":", 1)[1])
    with pytest.raises(ConfigurationError, match="--status-port"):
        await Running(Plugin([]), options=settings(status_port=port)).task
    await running.finish()


def test_an_unknown_scheme_names_what_is_installed() -> None:
    with pytest.raises(ConfigurationError, match=r"consul.*installed: .*mem"):
        Host([], settings(discovery="consul://localhost:8500"))
