"""One dp rank of the mock: a loop that takes as long as the model it imitates."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from dynamo_core.clock import Clock
from dynamo_core.errors import DynamoError
from dynamo_core.ids import WorkerId
from dynamo_core.load import ForwardPassMetrics, ReportedLoad
from dynamo_worker._mock._block_pool import BlockPool
from dynamo_worker._mock._profile import TimingProfile
from dynamo_worker._mock._scheduler import Scheduler, Step
from dynamo_worker._mock._sequence import Sequence
from dynamo_worker._mock._settings import MockSettings

# An event loop wakes at whole milliseconds, up to one late. Steps shorter than that are computed together and handed
# out in one tick. A step is due a step's time after the one before was due, not after it was handed out: output comes
# up to a millisecond late, but lateness never adds up.
RESOLUTION_S = 0.001
MAX_STEPS_A_TICK = 64
# A loop that is late by more than this does not catch up; it goes on from now.
MAX_LAG_S = 0.05


class Rank:
    """Scheduler, blocks and loop of one dp rank.

    Args:
        worker: Identity.
        settings: Limits.
        clock: Time.
        profile: Measured times; the built-in fits if omitted.
    """

    def __init__(
        self, worker: WorkerId, settings: MockSettings, clock: Clock, profile: TimingProfile | None = None
    ) -> None:
        self.pool = BlockPool(settings.total_kv_blocks)
        self.scheduler = Scheduler(settings, self.pool, profile)
        self.listener: Callable[[ForwardPassMetrics], None] | None = None
        self._worker = worker
        self._clock = clock
        self._work = asyncio.Event()
        self.idle = asyncio.Event()
        self.idle.set()
        self._due_s = 0.0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.scheduler.waiting.append(sequence)
        self.idle.clear()
        self._work.set()

    def end(self, sequence: Sequence) -> None:
        """Take a sequence out at once."""
        self.scheduler.end(sequence)
        self.scheduler.touched.pop(sequence, None)
        self._note_idle()

    def load(self) -> ReportedLoad:
        """Describe the present load."""
        scheduler = self.scheduler
        seen = scheduler.prompt_tokens
        return ReportedLoad(
            kv_used_blocks=self.pool.active,
            kv_total_blocks=self.pool.total,
            active_requests=len(scheduler.running),
            waiting_requests=len(scheduler.waiting),
            waiting_prefill_tokens=sum(sequence.pending for sequence in scheduler.waiting),
            cache_hit_rate=scheduler.cached_tokens / seen if seen else None,
        )

    async def run(self) -> None:
        """Step until cancelled."""
        while True:
            await self._work.wait()
            self._due_s = max(self._due_s, self._clock.monotonic())
            while self.scheduler.busy:
                await self._tick()
            self._work.clear()
            self._note_idle()

    def fail(self, error: DynamoError) -> None:
        """End every sequence with an error."""
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            self.end(sequence)
            sequence.shared.sink.fail(error)

    async def _tick(self) -> None:
        """Compute one step, or as many short ones as fit the loop's resolution, and hand out what they gave."""
        elapsed = 0.0
        for _ in range(MAX_STEPS_A_TICK):
            step = self.scheduler.plan()
            elapsed += step.seconds
            if elapsed >= RESOLUTION_S:
                await self._pass_time(elapsed)
                elapsed = 0.0
                self._commit(step)
                break
            self._commit(step)
            if not self.scheduler.busy:
                break
        if elapsed:
            await self._pass_time(elapsed)
        self._hand_out()

    async def _pass_time(self, seconds: float) -> None:
        now = self._clock.monotonic()
        self._due_s = max(self._due_s, now - MAX_LAG_S) + seconds
        await self._clock.sleep(max(0.0, self._due_s - now))

    def _commit(self, step: Step) -> None:
        self.scheduler.commit(step)
        if self.listener is not None:
            self.listener(
                ForwardPassMetrics(
                    self._worker, step.seconds, step.scheduled, self.scheduler.queued(), self._clock.time()
                )
            )

    def _hand_out(self) -> None:
        touched, self.scheduler.touched = self.scheduler.touched, {}
        for sequence in touched:
            sequence.shared.sink.push(sequence.chunk())

    def _note_idle(self) -> None:
        if not self.scheduler.busy:
            self.idle.set()
