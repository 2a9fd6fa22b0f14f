"""Reasons that decisions and their parts carry, in the terms of NVIDIA Dynamo's planner where it has one."""

from __future__ import annotations

import enum


class Reason(enum.Enum):
    """Why a decision, or one part of it, is what it is."""

    NO_CHANGE = "no_change"
    SCALE_UP = "scale_up"
    SCALE_DOWN = "scale_down"
    SCALE_DOWN_DELAYED = "scale_down_delayed"
    SCALE_DOWN_CAPPED_BY_THROUGHPUT = "scale_down_capped_by_throughput"
    SCALE_DOWN_REFUSED_CONSOLIDATION = "scale_down_refused_consolidation"
    SCALING_IN_PROGRESS = "scaling_in_progress"
    WORKER_COUNT_MISMATCH = "worker_count_mismatch"
    WAKE = "wake"
    IDLE = "idle"

    DISABLED = "disabled"
    SET_LOWER_BOUND = "set_lower_bound"
    SCALE = "scale"

    NO_POOL_DATA = "no_pool_data"
    NO_TRAFFIC_DATA = "no_traffic_data"
    NO_FPM_DATA = "no_fpm_data"
    INSUFFICIENT_DATA = "insufficient_data"
    PREDICT_FAILED = "predict_failed"
    MODEL_NOT_READY = "model_not_ready"
    CLOCK_JUMP = "clock_jump"

    MIX_CHEAPEST = "mix_cheapest"
    MIX_KEPT = "mix_kept"
    MIX_LIMITED = "mix_limited"

    LIMITED = "limited"
    BUDGET_IN_USE = "budget_in_use"
    NEVER_READY = "never_ready"
    MANUAL_EDIT_KEPT = "manual_edit_kept"
    MANUAL_EDIT_REVERTED = "manual_edit_reverted"
    OVERRIDE = "override"


HOLDS = frozenset(
    {
        Reason.NO_POOL_DATA,
        Reason.NO_TRAFFIC_DATA,
        Reason.NO_FPM_DATA,
        Reason.INSUFFICIENT_DATA,
        Reason.PREDICT_FAILED,
        Reason.MODEL_NOT_READY,
        Reason.CLOCK_JUMP,
    }
)
"""Reasons of a part that knows too little to propose anything."""
