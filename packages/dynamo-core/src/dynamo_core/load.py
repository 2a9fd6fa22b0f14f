"""Load of a worker. Three meanings are kept apart: what it reports, what a router projects, what waits."""

from __future__ import annotations

import msgspec

from dynamo_core.ids import WorkerId


class ReportedLoad(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the engine itself measured last.

    Attributes:
        kv_used_blocks: Device blocks in use, cached unreferenced ones not counted.
        kv_total_blocks: Device blocks in all.
        active_requests: Requests that run.
        waiting_requests: Requests that wait inside the engine.
        waiting_prefill_tokens: Uncached prompt tokens of the waiting ones.
        cache_hit_rate: Share of prompt tokens served from cache, recent; None without data.
        reported_at_s: Unix time of the report.
    """

    kv_used_blocks: int = 0
    kv_total_blocks: int = 0
    active_requests: int = 0
    waiting_requests: int = 0
    waiting_prefill_tokens: int = 0
    cache_hit_rate: float | None = None
    reported_at_s: float = 0.0


class ProjectedLoad(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a router expects from its own decisions, exact between reports.

    Attributes:
        prefill_tokens: Uncached prompt tokens of requests before their first token.
        decode_blocks: Distinct blocks held by running requests; shared prefixes count once.
        active_requests: Requests booked and not complete.
    """

    prefill_tokens: int = 0
    decode_blocks: int = 0
    active_requests: int = 0


class QueuedLoad(msgspec.Struct, frozen=True, omit_defaults=True):
    """What waits in a router's queue for this worker (or, pool-wide, for any)."""

    requests: int = 0
    prompt_tokens: int = 0
    uncached_tokens: int = 0


class WorkerLoad(msgspec.Struct, frozen=True, omit_defaults=True):
    """The three meanings side by side for one worker."""

    worker: WorkerId
    reported: ReportedLoad | None = None
    projected: ProjectedLoad = ProjectedLoad()
    queued: QueuedLoad = QueuedLoad()


class ScheduledStats(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one forward pass computed."""

    num_prefill_requests: int = 0
    sum_prefill_tokens: int = 0
    var_prefill_length: float = 0.0
    sum_prefill_kv_tokens: int = 0
    num_decode_requests: int = 0
    sum_decode_kv_tokens: int = 0
    var_decode_kv_tokens: float = 0.0


class QueuedStats(msgspec.Struct, frozen=True, omit_defaults=True):
    """What waited while one forward pass ran."""

    num_prefill_requests: int = 0
    sum_prefill_tokens: int = 0
    var_prefill_length: float = 0.0
    num_decode_requests: int = 0
    sum_decode_kv_tokens: int = 0
    var_decode_kv_tokens: float = 0.0


class ForwardPassMetrics(msgspec.Struct, frozen=True, omit_defaults=True):
    """One engine step as data.

    Attributes:
        worker: Which worker.
        wall_time_s: Seconds of the pass; 0 on an idle heartbeat.
        scheduled: What it computed.
        queued: What waited.
        timestamp_s: Unix time at its end.
    """

    worker: WorkerId
    wall_time_s: float = 0.0
    scheduled: ScheduledStats = ScheduledStats()
    queued: QueuedStats = QueuedStats()
    timestamp_s: float = 0.0
