"""Ordered start, drain with a deadline, and stop in reverse of a process's components."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Sequence
from typing import Any

import structlog

from dynamo_core.clock import Clock
from dynamo_core.component import Component
from dynamo_core.errors import DynamoError, InternalError

STOP_TIMEOUT_S = 10.0
"""Time one component's ``stop`` gets before it is left behind."""

_log = structlog.get_logger(__name__)


class Lifecycle:
    """Drives components through start, drain and stop, in order and each at most once.

    Args:
        components: Label to component, in start order.
        clock: Time, for deadlines.
    """

    def __init__(self, components: Sequence[tuple[str, Component]], clock: Clock) -> None:
        self._components = list(components)
        self._clock = clock
        self._entered: list[tuple[str, Component]] = []
        self._started: list[tuple[str, Component]] = []

    async def start(self) -> None:
        """Start components one after the other.

        Raises:
            DynamoError: what the first failing component raised; those before it stay started.
        """
        for label, component in self._components:
            self._entered.append((label, component))
            try:
                await component.start()
            except DynamoError:
                raise
            except Exception as error:
                raise task_failure(label, "start", error) from error
            self._started.append((label, component))
            _log.info("component started", component=label)

    async def drain(self, timeout_s: float) -> bool:
        """Drain started components in reverse order; return whether all finished within the time together."""
        deadline = self._clock.monotonic() + timeout_s
        finished = True
        while self._started:
            label, component = self._started.pop()
            remaining_s = max(0.0, deadline - self._clock.monotonic())
            finished &= await self._drain_one(label, component, remaining_s)
        return finished

    async def stop(self) -> None:
        """Stop all components whose start was begun, in reverse order. Errors are logged: the rest must stop too."""
        while self._entered:
            label, component = self._entered.pop()
            if not await self._attempt(label, "stop", component.stop(), STOP_TIMEOUT_S):
                _log.error("component did not stop", component=label, timeout_s=STOP_TIMEOUT_S)

    async def _drain_one(self, label: str, component: Component, timeout_s: float) -> bool:
        # The component keeps its own deadline; the host's is a little later, so that a late hand-over still counts.
        if await self._attempt(label, "drain", component.drain(timeout_s), timeout_s + 1.0):
            return True
        _log.warning("component did not drain in time", component=label, timeout_s=timeout_s)
        return False

    async def _attempt(self, label: str, step: str, work: Coroutine[Any, Any, None], timeout_s: float) -> bool:
        try:
            return await finishes_before(work, self._clock.sleep(timeout_s))
        except Exception:  # noqa: BLE001 - whatever one component raises, the others must still be released
            _log.exception("component failed", component=label, step=step)
            return True


async def finishes_before(work: Coroutine[Any, Any, None], limit: Awaitable[Any]) -> bool:
    """Run ``work`` until it ends or ``limit`` is done; return whether it ended by itself.

    Whichever is not done is cancelled and waited for, also when the caller is cancelled.
    """
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(limit)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finished = tasks[0].done()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    if finished:
        tasks[0].result()
    return finished


def task_failure(label: str, task: str, error: Exception) -> InternalError:
    """Return the typed reason for an untyped failure in a component."""
    return InternalError(
        f"{label} failed in {task}: {type(error).__name__}: {error}",
        reason="runtime.task_failed",
        diagnostic=repr(error),
    )
