"""Several workers in one process, each with an engine, an identity and records of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from dynamo_core.component import ComponentContext
from dynamo_core.telemetry import Metrics
from dynamo_worker._worker import Worker

_LABEL = "dynamo_component"


class WorkerFleet:
    """A ``Component`` of several workers. One that dies leaves alone; the process stops with the last.

    Args:
        context: What the process offers.
        count: How many workers.
        build: Makes one in the context it is given; no I/O.
    """

    def __init__(self, context: ComponentContext, count: int, build: Callable[[ComponentContext], Worker]) -> None:
        self._context = context
        self._dead: set[int] = set()
        self.workers: Sequence[Worker] = [build(self._context_of(number)) for number in range(count)]

    @property
    def name(self) -> str:
        """Name for logs."""
        return f"{len(self.workers)} workers"

    async def start(self) -> None:
        """Start all; when this returns they are in discovery.

        Raises:
            DynamoError: what the first that failed could not start for.
        """
        await _all([worker.start() for worker in self.workers])

    async def drain(self, timeout_s: float) -> None:
        """Drain all at once."""
        await _all([worker.drain(timeout_s) for worker in self.workers])

    async def stop(self) -> None:
        """Stop all. Idempotent."""
        await _all([worker.stop() for worker in self.workers])

    def _context_of(self, number: int) -> ComponentContext:
        return replace(
            self._context,
            metrics=_metrics_of(self._context.metrics, number),
            seed=self._context.seed + number,
            request_stop=partial(self._on_death, number),
        )

    def _on_death(self, number: int, reason: str) -> None:
        self._dead.add(number)
        if len(self._dead) == len(self.workers):
            self._context.request_stop(f"all workers are dead; the last: {reason}")


def _metrics_of(metrics: Metrics, number: int) -> Metrics:
    """Return a scope of the worker's own, so that gauges of one do not overwrite those of another."""
    component = metrics.fixed_labels.get(_LABEL)
    return metrics if component is None else metrics.child(**{_LABEL: f"{component}-{number}"})


async def _all(work: Sequence[Coroutine[Any, Any, None]]) -> None:
    # Every one comes to its end before the first failure is told: nothing is left half started beside a stop.
    for result in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
