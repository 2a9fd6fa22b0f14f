"""Applies KV events to the index in the order in which each worker emitted them.

Every (worker, dp rank) has its own stream of event ids. Duplicates are dropped by id. A gap stops the stream: what
follows is held back while the caller fetches the missing range, or a full dump, with the query that ``apply``
returns. If nobody can fetch it the stream goes on, marked as lossy.
"""

from __future__ import annotations

import enum
from collections import Counter, deque
from dataclasses import dataclass, field

from dynamo_core.errors import InvalidRequestError
from dynamo_core.events import BlocksCleared, KvEvent, KvEventBatch, KvEventQuery
from dynamo_core.ids import WorkerId
from dynamo_core.tokens import require_algorithm
from dynamo_router._index import Applied, BlockIndex

MAX_HELD_EVENTS = 4096


class StreamState(enum.Enum):
    """What the index knows of one worker's stream."""

    UNKNOWN = "unknown"
    LIVE = "live"
    RECOVERING = "recovering"
    LOSSY = "lossy"
    REFUSED = "refused"


@dataclass(slots=True)
class Stream:
    """Position in one worker's events.

    Attributes:
        last_id: Id of the newest event applied; None before the first.
        state: How far the index can be believed for this worker.
        held: Events that wait for a recovery, oldest first.
        detail: Why the state is what it is, for people.
        updated_at_s: Unix time that the newest batch carried.
        recoverable: Whether what it lacks can be fetched.
    """

    last_id: int | None = None
    state: StreamState = StreamState.UNKNOWN
    held: deque[KvEvent] = field(default_factory=deque[KvEvent])
    detail: str = ""
    updated_at_s: float = 0.0
    recoverable: bool = False


