"""A worker as a model: prefill in order of arrival, decode beside it, and an LRU cache of KV blocks."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Annotated

import msgspec

from dynamo_core.events import BlockRemoved, BlockStored, KvEvent
from dynamo_core.ids import WorkerId
from dynamo_core.tokens import HASH_BYTES, PackedHashes, pack_hashes, unpack_hashes
from dynamo_router._lab_trace import TraceRequest

_LEAST_TOKEN_S = 0.001
Positive = Annotated[float, msgspec.Meta(gt=0)]


class WorkerModel(msgspec.Struct, frozen=True):
    """Speed and size of a modelled worker.

    Attributes:
        prefill_tokens_per_s: Uncached prompt tokens computed a second.
        decode_s: Seconds a token of one running request.
        decode_slowdown: Share of ``decode_s`` that each further running request adds.
        prefill_slowdown: Share by which each running request slows prefill.
        kv_blocks: Blocks the device holds.
        overhead_s: Seconds that each prefill costs beside its tokens.
        prefill_square_s: Seconds for the square of a prefill's uncached tokens, for attention among them.
        decode_occupancy_s: Seconds a token by the share ``p`` of device blocks in use, as the coefficients of
            ``1, p, p**2``; instead of ``decode_s`` and ``decode_slowdown`` if given.
    """

    prefill_tokens_per_s: Positive = 8000.0
    decode_s: Positive = 0.025
    decode_slowdown: float = 0.0
    prefill_slowdown: float = 0.0
    kv_blocks: int = 3000
    overhead_s: float = 0.0
    prefill_square_s: float = 0.0
    decode_occupancy_s: tuple[float, float, float] | None = None

    def prefill_time_s(self, tokens: int, running: int) -> float:
        """Return how long a prefill takes beside running requests."""
        rate = self.prefill_tokens_per_s / (1.0 + self.prefill_slowdown * running)
        return self.overhead_s + tokens / rate + self.prefill_square_s * tokens * tokens

    def token_time_s(self, running: int, used: float) -> float:
        """Return how long one token of each running request takes, by their number and the share of used blocks."""
        if self.decode_occupancy_s is None:
            return self.decode_s * (1.0 + self.decode_slowdown * (running - 1))
        constant, linear, square = self.decode_occupancy_s
        return max(constant + linear * used + square * used * used, _LEAST_TOKEN_S)


class BlockCache:
    """Blocks of one worker: pinned while requests use them, least recently used first to go after that."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._pins: dict[int, int] = {}
        # Unpinned blocks, next to evict first. A request's blocks are freed tail first, so leaves go before parents.
        self._idle: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pins) + len(self._idle)

    @property
    def pinned(self) -> int:
        """Blocks in use."""
        return len(self._pins)

    def fits(self, hashes: Sequence[int]) -> bool:
        """Return whether blocks can be held beside those in use."""
        return len(self._pins) + sum(key not in self._pins for key in hashes) <= self.capacity

    def depth(self, hashes: Sequence[int]) -> int:
        """Return how many leading blocks are held."""
        for depth, key in enumerate(hashes):
            if key not in self._pins and key not in self._idle:
                return depth
        return len(hashes)

    def pin(self, hashes: Sequence[int]) -> list[int]:
        """Hold blocks for a request; returns those evicted for them."""
        for key in hashes:
            self._idle.pop(key, None)
            self._pins[key] = self._pins.get(key, 0) + 1
        evicted: list[int] = []
        while len(self) > self.capacity and self._idle:
            evicted.append(self._idle.popitem(last=False)[0])
        return evicted

    def unpin(self, hashes: Sequence[int]) -> None:
        """Let a request's blocks be evicted again."""
        for key in reversed(hashes):
            count = self._pins.pop(key)
            if count > 1:
                self._pins[key] = count - 1
            else:
                self._idle[key] = None


class Job:
    """One request on a modelled worker."""

    __slots__ = ("cached_blocks", "hashes", "request")

    def __init__(self, request: TraceRequest) -> None:
        self.request = request
        self.hashes = list(unpack_hashes(request.sequence))
        self.cached_blocks = 0


class ModelWorker:
    """One modelled worker. The replay loop tells it when things happen; it tells how long they take."""

    def __init__(self, worker: WorkerId, model: WorkerModel, block_size: int) -> None:
        self.worker = worker
        self.model = model
        self.cache = BlockCache(model.kv_blocks)
        self.waiting: deque[Job] = deque()
        self.running = 0
        self.busy = False
        self.prefilled_tokens = 0
        self._block_size = block_size
        self._event_id = 0

    def next_job(self) -> Job | None:
        """Return the next request to prefill if the worker is free and has room for it."""
        if self.busy or not self.waiting:
            return None
        job = self.waiting[0]
        fits = self.cache.fits(job.hashes)
        return self.waiting.popleft() if fits or not self.running else None

    def begin(self, job: Job) -> tuple[float, list[KvEvent]]:
        """Begin a prefill; returns its duration and the evictions it caused."""
        self.busy = True
        job.cached_blocks = self.cache.depth(job.hashes)
        evicted = self.cache.pin(job.hashes)
        uncached = self.uncached_tokens(job)
        self.prefilled_tokens += uncached
        events: list[KvEvent] = []
        if evicted:
            events.append(BlockRemoved(self._next_id(), pack_hashes(evicted)))
        return self.model.prefill_time_s(uncached, self.running), events

    def finish_prefill(self, job: Job) -> tuple[float, list[KvEvent]]:
        """End a prefill; returns how long decoding takes, and the blocks that became reusable."""
        self.busy = False
        self.running += 1
        per_token = self.model.token_time_s(self.running, self.cache.pinned / self.cache.capacity)
        return per_token * (job.request.output_tokens - 1), self._stored(job)

    def finish(self, job: Job) -> None:
        """End a request."""
        self.running -= 1
        self.cache.unpin(job.hashes)

    def uncached_tokens(self, job: Job) -> int:
        """Prompt tokens that this worker computes for a request; at least one."""
        return max(job.request.prompt_tokens - job.cached_blocks * self._block_size, 1)

    def _stored(self, job: Job) -> list[KvEvent]:
        first = job.cached_blocks
        if first >= len(job.hashes):
            return []
        request = job.request
        parent = job.hashes[first - 1] if first else None
        start = first * HASH_BYTES
        engine, local = PackedHashes(request.sequence[start:]), PackedHashes(request.local[start:])
        return [BlockStored(self._next_id(), engine, local, parent, first)]

    def _next_id(self) -> int:
        self._event_id += 1
        return self._event_id
