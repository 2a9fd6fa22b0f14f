"""Replays a trace against an eviction order and counts prefix hits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dynamo_core import plugins
from dynamo_kvbm._eviction.base import EvictionOrder
from dynamo_kvbm._eviction.hinted import HintedOrder
from dynamo_kvbm._lab.future import NEVER, next_turns, next_uses
from dynamo_kvbm._lab.oracle import OracleOrder
from dynamo_kvbm._lab.trace import TraceRequest

PROGRESS_EVERY = 500
ORACLE = "oracle"
HINTED = "hinted"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Outcome:
    """What one policy did at one size.

    Attributes:
        policy: Its name.
        capacity_blocks: Size of the tier.
        hit_blocks: Blocks found.
        asked_blocks: Blocks asked for.
        computed_tokens: Prompt tokens that were not found.
        requests: Requests replayed.
    """

    policy: str
    capacity_blocks: int
    hit_blocks: int
    asked_blocks: int
    computed_tokens: int
    requests: int

    @property
    def hit_percent(self) -> float:
        """Share of the blocks that were found."""
        return 100 * self.hit_blocks / self.asked_blocks if self.asked_blocks else 0.0

    def mean_prefill_s(self, tokens_per_s: float) -> float:
        """Mean time to compute what was not found."""
        return self.computed_tokens / tokens_per_s / self.requests


class TraceClock:
    """The time of the request that is replayed."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        """Return the arrival of the current request."""
        return self.now_s

    def time(self) -> float:
        """Return the arrival of the current request."""
        return self.now_s

    async def sleep(self, delay_s: float) -> None:
        """Let the time pass at once."""
        self.now_s += delay_s


class _Replay:
    """One cache. Subclasses add what a policy is told."""

    def __init__(self, trace: Sequence[TraceRequest], order: EvictionOrder, capacity_blocks: int) -> None:
        self._trace = trace
        self._order = order
        self._capacity = capacity_blocks
        self.hits = 0
        self.computed_tokens = 0

    def step(self, index: int) -> None:
        request = self._trace[index]
        path, order = request.path, self._order
        hit = 0
        while hit < len(path) and path[hit] in order:
            hit += 1
        self.hits += hit
        self.computed_tokens += max(0, request.input_tokens - math.ceil(request.input_tokens * hit / len(path)))
        self.tell(index)
        order.touch(path[:hit])
        self._insert(path, hit, self.admitted(index, hit))
        self.tell_after(index)

    def tell(self, index: int) -> None:
        """Tell the order what is known when a request arrives."""

    def tell_after(self, index: int) -> None:
        """Tell the order what is known of a request whose blocks are in."""

    def admitted(self, index: int, hit: int) -> int:
        """Return how many blocks of a request may be in the cache after it."""
        return len(self._trace[index].path)

    def _insert(self, path: Sequence[int], hit: int, end: int) -> None:
        held = path[hit - 1 : hit] if hit else ()
        self._order.pin(held)
        room = self._capacity - len(self._order)
        while room < end - hit and self._order.evict() is not None:
            room += 1
        fresh = path[hit : min(end, hit + room)]
        parents = [path[hit - 1] if hit else None, *fresh]
        self._order.insert(list(zip(fresh, parents, strict=False)))
        self._order.unpin(held)


class _HintedReplay(_Replay):
    """A session says when its next turn comes, or that it ends; what ends is not kept."""

    def __init__(
        self, trace: Sequence[TraceRequest], order: HintedOrder, capacity_blocks: int, clock: TraceClock
    ) -> None:
        super().__init__(trace, order, capacity_blocks)
        self._hints = next_turns(trace)
        self._hinted = order
        self._clock = clock

    def tell(self, index: int) -> None:
        self._clock.now_s = self._trace[index].arrival_s

    def tell_after(self, index: int) -> None:
        held = [block for block in self._trace[index].path if block in self._hinted]
        self._hinted.expect(held, self._hints[index])

    def admitted(self, index: int, hit: int) -> int:
        return hit if self._hints[index] is None else len(self._trace[index].path)


class _OracleReplay(_Replay):
    def __init__(self, trace: Sequence[TraceRequest], order: OracleOrder, capacity_blocks: int) -> None:
        super().__init__(trace, order, capacity_blocks)
        self._uses = next_uses(trace)
        self._oracle = order

    def tell(self, index: int) -> None:
        self._oracle.foresee(dict(zip(self._trace[index].path, self._uses[index], strict=True)))

    def admitted(self, index: int, hit: int) -> int:
        # The next use of a block is never later than that of the block behind it.
        return sum(1 for time in self._uses[index] if time != NEVER)


def simulate(
    trace: Sequence[TraceRequest], policy: str, capacity_blocks: int, *, progress: Progress | None = None
) -> Outcome:
    """Replay a trace.

    Args:
        trace: Requests in order of arrival.
        policy: An installed eviction order, or ``oracle``. ``hinted`` is told, for each request, when the next turn of
            its session comes, as the trace has it.
        capacity_blocks: Size of the cache.
        progress: Called now and then with requests done and in all.

    Raises:
        ConfigurationError: if the policy is not installed.
    """
    replay = _replay_of(trace, policy, capacity_blocks)
    for index in range(len(trace)):
        if trace[index].path:
            replay.step(index)
        if progress is not None and index % PROGRESS_EVERY == 0:
            progress(index, len(trace))
    asked = sum(len(request.path) for request in trace)
    return Outcome(policy, capacity_blocks, replay.hits, asked, replay.computed_tokens, len(trace))


def _replay_of(trace: Sequence[TraceRequest], policy: str, capacity_blocks: int) -> _Replay:
    if policy == ORACLE:
        return _OracleReplay(trace, OracleOrder(capacity_blocks), capacity_blocks)
    if policy == HINTED:
        clock = TraceClock()
        return _HintedReplay(trace, HintedOrder(capacity_blocks, clock=clock), capacity_blocks, clock)
    order: EvictionOrder = plugins.load("kv_eviction", policy)(capacity_blocks)
    return _Replay(trace, order, capacity_blocks)