class Indexer:
    """Keeps a ``BlockIndex`` in step with the workers' events. Not thread-safe.

    Args:
        index: What to keep.
        block_size: Tokens a block that every worker must have; batches that name another are refused.
        recoverable: Whether the caller answers queries. If not, gaps only make a stream lossy.
    """

    def __init__(self, index: BlockIndex, *, block_size: int, recoverable: bool = False) -> None:
        self.index = index
        self.block_size = block_size
        self.recoverable = recoverable
        self.counts: Counter[str] = Counter()
        # Slots whose index is the worker's truth, apart from what is on its way.
        self.live = 0
        self._streams: dict[WorkerId, Stream] = {}

    def stream(self, worker: WorkerId) -> Stream:
        """Return a worker's stream; one that was never heard of is ``UNKNOWN``."""
        return self._streams.get(worker) or self._begun()

    def streams(self) -> dict[WorkerId, Stream]:
        """Return all streams."""
        return dict(self._streams)

    def add_worker(self, worker: WorkerId, *, recoverable: bool = True) -> KvEventQuery | None:
        """Begin a worker's stream; returns the dump to fetch if recovery is available and it is new.

        Args:
            worker: Whose it is.
            recoverable: Whether this worker answers queries; engines that publish by themselves do not.
        """
        if worker in self._streams:
            return None
        stream = self._streams[worker] = self._begun(recoverable=recoverable)
        self.index.slot(worker)
        return self._recover(worker, stream, None, "new worker") if stream.recoverable else None

    def remove_worker(self, worker: WorkerId) -> None:
        """Forget a worker, its stream and what it held."""
        if self._streams.pop(worker, None) is not None:
            self.live &= ~(1 << self.index.slot(worker))
        self.index.remove_worker(worker)

    def apply(self, batch: KvEventBatch) -> KvEventQuery | None:
        """Apply a batch from the worker's stream.

        Returns:
            What to fetch from the worker before the stream can go on; None if nothing is missing.

        Raises:
            InvalidRequestError: if the batch has another block size or hash algorithm; the worker's stream is then
                ``REFUSED`` until a batch fits, and what it held is forgotten.
        """
        stream = self._streams.get(batch.worker)
        if stream is None:
            stream = self._streams[batch.worker] = self._begun()
        self._require_fit(batch, stream)
        stream.updated_at_s = batch.timestamp_s or stream.updated_at_s
        if batch.full_dump:
            self._restore(batch, stream)
            return None
        return self._advance(batch.worker, stream, deque(batch.events))

    def recovered(self, batch: KvEventBatch) -> KvEventQuery | None:
        """Apply the answer to a query, then what was held back meanwhile; returns a further query if still short.

        Raises:
            InvalidRequestError: as ``apply`` does.
        """
        stream = self._streams.get(batch.worker)
        if stream is None:
            return None
        self._require_fit(batch, stream)
        held, stream.held = stream.held, deque()
        self._enter(batch.worker, stream, StreamState.LIVE)
        if batch.full_dump:
            self._restore(batch, stream)
            return self._advance(batch.worker, stream, held)
        missing = self._advance(batch.worker, stream, deque(batch.events))
        if missing is None and (held or not batch.events):
            missing = self._advance(batch.worker, stream, held) if batch.events else KvEventQuery(batch.worker)
        if missing is None:
            return None
        # The worker's ring no longer reaches back far enough, so only its whole state helps.
        stream.held.extend(held)
        return self._recover(batch.worker, stream, None, stream.detail or "the missing events are gone")

    def begin_restored(self, worker: WorkerId, last_id: int | None) -> None:
        """Empty a worker's part of the index for a restored state, and believe it as of an event id."""
        stream = self._streams.setdefault(worker, self._begun())
        self.index.clear(worker)
        stream.last_id = last_id
        self._enter(worker, stream, StreamState.LIVE)
        self.counts["restored"] += 1

    def resync(self, worker: WorkerId) -> KvEventQuery:
        """Begin a recovery of a worker's whole state, and return the dump to fetch."""
        stream = self._streams.setdefault(worker, self._begun())
        return self._recover(worker, stream, None, "resync")

    def abandon(self, worker: WorkerId, reason: str) -> None:
        """Give up a recovery: apply what was held back and mark the stream as lossy."""
        stream = self._streams.get(worker)
        if stream is None or stream.state is not StreamState.RECOVERING:
            return
        self._enter(worker, stream, StreamState.LOSSY, reason)
        while stream.held:
            self._apply_one(worker, stream, stream.held.popleft())

    def _begun(self, *, recoverable: bool = True) -> Stream:
        return Stream(recoverable=self.recoverable and recoverable)

    # -- internals ---------------------------------------------------------------------------------------------------

    def _require_fit(self, batch: KvEventBatch, stream: Stream) -> None:
        try:
            self._require_block_size(batch)
            require_algorithm(batch.algorithm)
        except InvalidRequestError as error:
            self.counts["refused"] += 1
            self.index.clear(batch.worker)
            stream.held.clear()
            stream.last_id = None
            self._enter(batch.worker, stream, StreamState.REFUSED, error.message)
            raise
        if stream.state is StreamState.REFUSED:
            self._enter(batch.worker, stream, StreamState.UNKNOWN)

    def _require_block_size(self, batch: KvEventBatch) -> None:
        if batch.block_size not in (0, self.block_size):
            raise InvalidRequestError(
                f"worker {batch.worker} emits KV events of block size {batch.block_size}, "
                f"this router indexes blocks of {self.block_size}; start both with the same block size",
                reason="request.block_size_mismatch",
                param="block_size",
            )

    def _restore(self, batch: KvEventBatch, stream: Stream) -> None:
        self.index.clear(batch.worker)
        for event in batch.events:
            self._count(event, self.index.apply(batch.worker, event))
        stream.last_id = max((event.event_id for event in batch.events), default=stream.last_id)
        self._enter(batch.worker, stream, StreamState.LIVE)
        stream.held.clear()
        self.counts["dumps"] += 1

    def _advance(self, worker: WorkerId, stream: Stream, events: deque[KvEvent]) -> KvEventQuery | None:
        if stream.state is StreamState.RECOVERING:
            return self._hold(worker, stream, events)
        while events:
            event = events[0]
            last = stream.last_id
            if last is not None and event.event_id <= last:
                self.counts["duplicates"] += 1
                events.popleft()
                continue
            expected = 1 if last is None else last + 1
            if event.event_id > expected and (query := self._gap(worker, stream, expected, event)) is not None:
                stream.held.extend(events)
                return query
            events.popleft()
            result = self._apply_one(worker, stream, event)
            if result is Applied.UNKNOWN_PARENT and self._may_ask(worker, stream):
                stream.held.extend(events)
                return self._recover(worker, stream, None, f"event {event.event_id} names an unknown parent")
        return None

    def _hold(self, worker: WorkerId, stream: Stream, events: deque[KvEvent]) -> None:
        stream.held.extend(events)
        while len(stream.held) > MAX_HELD_EVENTS:
            stream.held.popleft()
            self.counts["held_overflow"] += 1

    def _gap(self, worker: WorkerId, stream: Stream, expected: int, event: KvEvent) -> KvEventQuery | None:
        # What a lossy stream lacks is older than this gap, so only a dump makes it whole.
        first = None if stream.last_id is None or stream.state is StreamState.LOSSY else expected
        self.counts["gaps"] += 1
        if stream.recoverable:
            reason = f"events {expected}..{event.event_id - 1} are missing"
            return self._recover(worker, stream, first, reason, last=event.event_id - 1)
        if stream.last_id is not None:
            self._enter(worker, stream, StreamState.LOSSY, f"events {expected}..{event.event_id - 1} were lost")
        return None

    def _may_ask(self, worker: WorkerId, stream: Stream) -> bool:
        # What the memory bound dropped, no dump can bring back.
        return stream.recoverable and not self.index.is_lossy(worker)

    def _recover(
        self, worker: WorkerId, stream: Stream, first: int | None, reason: str, last: int | None = None
    ) -> KvEventQuery:
        self._enter(worker, stream, StreamState.RECOVERING, reason)
        self.counts["recoveries"] += 1
        return KvEventQuery(worker, first, last if first is not None else None)

    def _apply_one(self, worker: WorkerId, stream: Stream, event: KvEvent) -> Applied:
        result = self.index.apply(worker, event)
        self._count(event, result)
        stream.last_id = event.event_id
        if result is Applied.UNKNOWN_PARENT:
            self._enter(worker, stream, StreamState.LOSSY, f"event {event.event_id} names an unknown parent")
        elif stream.state is StreamState.UNKNOWN or (type(event) is BlocksCleared and event.tier is None):
            self._enter(worker, stream, StreamState.LIVE)
        return result

    def _enter(self, worker: WorkerId, stream: Stream, state: StreamState, detail: str = "") -> None:
        stream.state, stream.detail = state, detail
        bit = 1 << self.index.slot(worker)
        if state is StreamState.LIVE:
            self.live |= bit
        elif state is not StreamState.RECOVERING:
            # While a recovery runs, what was known before it is still the best there is.
            self.live &= ~bit

    def _count(self, event: KvEvent, result: Applied) -> None:
        self.counts[result.value] += 1
