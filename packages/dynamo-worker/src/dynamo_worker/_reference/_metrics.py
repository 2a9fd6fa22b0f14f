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
    """Gauges and counters of one engine, set after each step on the event loop."""

    def __init__(self, metrics: Metrics, ranks: int) -> None:
        requests = metrics.gauge(REQUESTS, "Sequences inside the engine", ["state", "dp_rank"])
        blocks = metrics.gauge(
            KV_BLOCKS, "KV blocks on the device; cached ones may be in use too", ["state", "dp_rank"]
        )
        names = [str(rank) for rank in range(ranks)]
        self._running = [requests.labels(state="running", dp_rank=name) for name in names]
        self._waiting = [requests.labels(state="waiting", dp_rank=name) for name in names]
        self._used = [blocks.labels(state="used", dp_rank=name) for name in names]
        self._cached = [blocks.labels(state="cached", dp_rank=name) for name in names]
        self._preemptions = metrics.counter(PREEMPTIONS, "Sequences that lost their KV blocks to older ones")
        self._grammars = metrics.gauge(GRAMMARS, "Output constraints kept compiled")
        self._step_seconds = metrics.histogram(STEP_SECONDS, "Seconds of one step", buckets=_STEP_BUCKETS_S)

    def observe(
        self, core: EngineCore, dp_rank: int, num_grammars: int, stats: StepStats | None, wall_time_s: float
    ) -> None:
        """Record the state of a rank after a step."""
        self._running[dp_rank].set(len(core.scheduler.running))
        self._waiting[dp_rank].set(len(core.scheduler.waiting))
        self._used[dp_rank].set(core.pool.num_used_blocks)
        self._cached[dp_rank].set(core.pool.num_cached_blocks)
        self._grammars.set(num_grammars)
        if stats is not None:
            self._step_seconds.observe(wall_time_s)
            self._preemptions.inc(stats.num_preempted)
