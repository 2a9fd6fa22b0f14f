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

    def __init__(self, timing: AnalyticTiming, finished: Finished, at_s: float) -> None:
        self._timing = timing
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
        limits = self._timing
        if not self._running:
            return True
        return len(self._running) < limits.max_num_seqs and self.kv_tokens + prompt <= limits.max_kv_tokens

    def _prefill_step(self) -> None:
        timing, budget, used = self._timing, float(self._timing.max_batched_tokens), 0.0
        started: list[tuple[int, float, float]] = []
        joined_tokens = 0.0
        while self._queue and used < budget:
            request, prompt, output, whole = self._queue[0]
            room = len(self._running) + len(started) < timing.max_num_seqs
            if started and not (room and self.kv_tokens + joined_tokens + prompt <= timing.max_kv_tokens):
                break
            chunk = min(prompt, budget - used)
            used += chunk
            if chunk < prompt:
                # The cache holds the chunk from now on; the rest of the prompt stays first in the queue.
                self._queue[0] = (request, prompt - chunk, output, whole)
                joined_tokens += chunk
                break
            self._queue.popleft()
            joined_tokens += prompt
            started.append((request, output, whole))
        self.waiting_tokens -= used
        self._step(timing.chunk_s(used), 1.0)
        self.kv_tokens += joined_tokens
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
        timing, count = self._timing, len(self._running)
        step_s = timing.decode_at_s(self.kv_tokens / timing.max_kv_tokens)
        steps = min(
            self._running[0][0] - self._tokens,
            math.ceil((until_s - self.now_s) / step_s),
            max(1, int(KV_DRIFT * timing.max_kv_tokens / count)),
        )
        self._step(0.0, max(1.0, math.ceil(steps)), step_s)

    def _step(self, prefill_s: float, steps: float, step_s: float | None = None) -> None:
        running = self._running
        if step_s is None:
            timing = self._timing
            step_s = timing.decode_at_s(self.kv_tokens / timing.max_kv_tokens) if running else 0.0
        self.now_s += prefill_s + steps * step_s
        self._tokens += steps
        self.kv_tokens += steps * len(running)
        while running and running[0][0] <= self._tokens:
            _, request, first_s, held = heapq.heappop(running)
            self.kv_tokens -= held
            self._finished(request, first_s, self.now_s)
        if not running and not self._queue:
            self.kv_tokens = 0.0
