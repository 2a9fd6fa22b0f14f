"""Metrics of the reference engine."""

from __future__ import annotations

from dynamo_core.telemetry import Metrics
from dynamo_worker._reference._core import EngineCore, StepStats

REQUESTS = "dynamo_worker_reference_requests"
KV_BLOCKS = "dynamo_worker_reference_kv_blocks"
PREEMPTIONS = "dynamo_worker_reference_preemptions_total"
GRAMMARS = "dynamo_worker_reference_grammars"
STEP_SECONDS = "dynamo_worker_reference_step_seconds"

_STEP_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


class EngineMetrics:
    """Gauges and counters of one engine, over all its ranks, set after each step on the event loop."""

    def __init__(self, metrics: Metrics, ranks: int) -> None:
        requests = metrics.gauge(REQUESTS, "Sequences inside the engine", ["state"])
        blocks = metrics.gauge(KV_BLOCKS, "KV blocks on the device; cached ones may be in use too", ["state"])
        self._gauges = (
            requests.labels(state="running"),
            requests.labels(state="waiting"),
            blocks.labels(state="used"),
            blocks.labels(state="cached"),
        )
        self._preemptions = metrics.counter(PREEMPTIONS, "Sequences that lost their KV blocks to older ones")
        self._grammars = metrics.gauge(GRAMMARS, "Output constraints kept compiled")
        self._step_seconds = metrics.histogram(STEP_SECONDS, "Seconds of one step", buckets=_STEP_BUCKETS_S)
        self._of_ranks = [(0, 0, 0, 0)] * ranks

    def observe(
        self, core: EngineCore, dp_rank: int, num_grammars: int, stats: StepStats | None, wall_time_s: float
    ) -> None:
        """Record the state of a rank after a step."""
        scheduler, pool = core.scheduler, core.pool
        self._of_ranks[dp_rank] = (
            len(scheduler.running),
            len(scheduler.waiting),
            pool.num_used_blocks,
            pool.num_cached_blocks,
        )
        for gauge, values in zip(self._gauges, zip(*self._of_ranks, strict=True), strict=True):
            gauge.set(sum(values))
        self._grammars.set(num_grammars)
        if stats is not None:
            self._step_seconds.observe(wall_time_s)
            self._preemptions.inc(stats.num_preempted)
