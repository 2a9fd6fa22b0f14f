"""Which sequences compute how many tokens in the next step: token budget, watermark, chunking, preemption."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from dynamo_core.load import QueuedStats, ScheduledStats
from dynamo_worker._mock._block_pool import BlockPool
from dynamo_worker._mock._profile import TimingProfile
from dynamo_worker._mock._sequence import Sequence
from dynamo_worker._mock._settings import MockSettings
from dynamo_worker._mock._timing import StepTiming


@dataclass(slots=True)
class Step:
    """A planned step.

    Attributes:
        tokens: Sequence to tokens it computes.
        seconds: How long the step takes.
        scheduled: The same as numbers.
    """

    tokens: dict[Sequence, int] = field(default_factory=dict[Sequence, int])
    seconds: float = 0.0
    scheduled: ScheduledStats = field(default_factory=ScheduledStats)


class Scheduler:
    """Continuous batching over one block pool.

    Args:
        settings: Limits.
        pool: Blocks.
        profile: Measured times; the built-in fits if omitted.
    """

    def __init__(self, settings: MockSettings, pool: BlockPool, profile: TimingProfile | None = None) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.touched: dict[Sequence, None] = {}
        self.preemptions = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self._settings = settings
        self._pool = pool
        self._timing = StepTiming(
            speedup_ratio=settings.speedup_ratio,
            decode_speedup_ratio=settings.decode_speedup_ratio,
            profile=profile,
        )
        self._reserve = int(settings.watermark * pool.total)

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute."""
        return bool(self.running or self.waiting)

    def plan(self) -> Step:
        """Choose the next step's tokens and take the blocks for them."""
        step = Step()
        preempted = self.preemptions
        budget = self._schedule_running(step, self._settings.max_num_batched_tokens)
        if self.preemptions == preempted:
            self._admit(step, budget)
        step.scheduled = _stats(step)
        step.seconds = self._timing.step_s(
            prefill_tokens=step.scheduled.sum_prefill_tokens,
            decoding=step.scheduled.num_decode_requests,
            occupancy=self._pool.active / self._pool.total,
            active_tokens=self._pool.active * self._settings.kv_block_size,
            context_tokens=step.scheduled.sum_decode_kv_tokens / max(1, step.scheduled.num_decode_requests),
        )
        return step

    def commit(self, step: Step) -> None:
        """Apply a step: register full blocks, draw tokens, end what is finished."""
        size = self._settings.kv_block_size
        caching = self._settings.prefix_caching
        for sequence, count in step.tokens.items():
            if sequence.ended:  # cancelled while the step ran
                continue
            sequence.computed += count
            if caching and sequence.computed // size > len(sequence.hashes):
                self._register(sequence)
            if not sequence.pending:
                sequence.draw()
                self.touched[sequence] = None
                if sequence.finish is not None:
                    self.end(sequence)

    def end(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and let go of its blocks."""
        if sequence.ended:
            return
        sequence.ended = True
        if sequence.is_running:
            self._leave(sequence)
            self._pool.release(sequence.hashes, sequence.private)
        else:
            self.waiting.remove(sequence)

    def queued(self) -> QueuedStats:
        """Describe what waits."""
        lengths = [sequence.pending for sequence in self.waiting]
        return QueuedStats(
            num_prefill_requests=len(lengths), sum_prefill_tokens=sum(lengths), var_prefill_length=_variance(lengths)
        )

    def _schedule_running(self, step: Step, budget: int) -> int:
        size = self._settings.kv_block_size
        tokens = step.tokens
        for sequence in tuple(self.running):
            if budget <= 0:
                break
            if not sequence.is_running:  # preempted for one before it
                continue
            pending = sequence.pending
            count = pending if pending < budget else budget
            short = sequence.computed + count - (len(sequence.hashes) + sequence.private) * size
            if short > 0 and not self._make_room(sequence, -(-short // size), step):
                continue
            tokens[sequence] = count
            budget -= count
        return budget

    def _make_room(self, sequence: Sequence, need: int, step: Step) -> bool:
        while not self._pool.allocate(need):
            victim = self.running[-1] if self._settings.preemption == "lifo" else self.running[0]
            self._preempt(victim)
            step.tokens.pop(victim, None)
            if victim is sequence:
                return False
        sequence.private += need
        return True

    def _preempt(self, victim: Sequence) -> None:
        self.preemptions += 1
        self._leave(victim)
        self._pool.release(victim.hashes, victim.private)
        victim.restart()
        self.waiting.appendleft(victim)

    def _admit(self, step: Step, budget: int) -> None:
        while self.waiting and budget > 0 and len(self.running) < self._settings.max_num_seqs:
            sequence = self.waiting[0]
            matched = self._take_blocks(sequence)
            if matched is None:
                return None
            count = min(sequence.pending - matched * self._settings.kv_block_size, budget)
            self.waiting.popleft()
            self.running.append(sequence)
            sequence.is_running = True
            self._start(sequence, matched)
            if count < sequence.pending and not self._settings.chunked_prefill:
                # Without chunking a prompt goes whole: beside others if it fits the budget, else in a step of its own.
                if step.tokens:
                    return self._postpone(sequence)
                count = sequence.pending
            step.tokens[sequence] = count
            budget -= count
        return None

    def _take_blocks(self, sequence: Sequence) -> int | None:
        """Hold the cached prefix and take the rest; return the blocks matched, or None if there is no room."""
        hashes = sequence.reusable_hashes() if self._settings.prefix_caching else []
        matched = self._pool.match(hashes)
        held = hashes[:matched]
        need = -(-sequence.length // self._settings.kv_block_size) - matched
        self._pool.hold(held)
        reserve = self._reserve if self.running else 0
        if self._pool.free - need < reserve or not self._pool.allocate(need):
            self._pool.release(held, 0)
            return None
        sequence.hashes = held
        sequence.private = need
        return matched

    def _start(self, sequence: Sequence, matched: int) -> None:
        cached = matched * self._settings.kv_block_size
        sequence.computed = cached
        self.prompt_tokens += sequence.length
        self.cached_tokens += cached
        if sequence.shared.cached_tokens is None:
            sequence.shared.cached_tokens = min(cached, sequence.prompt_tokens)

    def _postpone(self, sequence: Sequence) -> None:
        self._leave(sequence)
        self._pool.release(sequence.hashes, sequence.private)
        sequence.restart()
        self.waiting.appendleft(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.is_running = False

    def _register(self, sequence: Sequence) -> None:
        blocks = sequence.newly_full()
        self._pool.register(blocks)
        sequence.hashes = [*sequence.hashes, *(block.sequence_hash for block in blocks)]
        sequence.private -= len(blocks)


def _stats(step: Step) -> ScheduledStats:
    prefill = [(sequence.computed, count) for sequence, count in step.tokens.items() if not sequence.decoding]
    decode = [sequence.computed for sequence in step.tokens if sequence.decoding]
    lengths = [count for _, count in prefill]
    return ScheduledStats(
        num_prefill_requests=len(prefill),
        sum_prefill_tokens=sum(lengths),
        var_prefill_length=_variance(lengths),
        sum_prefill_kv_tokens=sum(computed for computed, _ in prefill),
        num_decode_requests=len(decode),
        sum_decode_kv_tokens=sum(decode),
        var_decode_kv_tokens=_variance(decode),
    )


def _variance(values: list[int]) -> float:
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return sum(value * value for value in values) / len(values) - mean * mean
