"""Publishes load when it changes, at most once an interval, with a heartbeat; and every forward pass."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

import msgspec
import structlog

from dynamo_core.clock import Clock
from dynamo_core.engine import Engine, SupportsForwardPassMetrics, SupportsLoad
from dynamo_core.ids import InstanceId, WorkerId
from dynamo_core.load import ForwardPassMetrics, ReportedLoad, WorkerLoad
from dynamo_core.planes import Publisher
from dynamo_core.wire import FORWARD_PASS_METRICS, WORKER_LOAD
from dynamo_worker._deadline import within
from dynamo_worker._metrics import WorkerMetrics

log = structlog.get_logger(__name__)


class LoadReports:
    """Load and forward-pass reports of one worker.

    Args:
        engine: Asked for its load if it knows it.
        workers: The worker's dp ranks.
        active: Counts running requests; the load of an engine that does not know its own.
        interval_s: Least seconds between two load reports.
        heartbeat_s: Most seconds between two load reports.
        load: Publisher of load.
        forward_pass: Publisher of forward passes.
        clock: Time.
        metrics: Gauges that mirror the load.
    """

    def __init__(  # noqa: PLR0913 - built once, every argument by name
        self,
        engine: Engine,
        *,
        workers: Sequence[WorkerId],
        active: Callable[[], int],
        interval_s: float,
        heartbeat_s: float,
        load: Publisher,
        forward_pass: Publisher,
        clock: Clock,
        metrics: WorkerMetrics,
    ) -> None:
        self._engine = engine if isinstance(engine, SupportsLoad) else None
        self._reports_passes = isinstance(engine, SupportsForwardPassMetrics)
        self._workers = list(workers)
        self._active = active
        self._interval_s = interval_s
        self._heartbeat_s = heartbeat_s
        self._load = load
        self._forward_pass = forward_pass
        self._clock = clock
        self._metrics = metrics
        self._last: dict[WorkerId, ReportedLoad] = {}
        self._published_at_s = float("-inf")
        self._pass_at_s = float("-inf")
        self._activity = asyncio.Event()
        if isinstance(engine, SupportsForwardPassMetrics):
            engine.set_forward_pass_listener(self._on_forward_pass)

    def notify(self) -> None:
        """Something began or ended: look at the load soon."""
        self._activity.set()

    async def run(self) -> None:
        """Publish until cancelled. Sleeps from heartbeat to heartbeat while nothing happens."""
        while True:
            self.publish()
            await self._clock.sleep(self._interval_s)
            if not self._active() and not self._activity.is_set():
                with contextlib.suppress(TimeoutError):
                    await within(self._clock, self._heartbeat_s - self._interval_s, self._until_activity())
            self._activity.clear()

    def publish(self) -> None:
        """Publish each rank's load if it changed, or if a heartbeat is due."""
        now = self._clock.monotonic()
        due = now - self._published_at_s >= self._heartbeat_s
        for worker in self._workers:
            load = self._reported(worker.dp_rank)
            if due or load != self._last.get(worker):
                self._last[worker] = load
                self._published_at_s = now
                self._publish_one(worker, load)
        if due and self._reports_passes and now - self._pass_at_s >= self._heartbeat_s:
            self._publish_idle_passes()

    async def _until_activity(self) -> None:
        await self._activity.wait()

    def _reported(self, dp_rank: int) -> ReportedLoad:
        if self._engine is not None:
            try:
                return msgspec.structs.replace(self._engine.load(dp_rank=dp_rank), reported_at_s=0.0)
            except Exception:  # a report is not worth a process; the engine is not asked again
                log.exception("engine cannot tell its load; reporting requests only")
                self._engine = None
        return ReportedLoad(active_requests=self._active())

    def _publish_one(self, worker: WorkerId, load: ReportedLoad) -> None:
        stamped = msgspec.structs.replace(load, reported_at_s=self._clock.time())
        self._load.publish(WORKER_LOAD.encode(WorkerLoad(worker, stamped)), schema=WORKER_LOAD.schema)
        rank = str(worker.dp_rank)
        self._metrics.kv_used_blocks.labels(dp_rank=rank).set(load.kv_used_blocks)
        self._metrics.kv_total_blocks.labels(dp_rank=rank).set(load.kv_total_blocks)

    def _on_forward_pass(self, metrics: ForwardPassMetrics) -> None:
        self._pass_at_s = self._clock.monotonic()
        self._forward_pass.publish(FORWARD_PASS_METRICS.encode(metrics), schema=FORWARD_PASS_METRICS.schema)

    def _publish_idle_passes(self) -> None:
        for worker in self._workers:
            idle = ForwardPassMetrics(worker, timestamp_s=self._clock.time())
            self._forward_pass.publish(FORWARD_PASS_METRICS.encode(idle), schema=FORWARD_PASS_METRICS.schema)


def ranks(instance_id: InstanceId, start: int, size: int) -> list[WorkerId]:
    """Return the worker ids of an instance's dp ranks."""
    return [WorkerId(instance_id, rank) for rank in range(start, start + max(1, size))]
