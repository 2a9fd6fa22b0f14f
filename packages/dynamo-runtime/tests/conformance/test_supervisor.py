"""The supervisor passes the kit: as a component, as a scaling target, and as one reached from another process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any

import pytest

from dynamo_core.clock import SystemClock
from dynamo_core.component import ComponentContext
from dynamo_core.memory import MemoryDiscovery, MemoryEventBus, MemoryRequestPlane
from dynamo_core.planning import ScalingTarget
from dynamo_core.telemetry import Metrics
from dynamo_core.testing import ComponentConformance, ScalingTargetConformance
from dynamo_runtime._settings import SupervisorSettings
from dynamo_runtime._supervisor.component import SupervisorComponent
from dynamo_runtime._supervisor.remote import RemoteSupervisor
from dynamo_runtime._supervisor.spec import ProcessSpec

SLEEPER = ("sleep", "1000")


def specs(replicas: Mapping[str, int]) -> list[ProcessSpec]:
    return [ProcessSpec(role, SLEEPER, count) for role, count in replicas.items()]


class TestSupervisorComponent(ComponentConformance):
    def make_component(self, context: ComponentContext) -> SupervisorComponent:
        return SupervisorComponent(context, specs({"worker": 2}), SupervisorSettings())


class _Processes:
    @pytest.fixture(autouse=True)
    async def _clean_up(self) -> AsyncIterator[None]:
        self.tasks: list[asyncio.Task[None]] = []
        self.components: list[SupervisorComponent] = []
        yield
        for component in self.components:
            await component.stop()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    def component(self, replicas: Mapping[str, int]) -> tuple[ComponentContext, SupervisorComponent]:
        def spawn(work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
            task = asyncio.create_task(work, name=name)
            self.tasks.append(task)
            return task

        context = ComponentContext(
            namespace="conformance",
            discovery=MemoryDiscovery(),
            request_plane=MemoryRequestPlane(),
            event_bus=MemoryEventBus(),
            metrics=Metrics(),
            clock=SystemClock(),
            spawn=spawn,
        )
        component = SupervisorComponent(context, specs(replicas), SupervisorSettings())
        self.components.append(component)
        return context, component


class TestSupervisor(_Processes, ScalingTargetConformance):
    async def make_target(self, replicas: Mapping[str, int]) -> ScalingTarget:
        return self.component(replicas)[1].supervisor


class TestRemoteSupervisor(_Processes, ScalingTargetConformance):
    async def make_target(self, replicas: Mapping[str, int]) -> ScalingTarget:
        context, component = self.component(replicas)
        await component.start()
        return RemoteSupervisor(context)
