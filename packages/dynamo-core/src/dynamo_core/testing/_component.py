"""Conformance of components: start, serve, drain, stop, and nothing left behind."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from dynamo_core.clock import SystemClock
from dynamo_core.component import Component, ComponentContext
from dynamo_core.memory import MemoryDiscovery, MemoryEventBus, MemoryRequestPlane
from dynamo_core.telemetry import Metrics
from dynamo_core.testing._suite import ConformanceSuite


class ComponentConformance(ConformanceSuite, suite=True):
    """Every ``Component`` must pass this, over in-process planes."""

    @abstractmethod
    def make_component(self, context: ComponentContext) -> Component:
        """Return a new component that can start with nothing but its context."""
        ...

    async def prepare(self, context: ComponentContext) -> None:
        """Put what the component needs of others into the planes; the default needs nothing."""

    @asynccontextmanager
    async def process(self) -> AsyncGenerator[ComponentContext]:
        """Yield the context of a process; at the end check that no task of the component is left."""
        tasks: list[asyncio.Task[None]] = []

        def spawn(coroutine: Coroutine[Any, Any, None], /, *, name: str) -> asyncio.Task[None]:
            tasks.append(asyncio.create_task(coroutine, name=name))
            return tasks[-1]

        context = ComponentContext(
            namespace="conformance",
            discovery=MemoryDiscovery(),
            request_plane=MemoryRequestPlane(),
            event_bus=MemoryEventBus(),
            metrics=Metrics(),
            clock=SystemClock(),
            spawn=spawn,
        )
        try:
            await self.prepare(context)
            yield context
            await self.until(lambda: all(task.done() for task in tasks))
            errors = [task.exception() for task in tasks if not task.cancelled()]
            assert [error for error in errors if error is not None] == []
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await context.event_bus.close()
            await context.request_plane.close()
            await context.discovery.close()

    async def test_component_has_a_name(self) -> None:
        async with self.process() as context:
            component = self.make_component(context)
            assert component.name
            await self.within(component.stop())

    async def test_whole_life(self) -> None:
        async with self.process() as context:
            component = self.make_component(context)
            await self.within(component.start())
            await self.within(component.drain(self.patience_s))
            await self.within(component.stop())

    async def test_started_component_is_ready_or_says_why_not(self) -> None:
        async with self.process() as context:
            component = self.make_component(context)
            await self.within(component.start())
            report = context.health.report()
            assert report
            assert all(health.ready or health.reason for health in report.values())
            await self.within(component.stop())

    async def test_drain_leaves_discovery(self) -> None:
        async with self.process() as context:
            before = {record.key for record in await context.discovery.list("")}
            component = self.make_component(context)
            await self.within(component.start())
            await self.within(component.drain(self.patience_s))
            after = {record.key for record in await context.discovery.list("v1/instances/")}
            assert after <= before
            await self.within(component.stop())

    async def test_stop_without_drain_leaves_discovery(self) -> None:
        async with self.process() as context:
            before = {record.key for record in await context.discovery.list("")}
            component = self.make_component(context)
            await self.within(component.start())
            await self.within(component.stop())
            assert {record.key for record in await context.discovery.list("")} <= before

    async def test_stop_without_start(self) -> None:
        async with self.process() as context:
            component = self.make_component(context)
            await self.within(component.stop())
            await self.within(component.stop())

    async def test_stop_twice(self) -> None:
        async with self.process() as context:
            component = self.make_component(context)
            await self.within(component.start())
            await self.within(component.stop())
            await self.within(component.stop())

    async def test_stop_after_a_failed_start(self) -> None:
        async with self.process() as context:
            await context.discovery.close()
            component = self.make_component(context)
            failed = (await asyncio.gather(self.within(component.start()), return_exceptions=True))[0]
            assert not isinstance(failed, TimeoutError), "start() waits for ever"
            await self.within(component.stop())
