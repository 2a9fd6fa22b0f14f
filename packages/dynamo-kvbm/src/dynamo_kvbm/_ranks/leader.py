"""Decides for all ranks which blocks are kept and where, so that ranks never disagree.

A block is present once every rank has reported that it holds its shard. A rank that fails on a block takes it from all
of them; a rank that is lost takes all blocks, since no block is whole without its shard.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dynamo_core.enums import Tier
from dynamo_core.errors import ConfigurationError, InternalError, InvalidRequestError
from dynamo_core.kv import BlockDescriptor, MatchResult, TierChange
from dynamo_kvbm._eviction.base import EvictionOrder
from dynamo_kvbm._eviction.lru import LruOrder
from dynamo_kvbm._ranks.plan import Move, PlanOutcome, RankPlan, RankReport

MAX_PLANS = 1024


@dataclass
class _Running:
    plan: RankPlan
    blocks: dict[int, BlockDescriptor]
    waiting: set[int]
    failed_offload: set[int] = field(default_factory=set[int])
    failed_onboard: set[int] = field(default_factory=set[int])


class RankLeader:
    """The scheduler's side. Its methods belong to one thread; it does no I/O and knows no bytes.

    Use: ``match`` for a new request, ``onboard`` and ``offload`` for what the engine decided, then ``take_plan`` once a
    step, carried to every rank's ``RankWorker.execute``, whose reports come back to ``on_report``.

    Args:
        capacity_blocks: Slots of each rank's host arena.
        ranks: How many ranks there are, numbered from 0.
        on_change: Hears what all ranks hold together.
        eviction: Makes the eviction order for a capacity.

    Raises:
        ConfigurationError: if a count is below 1.
    """

    def __init__(
        self,
        capacity_blocks: int,
        ranks: int,
        *,
        on_change: Callable[[TierChange], None] = lambda change: None,
        eviction: Callable[[int], EvictionOrder] = LruOrder,
    ) -> None:
        if capacity_blocks < 1 or ranks < 1:
            raise ConfigurationError(f"{capacity_blocks} blocks on {ranks} ranks hold nothing; give both at least 1")
        self._capacity = capacity_blocks
        self._ranks = frozenset(range(ranks))
        self._lost: set[int] = set()
        self._on_change = on_change
        self._make_order = eviction
        self._order = eviction(capacity_blocks)
        self._free = list(range(capacity_blocks - 1, -1, -1))
        self._slots: dict[int, int] = {}  # present blocks
        self._coming: dict[int, int] = {}  # blocks that not all ranks have reported yet
        self._staged: dict[int, BlockDescriptor] = {}
        self._offload: list[Move] = []
        self._onboard: list[Move] = []
        self._running: dict[int, _Running] = {}
        self._plan_ids = itertools.count(1)

    @property
    def present_blocks(self) -> int:
        """Blocks that all ranks hold."""
        return len(self._slots)

    def match(self, sequence_hashes: Sequence[int]) -> MatchResult:
        """Return the longest prefix that all ranks hold, and mark it as used."""
        found = list(itertools.takewhile(self._slots.__contains__, sequence_hashes))
        self._order.touch(found)
        return MatchResult(len(found), (Tier.HOST,) * len(found))

    def onboard(self, sequence_hashes: Sequence[int], block_ids: Sequence[int]) -> int:
        """Plan to copy the longest present prefix into device blocks; return its length.

        The blocks stay until all ranks have reported.
        """
        found = list(itertools.takewhile(self._slots.__contains__, sequence_hashes))
        self._order.pin(found)
        moves = zip(found, block_ids, strict=False)
        self._onboard += [Move(item, self._slots[item], block_id) for item, block_id in moves]
        return len(found)

    def offload(self, blocks: Sequence[BlockDescriptor], block_ids: Sequence[int]) -> list[int]:
        """Plan to copy device blocks out; return those that will be kept.

        The engine may reuse the device blocks for the same step's computation: ranks copy out first.

        Raises:
            InvalidRequestError: if the counts differ.
        """
        if len(blocks) != len(block_ids):
            raise InvalidRequestError(f"{len(block_ids)} device blocks for {len(blocks)} blocks", param="block_ids")
        if self._lost:
            return []
        kept: list[int] = []
        for block, block_id in zip(blocks, block_ids, strict=True):
            item = block.sequence_hash
            if item in self._slots or item in self._coming:
                continue
            slot = self._take_slot(block.parent_hash)
            if slot is None:
                break
            self._coming[item] = slot
            self._staged[item] = block
            self._offload.append(Move(item, slot, block_id))
            kept.append(item)
        return kept

    def take_plan(self) -> RankPlan | None:
        """Return what was planned since the last call, for every rank; None if that is nothing.

        Raises:
            InternalError: if ranks have not reported on very many plans.
        """
        if not self._offload and not self._onboard:
            return None
        if len(self._running) >= MAX_PLANS:
            raise InternalError(f"{MAX_PLANS} plans have not been reported on; a rank stands still, tell lose_rank")
        plan = RankPlan(next(self._plan_ids), tuple(self._offload), tuple(self._onboard))
        self._running[plan.plan_id] = _Running(plan, self._staged, set(self._ranks - self._lost))
        self._offload, self._onboard, self._staged = [], [], {}
        return plan

    def on_report(self, report: RankReport) -> PlanOutcome | None:
        """Take in a rank's report; return the outcome with the last one's. A late or double one does nothing."""
        running = self._running.get(report.plan_id)
        if running is None or report.rank not in running.waiting:
            return None
        running.waiting.discard(report.rank)
        running.failed_offload.update(report.not_offloaded)
        running.failed_onboard.update(report.not_onboarded)
        if running.waiting:
            return None
        del self._running[report.plan_id]
        return self._settle(running)

    def lose_rank(self, rank: int) -> list[PlanOutcome]:
        """Note that a rank is gone with its shards: nothing is present any more, and all running plans have failed.

        Raises:
            InvalidRequestError: if there is no such rank.
        """
        self._require_rank(rank)
        self._lost.add(rank)
        running, self._running = list(self._running.values()), {}
        removed = tuple(self._slots)
        self._slots.clear()
        self._coming.clear()
        self._staged.clear()
        planned = [move.sequence_hash for move in self._onboard]
        self._offload, self._onboard = [], []
        self._order = self._make_order(self._capacity)
        self._free = list(range(self._capacity - 1, -1, -1))
        if removed:
            self._on_change(TierChange(Tier.HOST, removed=removed))
        outcomes = [
            PlanOutcome(one.plan.plan_id, (), tuple(move.sequence_hash for move in one.plan.onboard)) for one in running
        ]
        return [*outcomes, PlanOutcome(0, (), tuple(planned))] if planned else outcomes

    def join_rank(self, rank: int) -> None:
        """Note that a lost rank is back, empty.

        Raises:
            InvalidRequestError: if there is no such rank.
        """
        self._require_rank(rank)
        self._lost.discard(rank)

    def clear(self) -> None:
        """Drop every present block that no running plan copies in."""
        removed = [item for item in list(self._slots) if self._order.discard(item)]
        for item in removed:
            self._free.append(self._slots.pop(item))
        if removed:
            self._on_change(TierChange(Tier.HOST, removed=tuple(removed)))

    def check_integrity(self) -> None:
        """Verify the books.

        Raises:
            InternalError: with what is wrong.
        """
        self._order.check_integrity()
        slots = sorted([*self._free, *self._slots.values(), *self._coming.values()])
        if slots != list(range(self._capacity)) or len(self._order) != len(self._slots):
            raise InternalError("a slot is in use twice, or lost, or the order holds other blocks")

    def _take_slot(self, parent: int | None) -> int | None:
        if self._free:
            return self._free.pop()
        kept = [parent] if parent is not None and parent in self._slots else []
        self._order.pin(kept)
        victim = self._order.evict()
        self._order.unpin(kept)
        if victim is None:
            return None
        self._on_change(TierChange(Tier.HOST, removed=(victim,)))
        return self._slots.pop(victim)

    def _settle(self, running: _Running) -> PlanOutcome:
        self._order.unpin(move.sequence_hash for move in running.plan.onboard)
        stored: list[BlockDescriptor] = []
        for move in running.plan.offload:
            slot = self._coming.pop(move.sequence_hash)
            if move.sequence_hash in running.failed_offload:
                self._free.append(slot)
                continue
            block = running.blocks[move.sequence_hash]
            self._slots[move.sequence_hash] = slot
            self._order.insert([(move.sequence_hash, block.parent_hash)])
            stored.append(block)
        dropped = [item for item in running.failed_onboard if self._order.discard(item)]
        for item in dropped:
            self._free.append(self._slots.pop(item))
        if stored or dropped:
            self._on_change(TierChange(Tier.HOST, tuple(stored), tuple(dropped)))
        return PlanOutcome(
            running.plan.plan_id, tuple(block.sequence_hash for block in stored), tuple(sorted(running.failed_onboard))
        )

    def _require_rank(self, rank: int) -> None:
        if rank not in self._ranks:
            raise InvalidRequestError(f"there are ranks 0 to {len(self._ranks) - 1}, not {rank}", param="rank")
