"""Who computes how many tokens in the next step.

There is no prefill phase and no decode phase: a sequence has tokens whose KV is missing, and a step computes some of
them within one token budget. Running sequences come first, oldest first; then waiting ones are admitted in order of
arrival. When blocks run out, the newest running sequence is preempted: it frees its blocks, waits at the front, and
is computed again, from what the prefix cache still holds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from dynamo_core.kv import KvConnector
from dynamo_worker._reference._block_hints import BlockHinter
from dynamo_worker._reference._block_pool import BlockPool
from dynamo_worker._reference._sequence import Sequence, SequenceState, sequence_hashes


@dataclass(frozen=True)
class SchedulerLimits:
    """Bounds of one step.

    Attributes:
        block_size: Tokens a block.
        max_num_seqs: Most sequences that run at once.
        max_num_batched_tokens: Most tokens one step computes.
        enable_prefix_caching: Whether blocks are shared by content.
    """

    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool = True


@dataclass(frozen=True)
class ScheduledSequence:
    """One sequence's share of a step."""

    sequence: Sequence
    num_tokens: int

    @property
    def completes(self) -> bool:
        """Whether the step reaches the newest token, so that a next one can be sampled."""
        return self.num_tokens == self.sequence.num_pending_tokens


@dataclass
class SchedulerOutput:
    """One step.

    Attributes:
        scheduled: What to compute.
        num_tokens: How many tokens that is.
        num_preempted: Sequences that lost their blocks for it.
    """

    scheduled: list[ScheduledSequence] = field(default_factory=list[ScheduledSequence])
    num_tokens: int = 0
    num_preempted: int = 0

    def add(self, sequence: Sequence, num_tokens: int) -> None:
        """Give a sequence its share."""
        self.scheduled.append(ScheduledSequence(sequence, num_tokens))
        self.num_tokens += num_tokens


class Scheduler:
    """Queues and block tables. One long sequence must fit in the pool alone; then there is always progress.

    Args:
        limits: Bounds of a step.
        pool: Device blocks.
        connector: Lower tiers to look for prefixes in, if there are any.
    """

    def __init__(self, limits: SchedulerLimits, pool: BlockPool, connector: KvConnector | None = None) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._limits = limits
        self._pool = pool
        self._connector = connector if limits.enable_prefix_caching else None
        self._hinter = BlockHinter(self._connector, pool, limits.block_size)

    def add(self, sequence: Sequence, *, first: bool = False) -> None:
        """Queue a sequence, at the front if it continues a request that already ran."""
        self._hinter.on_arrival(sequence)
        if first:
            self.waiting.appendleft(sequence)
        else:
            self.waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, whatever it does, and free its blocks."""
        if sequence.state is SequenceState.RUNNING:
            self.running.remove(sequence)
        elif sequence.state is SequenceState.WAITING and sequence in self.waiting:
            self.waiting.remove(sequence)
        self._hinter.on_end(sequence)
        self._release(sequence, SequenceState.FINISHED)

    def schedule(self) -> SchedulerOutput:
        """Choose the next step and hold the blocks it writes to."""
        output = SchedulerOutput()
        self._schedule_running(output)
        if not output.num_preempted:
            self._admit_waiting(output)
        self._hinter.on_wait(self.waiting)
        return output

    def advance(self, item: ScheduledSequence) -> None:
        """Record that a sequence's share was computed; its full blocks become reusable."""
        sequence = item.sequence
        sequence.num_computed_tokens += item.num_tokens
        if self._limits.enable_prefix_caching:
            self._register(sequence, sequence.num_computed_tokens // self._limits.block_size)

    def _schedule_running(self, output: SchedulerOutput) -> None:
        for sequence in list(self.running):
            count = min(sequence.num_pending_tokens, self._limits.max_num_batched_tokens - output.num_tokens)
            if sequence.state is not SequenceState.RUNNING or count <= 0:
                continue
            while not self._allocate_slots(sequence, count):
                newest = self.running[-1]
                self._preempt(newest)
                output.num_preempted += 1
                if newest is sequence:
                    break
            else:
                output.add(sequence, count)

    def _admit_waiting(self, output: SchedulerOutput) -> None:
        while self.waiting and len(self.running) < self._limits.max_num_seqs:
            budget = self._limits.max_num_batched_tokens - output.num_tokens
            if budget <= 0:
                return
            sequence = self.waiting[0]
            self._hold_cached_prefix(sequence)
            count = min(sequence.num_pending_tokens, budget)
            if not self._allocate_slots(sequence, count):
                self._release(sequence, SequenceState.WAITING)
                return
            self.waiting.popleft()
            sequence.state = SequenceState.RUNNING
            self.running.append(sequence)
            if sequence.num_cached_tokens is None:
                sequence.num_cached_tokens = min(sequence.num_computed_tokens, sequence.num_prompt_tokens)
            output.add(sequence, count)

    def _allocate_slots(self, sequence: Sequence, count: int) -> bool:
        size = self._limits.block_size
        needed = -(-(sequence.num_computed_tokens + count) // size) - len(sequence.blocks)
        if needed <= 0:
            return True
        blocks = self._pool.allocate(needed)
        if blocks is None:
            return False
        sequence.hold(blocks)
        return True

    def _hold_cached_prefix(self, sequence: Sequence) -> None:
        if not self._limits.enable_prefix_caching:
            return
        # The newest token is always computed: its logits are what the step is for.
        wanted = sequence.descriptors((len(sequence.tokens) - 1) // self._limits.block_size)
        cached = self._pool.get_computed_blocks(sequence_hashes(wanted))
        self._pool.touch(cached)
        sequence.hold(cached)
        self._set_computed(sequence, len(cached))
        if self._connector is not None:
            self._onboard(sequence, self._connector)

    def _onboard(self, sequence: Sequence, connector: KvConnector) -> None:
        held = len(sequence.blocks)
        missing = sequence_hashes(sequence.descriptors((len(sequence.tokens) - 1) // self._limits.block_size)[held:])
        found = min(connector.match(missing).blocks, self._pool.num_free_blocks) if missing else 0
        fresh = self._pool.allocate(found) or []
        # Making room may have pushed blocks out of the lower tiers: only what arrives whole counts.
        arrived = connector.onboard(missing[: len(fresh)], [block.block_id for block in fresh]) if fresh else 0
        self._pool.free(fresh[arrived:])
        sequence.hold(fresh[:arrived])
        self._register(sequence, held + arrived)
        self._set_computed(sequence, held + arrived)

    def _register(self, sequence: Sequence, full: int) -> None:
        done = sequence.num_registered_blocks
        if full > done:
            descriptors = sequence.descriptors(full)[done:]
            sequence.replace(done, self._pool.register(sequence.blocks[done:full], descriptors))
            sequence.num_registered_blocks = full

    def _set_computed(self, sequence: Sequence, blocks: int) -> None:
        sequence.num_computed_tokens = blocks * self._limits.block_size
        sequence.num_registered_blocks = blocks

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence, SequenceState.WAITING)
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence, state: SequenceState) -> None:
        self._pool.free(sequence.blocks)
        sequence.reset()
        sequence.state = state


def waiting_prefill_tokens(sequences: Items[Sequence]) -> int:
    """Return how many tokens sequences still have to compute."""
    return sum(sequence.num_pending_tokens for sequence in sequences)
