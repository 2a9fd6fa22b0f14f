"""What a prompt would find and cost on each worker, for callers that choose by themselves."""

from __future__ import annotations

from typing import NamedTuple

from dynamo_core.ids import WorkerId
from dynamo_core.load import ProjectedLoad, WorkerLoad
from dynamo_router._fleet import Fleet
from dynamo_router._match import TIERS
from dynamo_router._prompt import Prompt
from dynamo_router._view import CacheView


class OverlapScore(NamedTuple):
    """What a worker holds of a prompt.

    Attributes:
        worker: The worker.
        tier_blocks: Blocks of the prompt's prefix by the name of the tier that holds them.
        cached_tokens: Tokens that it would not compute, as the router predicts.
    """

    worker: WorkerId
    tier_blocks: dict[str, int]
    cached_tokens: int


def overlap_scores(view: CacheView, prompt: Prompt, now_s: float) -> list[OverlapScore]:
    """Return the score of every worker that holds any of a prompt, in the order of their ids."""
    touched = view.show(prompt, now_s)
    names = [tier.value for tier in TIERS]
    found = [
        OverlapScore(worker.worker, dict(zip(names, worker.tier_blocks, strict=True)), worker.cached_tokens)
        for worker in touched
    ]
    view.hide(touched)
    return sorted(found)


def potential_loads(fleet: Fleet, view: CacheView, prompt: Prompt, now_s: float) -> list[WorkerLoad]:
    """Return the load that each worker would have with this prompt."""
    touched = view.show(prompt, now_s)
    found = [
        WorkerLoad(
            worker.worker,
            worker.reported,
            ProjectedLoad(
                worker.prefill_tokens + prompt.tokens - worker.cached_tokens,
                worker.decode_blocks + len(prompt.hashes) - worker.active_blocks,
                worker.active_requests + 1,
            ),
        )
        for worker in fleet.everyone
    ]
    view.hide(touched)
    return found
