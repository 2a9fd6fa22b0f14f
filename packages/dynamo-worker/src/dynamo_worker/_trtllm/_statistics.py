"""TensorRT-LLM's iteration statistics in our terms: load and forward passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dynamo_core.engine import EngineContext
from dynamo_core.ids import WorkerId
from dynamo_core.load import ForwardPassMetrics, QueuedStats, ReportedLoad, ScheduledStats


class IterationStatistics:
    """What TensorRT-LLM said of its latest iteration."""

    def __init__(self) -> None:
        self._last: Mapping[str, Any] = {}
        self._listener: Callable[[ForwardPassMetrics], None] | None = None

    def listen(self, listener: Callable[[ForwardPassMetrics], None]) -> None:
        """Report each iteration to ``listener``."""
        self._listener = listener

    def take(self, stat: Mapping[str, Any], context: EngineContext) -> None:
        """Keep an iteration's numbers, and tell of it."""
        self._last = stat
        if self._listener is not None:
            self._listener(_forward_pass(stat, context))

    @property
    def total_blocks(self) -> int:
        """Blocks of the device cache; 0 before the first iteration."""
        return int(self._cache.get("maxNumBlocks", 0))

    def load(self) -> ReportedLoad:
        """Return the load."""
        cache = self._cache
        return ReportedLoad(
            kv_used_blocks=int(cache.get("usedNumBlocks", 0)),
            kv_total_blocks=self.total_blocks,
            active_requests=int(self._last.get("numActiveRequests", 0)),
            waiting_requests=int(self._last.get("numQueuedRequests", 0)),
            cache_hit_rate=float(cache["cacheHitRate"]) if "cacheHitRate" in cache else None,
        )

    @property
    def _cache(self) -> Mapping[str, Any]:
        return self._last.get("kvCacheStats") or {}


def _forward_pass(stat: Mapping[str, Any], context: EngineContext) -> ForwardPassMetrics:
    batch: Mapping[str, Any] = stat.get("inflightBatchingStats") or {}
    cache: Mapping[str, Any] = stat.get("kvCacheStats") or {}
    decodes, prefill_tokens = int(batch.get("numGenRequests", 0)), int(batch.get("numCtxTokens", 0))
    # It does not say how long its sequences are: the blocks in use do, but for the part that was just computed.
    held = int(cache.get("usedNumBlocks", 0)) * int(cache.get("tokensPerBlock", 0)) - prefill_tokens
    return ForwardPassMetrics(
        worker=WorkerId(context.instance_id, int(stat.get("attentionDpRank") or 0)),
        wall_time_s=float(stat.get("iterLatencyMS", 0.0)) / 1000,
        scheduled=ScheduledStats(
            num_prefill_requests=int(batch.get("numContextRequests", 0)),
            sum_prefill_tokens=prefill_tokens,
            num_decode_requests=decodes,
            sum_decode_kv_tokens=max(0, held) if decodes else 0,
        ),
        queued=QueuedStats(num_prefill_requests=int(stat.get("numQueuedRequests", 0))),
        timestamp_s=context.clock.time(),
    )
