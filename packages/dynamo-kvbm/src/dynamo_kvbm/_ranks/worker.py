"""Moves one rank's shards between its device and its host arena, as the leader's plans say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import structlog

from dynamo_core.errors import ConfigurationError
from dynamo_core.kv import BlockAccess
from dynamo_kvbm._ranks.plan import Move, RankPlan, RankReport
from dynamo_kvbm._tiers.arena import allocate_arena

_log = structlog.get_logger(__name__)


class RankWorker:
    """The worker's side. Its methods belong to the thread that runs the engine's passes.

    Args:
        rank: Which rank.
        access: The rank's device blocks; ``access.layout`` is the layout of one shard.
        capacity_blocks: Slots of the host arena; the same on all ranks, and what the leader was given.

    Raises:
        ConfigurationError: if there are no slots, or the machine has not that much memory.
    """

    def __init__(self, rank: int, access: BlockAccess, capacity_blocks: int) -> None:
        if capacity_blocks < 1:
            raise ConfigurationError(f"an arena of {capacity_blocks} blocks holds nothing; give at least 1")
        self.rank = rank
        self._access = access
        size = access.layout.block_bytes
        memory, self.pages = allocate_arena(capacity_blocks * size)
        self._arena = memory.reshape(capacity_blocks, size)
        self._held: list[int | None] = [None] * capacity_blocks

    def execute(self, plan: RankPlan) -> RankReport:
        """Copy out, then copy in, and say what did not work. Never raises: a rank that fails must still report."""
        not_offloaded = self._copy_out(plan.offload)
        not_onboarded = self._copy_in(plan.onboard)
        return RankReport(self.rank, plan.plan_id, tuple(not_offloaded), tuple(not_onboarded))

    def _copy_out(self, moves: Sequence[Move]) -> list[int]:
        for move in moves:
            self._held[move.slot] = None
        try:
            data = self._access.read_blocks([move.block_id for move in moves])
        except Exception as error:  # noqa: BLE001 - whatever the device says, the leader must hear that it failed
            _log.warning("rank cannot read its device", rank=self.rank, error=str(error))
            return [move.sequence_hash for move in moves]
        for move, piece in zip(moves, data, strict=True):
            self._arena[move.slot] = np.frombuffer(piece, dtype=np.uint8)
            self._held[move.slot] = move.sequence_hash
        return []

    def _copy_in(self, moves: Sequence[Move]) -> list[int]:
        # A slot of another block than the leader names would be a wrong answer, so it is a miss.
        good = [move for move in moves if self._held[move.slot] == move.sequence_hash]
        try:
            self._access.write_blocks([move.block_id for move in good], [self._arena[move.slot].data for move in good])
        except Exception as error:  # noqa: BLE001 - whatever the device says, the leader must hear that it failed
            _log.warning("rank cannot write its device", rank=self.rank, error=str(error))
            return [move.sequence_hash for move in moves]
        return [move.sequence_hash for move in moves if move not in good]
