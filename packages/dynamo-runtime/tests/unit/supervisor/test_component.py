from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from dynamo_core.clock import SystemClock
from dynamo_core.component import ComponentContext
from dynamo_core.enums import HealthState
from dynamo_core.errors import ConfigurationError, NotFoundError, UnavailableError
from dynamo_core.planes import CallOptions
from dynamo_core.streams import call_unary
from dynamo_core.telemetry import Metrics
from dynamo_runtime._endpoints import find_instances
from dynamo_runtime._runtime import Runtime
from dynamo_runtime._settings import RuntimeSettings, SupervisorSettings
from dynamo_runtime._supervisor.component import SupervisorComponent, SupervisorPlugin
from dynamo_runtime._supervisor.messages import state_endpoint
from dynamo_runtime._supervisor.remote import create_target
from dynamo_runtime._supervisor.spec import ProcessSpec

Script = Callable[[str], tuple[str, ...]]
Eventually = Callable[[Callable[[], object]], Awaitable[None]]

STEADY = "ready('http://127.0.0.1:1'); wait()"
MEMORY = RuntimeSettings(discovery="mem://", request_plane="mem://", event_bus="mem://")


@asynccontextmanager
async def context_of(namespace: str = "test") -> AsyncIterator[ComponentContext]:
    async with Runtime(MEMORY) as runtime, asyncio.TaskGroup() as group:

        def spawn(work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
            return group.create_task(work, name=name)

        yield ComponentContext(
            namespace=namespace,
            discovery=runtime.discovery,
            request_plane=runtime.request_plane,
            event_bus=runtime.event_bus,
            metrics=Metrics(labels={"dynamo_namespace": namespace, "dynamo_component": "supervisor"}),
            clock=SystemClock(),
            spawn=spawn,
        )


@asynccontextmanager
async def supervisor_of(
    context: ComponentContext, *specs: ProcessSpec, write: Any
) -> AsyncIterator[SupervisorComponent]:
    component = SupervisorPlugin(specs, write).create(context, (SupervisorSettings(max_replicas=4),), [])
    await component.start()
    try:
        yield component
    finally:
        await component.drain(20.0)
        await component.stop()


async def test_a_planner_elsewhere_reads_and_scales_over_the_request_plane(
    script: Script, output: Any, eventually: Eventually
) -> None:
    spec = ProcessSpec("worker", script(STEADY), 1)
    async with context_of() as context, supervisor_of(context, spec, write=output):
        target = create_target(context, {})
        await target.start()
        await target.scale({"worker": 2}, decision_id=1)
        async with asyncio.timeout(20):
            while (await target.state())["worker"].ready < 2:
                await asyncio.sleep(0.005)
        pool = (await target.state())["worker"]
        assert (pool.desired, pool.ready) == (2, 2)
        assert pool.startup_s is not None
        with pytest.raises(NotFoundError, match="wroker"):
            await target.scale({"wroker": 1})
        await target.close()


async def test_an_operator_may_write_json(script: Script, output: Any) -> None:
    spec = ProcessSpec("worker", script(STEADY), 1)
    async with context_of() as context, supervisor_of(context, spec, write=output):
        endpoint = state_endpoint("test")
        (instance,) = await find_instances(context.discovery, endpoint)
        answer = await call_unary(context.request_plane, instance.address, endpoint, b"{}", CallOptions())
        assert msgspec.json.decode(answer)["pools"]["worker"]["desired"] == 1


async def test_without_a_supervisor_the_target_is_unavailable() -> None:
    async with context_of() as context:
        with pytest.raises(UnavailableError, match=r"test\.supervisor\.state"):
            await create_target(context, {}).state()


async def test_another_namespace_is_an_option_and_others_are_refused(script: Script, output: Any) -> None:
    spec = ProcessSpec("worker", script(STEADY), 0)
    async with context_of() as context, supervisor_of(context, spec, write=output):
        assert "worker" in await create_target(context, {"namespace": "test"}).state()
        with pytest.raises(UnavailableError):
            await create_target(context, {"namespace": "other"}).state()
        with pytest.raises(ConfigurationError, match="takes no option 'color'"):
            create_target(context, {"color": 1})


async def test_health_follows_the_roles(script: Script, output: Any, eventually: Eventually) -> None:
    spec = ProcessSpec("worker", script(STEADY), 2)
    async with context_of() as context, supervisor_of(context, spec, write=output) as component:
        assert context.health.report()["worker"].state is HealthState.STARTING
        await eventually(lambda: context.health.ready)
        assert context.health.report()["worker"].reason == "2 of 2 ready"
        component.supervisor.replicas["worker"][0].restart(0.0)
        assert context.health.report()["worker"].state is HealthState.DEGRADED


async def test_replicas_are_listed_with_process_and_status(script: Script, output: Any, eventually: Eventually) -> None:
    spec = ProcessSpec("worker", script(STEADY), 1)
    async with context_of() as context, supervisor_of(context, spec, write=output):
        await eventually(lambda: context.health.ready)
        listed = await context.admin_routes["replicas"]({})
        assert listed["worker-1"]["state"] == "ready"
        assert listed["worker-1"]["status_url"] == "http://127.0.0.1:1"


async def test_after_a_drain_nobody_finds_it(script: Script, output: Any) -> None:
    async with context_of() as context:
        async with supervisor_of(context, ProcessSpec("worker", script(STEADY), 1), write=output):
            assert await find_instances(context.discovery, state_endpoint("test"))
        assert not await find_instances(context.discovery, state_endpoint("test"))
