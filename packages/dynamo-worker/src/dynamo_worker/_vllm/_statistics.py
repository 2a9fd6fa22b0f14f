"""vLLM's own statistics in our terms: load, forward passes, and its Prometheus metrics."""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from dynamo_core.engine import EngineContext
from dynamo_core.ids import WorkerId
from dynamo_core.load import ForwardPassMetrics, QueuedStats, ReportedLoad, ScheduledStats

METRIC_PREFIX = "vllm:"
_RECENT_LOOKUPS = 256


@dataclass
class _Rank:
    """What one scheduler said last, and how its latest lookups in the prefix cache went."""

    last: Any = None
    lookups: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=_RECENT_LOOKUPS))

    def take(self, stats: Any) -> None:
        self.last = stats
        cache = getattr(stats, "prefix_cache_stats", None)
        if cache is not None and getattr(cache, "queries", 0):
            self.lookups.append((int(cache.queries), int(cache.hits)))

    @property
    def hit_rate(self) -> float | None:
        asked = sum(queries for queries, _ in self.lookups)
        return sum(hits for _, hits in self.lookups) / asked if asked else None


class EngineStatistics:
    """A stat logger of vLLM's: hears each scheduler after each of its steps, on the event loop."""

    def __init__(self) -> None:
        self._ranks: dict[int, _Rank] = {}
        self._listener: Callable[[ForwardPassMetrics], None] | None = None
        self._context: EngineContext | None = None
        self._collector: MetricsBridge | None = None
        self._total_blocks = 0
        self._block_size = 0

    def bind(self, context: EngineContext, *, total_blocks: int, block_size: int) -> None:
        """Say whose steps these are, and show vLLM's own metrics beside the worker's."""
        self._context, self._total_blocks, self._block_size = context, total_blocks, block_size
        # vLLM keeps them in the library's global registry; the library is its dependency, hence there.
        source = importlib.import_module("prometheus_client").REGISTRY
        if self._collector is None and source is not context.metrics.registry:
            self._collector = MetricsBridge(source)
            context.metrics.registry.register(self._collector)

    def close(self) -> None:
        """Take vLLM's metrics away again. Idempotent."""
        collector, self._collector = self._collector, None
        if collector is not None and self._context is not None:
            self._context.metrics.registry.unregister(collector)

    def listen(self, listener: Callable[[ForwardPassMetrics], None]) -> None:
        """Report each step to ``listener``, if vLLM times its steps."""
        self._listener = listener

    def for_engine(self, config: Any, index: int = 0) -> EngineStatistics:
        """Return the logger of one rank: vLLM calls this as a factory."""
        return self

    def record(self, scheduler_stats: Any = None, *_: Any, engine_idx: int = 0, **__: Any) -> None:
        """Keep the newest numbers, and tell of the step."""
        if scheduler_stats is None:
            return
        self._ranks.setdefault(engine_idx, _Rank()).take(scheduler_stats)
        details = getattr(scheduler_stats, "iteration_details", None)
        if details is not None and self._listener is not None and self._context is not None:
            self._listener(self._forward_pass(scheduler_stats, details, engine_idx, self._context))

    def log(self, *_: Any, **__: Any) -> None:
        """VLLM asks for a line in its log; ours has none."""

    def log_engine_initialized(self, *_: Any, **__: Any) -> None:
        """Nothing to say at start."""

    def record_sleep_state(self, *_: Any, **__: Any) -> None:
        """Nothing to keep."""

    def load(self, rank: int, *, waiting_prefill_tokens: int = 0) -> ReportedLoad:
        """Return the load of a rank as its scheduler said it last."""
        known = self._ranks.get(rank, _Rank())
        return ReportedLoad(
            kv_used_blocks=self._used_blocks(known.last),
            kv_total_blocks=self._total_blocks,
            active_requests=int(getattr(known.last, "num_running_reqs", 0)),
            waiting_requests=_waiting(known.last),
            waiting_prefill_tokens=waiting_prefill_tokens,
            cache_hit_rate=known.hit_rate,
        )

    def idle_load(self, rank: int) -> ReportedLoad:
        """Return the load of a rank without requests: its last numbers are of a step that had some."""
        return ReportedLoad(kv_total_blocks=self._total_blocks, cache_hit_rate=self._ranks.get(rank, _Rank()).hit_rate)

    def _used_blocks(self, stats: Any) -> int:
        return round(float(getattr(stats, "kv_cache_usage", 0.0)) * self._total_blocks)

    def _forward_pass(self, stats: Any, details: Any, rank: int, context: EngineContext) -> ForwardPassMetrics:
        # vLLM does not say how long its sequences are: the blocks in use do, but for the part that was just computed.
        held = max(0, self._used_blocks(stats) * self._block_size - int(details.num_ctx_tokens))
        decodes = int(details.num_generation_requests)
        return ForwardPassMetrics(
            worker=WorkerId(context.instance_id, rank),
            wall_time_s=float(details.elapsed_ms) / 1000,
            scheduled=ScheduledStats(
                num_prefill_requests=int(details.num_ctx_requests),
                sum_prefill_tokens=int(details.num_ctx_tokens),
                num_decode_requests=decodes,
                sum_decode_kv_tokens=held if decodes else 0,
            ),
            queued=QueuedStats(num_prefill_requests=_waiting(stats)),
            timestamp_s=context.clock.time(),
        )


class MetricsBridge:
    """A Prometheus collector that shows vLLM's families of another registry.

    Args:
        source: The registry that vLLM writes to.
    """

    def __init__(self, source: Any) -> None:
        self._source = source

    def collect(self) -> Iterator[Any]:
        """Yield vLLM's metric families, under the names and labels that vLLM gives them."""
        for family in self._source.collect():
            if family.name.startswith(METRIC_PREFIX):
                yield family


def _waiting(stats: Any) -> int:
    return sum(int(getattr(stats, name, 0)) for name in ("num_waiting_reqs", "num_skipped_waiting_reqs"))
