"""What a leader and its ranks tell each other: plain values, for whatever way the engine has to carry them."""

from __future__ import annotations

import msgspec


class Move(msgspec.Struct, frozen=True, array_like=True):
    """One block between the device and the host, on every rank alike.

    Attributes:
        sequence_hash: Which block.
        slot: Its place in each rank's host arena.
        block_id: Its place on each rank's device.
    """

    sequence_hash: int
    slot: int
    block_id: int


class RankPlan(msgspec.Struct, frozen=True, array_like=True):
    """What every rank does before its next pass: first copy out, then copy in.

    Attributes:
        plan_id: Counts up.
        offload: Blocks to copy out. Their device blocks may be named again in ``onboard``.
        onboard: Blocks to copy in.
    """

    plan_id: int
    offload: tuple[Move, ...] = ()
    onboard: tuple[Move, ...] = ()


class RankReport(msgspec.Struct, frozen=True, array_like=True):
    """What became of a plan on one rank.

    Attributes:
        rank: Which rank.
        plan_id: Which plan.
        not_offloaded: Blocks that could not be copied out.
        not_onboarded: Blocks that could not be copied in; their device blocks hold anything.
    """

    rank: int
    plan_id: int
    not_offloaded: tuple[int, ...] = ()
    not_onboarded: tuple[int, ...] = ()


class PlanOutcome(msgspec.Struct, frozen=True):
    """What became of a plan on all ranks.

    Attributes:
        plan_id: Which plan.
        stored: Blocks that all ranks hold now.
        not_onboarded: Blocks that some rank did not get; the engine computes them on all ranks.
    """

    plan_id: int
    stored: tuple[int, ...] = ()
    not_onboarded: tuple[int, ...] = ()
