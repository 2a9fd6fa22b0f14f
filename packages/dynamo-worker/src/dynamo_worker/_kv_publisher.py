"""Turns an engine's block changes into numbered events, one batch per event-loop tick, and keeps what was said.

Engines report from any thread. A report only joins a queue there; the event loop numbers, indexes and publishes it,
so that events, ring and index can never disagree.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dynamo_core.clock import Clock
from dynamo_core.enums import Tier
from dynamo_core.events import BlockRemoved, BlocksCleared, BlockStored, KvEvent, KvEventBatch
from dynamo_core.ids import WorkerId
from dynamo_core.kv import BlockDescriptor
from dynamo_core.planes import Publisher
from dynamo_core.tokens import pack_hashes
from dynamo_core.wire import KV_EVENT_BATCH
from dynamo_worker._kv_index import KvIndex
from dynamo_worker._metrics import WorkerMetrics

MAX_BATCH_EVENTS = 512
MAX_PENDING_REPORTS = 1 << 16


@dataclass(frozen=True, slots=True)
class _Stored:
    blocks: tuple[BlockDescriptor, ...]
    tier: Tier
    lora: str


@dataclass(frozen=True, slots=True)
class _Removed:
    hashes: tuple[int, ...]
    tier: Tier


@dataclass(frozen=True, slots=True)
class _Cleared:
    pass


class KvPublisher:
    """The ``KvEventSink`` of one dp rank. Reports may come from any thread; everything else runs on the loop.

    Args:
        worker: Whose blocks.
        block_size: Tokens a block.
        ring_events: Events kept for readers that missed some.
        max_blocks: Most blocks advertised.
        publisher: Where batches go.
        clock: Time stamps.
        metrics: Where counts go.

    Attributes:
        on_change: Called on the loop after blocks have come or gone.
    """

    def __init__(  # noqa: PLR0913 - built once, every argument by name
        self,
        worker: WorkerId,
        *,
        block_size: int,
        ring_events: int,
        max_blocks: int,
        publisher: Publisher,
        clock: Clock,
        metrics: WorkerMetrics,
    ) -> None:
        self.worker = worker
        self.last_event_id = 0
        self.on_change: Callable[[], None] = lambda: None
        self._block_size = block_size
        self._ring: deque[KvEvent] = deque(maxlen=ring_events)
        self._index = KvIndex(max_blocks)
        self._publisher = publisher
        self._clock = clock
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._lock = threading.Lock()
        self._reports: deque[_Stored | _Removed | _Cleared] = deque()
        self._scheduled = False

    def stored(self, blocks: Sequence[BlockDescriptor], *, tier: Tier = Tier.DEVICE, lora: str = "") -> None:
        """Report blocks that became reusable. Not advertised while the event loop is far behind."""
        if len(self._reports) >= MAX_PENDING_REPORTS:
            self._metrics.kv_events_dropped.labels(reason="loop_behind").inc(len(blocks))
            return
        self._report(_Stored(tuple(blocks), tier, lora))

    def removed(self, sequence_hashes: Sequence[int], *, tier: Tier = Tier.DEVICE) -> None:
        """Report blocks that left a tier."""
        self._report(_Removed(tuple(sequence_hashes), tier))

    def cleared(self) -> None:
        """Report that all blocks are gone."""
        self._report(_Cleared())

    def flush(self) -> None:
        """Number, index and publish all reports. Called once a tick; harmless without reports."""
        with self._lock:
            self._scheduled = False
            reports, self._reports = self._reports, deque()
        events = [event for report in reports for event in self._apply(report)]
        for start in range(0, len(events), MAX_BATCH_EVENTS):
            batch = self._batch(tuple(events[start : start + MAX_BATCH_EVENTS]))
            self._publisher.publish(KV_EVENT_BATCH.encode(batch), schema=KV_EVENT_BATCH.schema)
        if events:
            self._metrics.kv_index_blocks.labels(dp_rank=str(self.worker.dp_rank)).set(len(self._index))
            self.on_change()

    def answer(self, first: int | None, last: int | None) -> KvEventBatch:
        """Return events ``first..last`` from the ring, or the whole state if they have left it or were not named."""
        self.flush()
        newest = self.last_event_id if last is None else min(last, self.last_event_id)
        oldest = self.last_event_id - len(self._ring) + 1
        if first is None or first < oldest:
            self._metrics.kv_queries.labels(kind="dump").inc()
            return self._batch(self._index.dump(self.last_event_id), full_dump=True)
        self._metrics.kv_queries.labels(kind="range").inc()
        return self._batch(tuple(self._ring[i - oldest] for i in range(first, newest + 1)))

    def _report(self, report: _Stored | _Removed | _Cleared) -> None:
        with self._lock:
            self._reports.append(report)
            if self._scheduled:
                return
            self._scheduled = True
        if threading.get_ident() == self._loop_thread:
            self._loop.call_soon(self.flush)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.flush)

    def _apply(self, report: _Stored | _Removed | _Cleared) -> list[KvEvent]:
        if isinstance(report, _Stored):
            return self._apply_stored(report)
        if isinstance(report, _Removed):
            gone = self._index.remove(report.hashes, report.tier)
            return [self._number(BlockRemoved(self._next_id(), pack_hashes(gone), report.tier))] if gone else []
        return [self._number(BlocksCleared(self._next_id()))] if self._index.clear() else []

    def _apply_stored(self, report: _Stored) -> list[KvEvent]:
        index, dropped = self._index, self._metrics.kv_events_dropped
        refused, orphans = index.refused, index.orphans
        runs = index.store(report.blocks, report.tier, report.lora)
        if index.refused > refused:
            dropped.labels(reason="index_full").inc(index.refused - refused)
        if index.orphans > orphans:
            dropped.labels(reason="unknown_parent").inc(index.orphans - orphans)
        return [self._number(_stored_event(self._next_id(), run, report)) for run in runs]

    def _next_id(self) -> int:
        self.last_event_id += 1
        return self.last_event_id

    def _number(self, event: BlockStored | BlockRemoved | BlocksCleared) -> KvEvent:
        self._ring.append(event)
        self._metrics.kv_events.labels(kind=type(event).__name__).inc()
        return event

    def _batch(self, events: tuple[KvEvent, ...], *, full_dump: bool = False) -> KvEventBatch:
        return KvEventBatch(self.worker, events, self._block_size, timestamp_s=self._clock.time(), full_dump=full_dump)


def _stored_event(event_id: int, run: Sequence[BlockDescriptor], report: _Stored) -> BlockStored:
    return BlockStored(
        event_id,
        pack_hashes([block.sequence_hash for block in run]),
        pack_hashes([block.local_hash for block in run]),
        run[0].parent_hash,
        start_block=run[0].position,
        tier=report.tier,
        lora=report.lora,
    )
