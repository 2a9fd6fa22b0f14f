"""One simulated engine: continuous batching in closed form between the moments at which anything changes.

A step carries prompt chunks up to the token budget and one token of every decoding request. While no prompt waits, all
decoding requests advance alike, so a run of such steps is one jump of a common token counter. A request costs three
events or so, whatever its length.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable

from dynamo_planner._timing import AnalyticTiming

KV_DRIFT = 0.01

Finished = Callable[[int, float, float], None]
"""Takes request, time of its first token and time of its end."""


class SimulatedEngine:
    """An engine with the analytic step times.

    Args:
        timing: Step times and limits.
        finished: Called for each request that ends.
        at_s: When it starts to serve.
    """

    __slots__ = (
        "_finished",
        "_max_kv_tokens",
        "_max_num_seqs",
        "_queue",
        "_running",
        "_timing",
        "_tokens",
        "kv_tokens",
        "now_s",
        "waiting_tokens",
    )

    def __init__(self, timing: AnalyticTiming, finished: Finished, at_s: float) -> None:
        self._timing = timing
        self._max_kv_tokens = timing.max_kv_tokens
        self._max_num_seqs = timing.max_num_seqs
        self._finished = finished
        self._queue: deque[tuple[int, float, float, float]] = deque()
        self._running: list[tuple[float, int, float, float]] = []
        self._tokens = 0.0
        self.now_s = at_s
        self.waiting_tokens = 0.0
        self.kv_tokens = 0.0

    @property
    def waiting(self) -> int:
        """Requests before their first token."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Requests that decode."""
        return len(self._running)

    @property
    def empty(self) -> bool:
        """Whether nothing is to be done."""
        return not (self._queue or self._running)

    def submit(self, request: int, at_s: float, prompt: float, output: float) -> None:
        """Queue a request that arrives now."""
        if self.empty and self.now_s < at_s:
            self.now_s = at_s
        self._queue.append((request, prompt, output, prompt))
        self.waiting_tokens += prompt

    def advance(self, until_s: float) -> None:
        """Run all steps that start before this time."""
        while self.now_s < until_s:
            if self._queue and self._fits(self._queue[0][1]):
                self._prefill_step()
            elif self._running:
                self._decode_run(until_s)
            else:
                self.now_s = until_s

    def _fits(self, prompt: float) -> bool:
        running = len(self._running)
        return not running or (running < self._max_num_seqs and self.kv_tokens + prompt <= self._max_kv_tokens)

    def _prefill_step(self) -> None:
        queue, budget, used = self._queue, float(self._timing.max_batched_tokens), 0.0
        started: list[tuple[int, float, float]] = []
        while queue and used < budget:
            request, prompt, output, whole = queue[0]
            room = len(self._running) + len(started) < self._max_num_seqs
            if started and not (room and self.kv_tokens + used + prompt <= self._max_kv_tokens):
                break
            if prompt > budget - used:
                # The cache holds the chunk from now on; the rest of the prompt stays first in the queue.
                queue[0] = (request, prompt - budget + used, output, whole)
                used = budget
                break
            queue.popleft()
            used += prompt
            started.append((request, output, whole))
        self.waiting_tokens = self.waiting_tokens - used if queue else 0.0
        self._step(self._timing.chunk_s(used), 1.0)
        self.kv_tokens += used
        for request, output, prompt in started:
            self._start(request, output, prompt)

    def _start(self, request: int, output: float, prompt: float) -> None:
        if output <= 1:
            self.kv_tokens -= prompt
            self._finished(request, self.now_s, self.now_s)
            return
        heapq.heappush(self._running, (self._tokens + output - 1, request, self.now_s, prompt + output - 1))

    def _decode_run(self, until_s: float) -> None:
        """Decode until a request ends, an arrival may be due, or the cache has filled noticeably."""
        step_s = self._timing.decode_at_s(self.kv_tokens / self._max_kv_tokens)
        steps = self._running[0][0] - self._tokens
        steps = min(steps, (until_s - self.now_s) / step_s, KV_DRIFT * self._max_kv_tokens // len(self._running))
        self._step(0.0, float(math.ceil(steps)) if steps > 1.0 else 1.0, step_s)

    def _step(self, prefill_s: float, steps: float, step_s: float | None = None) -> None:
        running = self._running
        if step_s is None:
            step_s = self._timing.decode_at_s(self.kv_tokens / self._max_kv_tokens) if running else 0.0
        self.now_s += prefill_s + steps * step_s
        self._tokens += steps
        self.kv_tokens += steps * len(running)
        while running and running[0][0] <= self._tokens:
            _, request, first_s, held = heapq.heappop(running)
            self.kv_tokens -= held
            self._finished(request, first_s, self.now_s)
        if not running and not self._queue:
            self.kv_tokens = 0.0
