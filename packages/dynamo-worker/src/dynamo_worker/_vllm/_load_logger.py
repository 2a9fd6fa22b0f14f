"""Load from vLLM's own statistics."""

from __future__ import annotations

from typing import Any

from dynamo_core.load import ReportedLoad


class LoadLogger:
    """What vLLM's scheduler says of itself after each step, by rank."""

    def __init__(self) -> None:
        self._last: dict[int, Any] = {}

    def for_engine(self, config: Any, index: int = 0) -> LoadLogger:
        """Return the logger of one rank: vLLM calls this as a factory."""
        return self

    def record(self, scheduler_stats: Any = None, *_: Any, engine_idx: int = 0, **__: Any) -> None:
        """Keep the newest numbers."""
        if scheduler_stats is not None:
            self._last[engine_idx] = scheduler_stats

    def log(self, *_: Any, **__: Any) -> None:
        """VLLM asks for a line in its log; ours has none."""

    def log_engine_initialized(self, *_: Any, **__: Any) -> None:
        """Nothing to say at start."""

    def record_sleep_state(self, *_: Any, **__: Any) -> None:
        """Nothing to keep."""

    def of(self, rank: int, total_blocks: int) -> ReportedLoad:
        """Return the load of a rank."""
        stats = self._last.get(rank)
        return ReportedLoad(
            kv_used_blocks=round(float(getattr(stats, "kv_cache_usage", 0.0)) * total_blocks),
            kv_total_blocks=total_blocks,
            active_requests=int(getattr(stats, "num_running_reqs", 0)),
            waiting_requests=int(getattr(stats, "num_waiting_reqs", 0)),
        )
