"""Gauges that are worked out when someone looks."""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_router._indexer import Indexer, StreamState
from dynamo_router._metrics import RouterMetrics
from dynamo_router._policy import Candidate
from dynamo_router._truth import IndexMode
from dynamo_router._view import CacheView


def refresh_index(metrics: RouterMetrics, indexer: Indexer, view: CacheView) -> None:
    """Set what is known of the caches, and how far it is believed."""
    metrics.index_blocks.set(len(indexer.index))
    metrics.index_dropped.set(indexer.index.dropped_blocks)
    for result, count in indexer.counts.items():
        metrics.index_events(result).set(count)
    modes = list(view.modes().values())
    for mode in IndexMode:
        metrics.index_modes(mode.value).set(modes.count(mode))
    metrics.truth.set(min(view.truth.scores(), default=1.0))
    metrics.approximate_blocks.set(len(view.approximate))
    states = [stream.state for stream in indexer.streams().values()]
    for state in StreamState:
        metrics.streams(state.value).set(states.count(state))


def refresh_load(metrics: RouterMetrics, everyone: Sequence[Candidate], *, reservations: int, queued: int) -> None:
    """Set what is booked and what waits."""
    metrics.workers.set(len(everyone))
    metrics.prefill_tokens.set(sum(worker.prefill_tokens for worker in everyone))
    metrics.decode_blocks.set(sum(worker.decode_blocks for worker in everyone))
    metrics.reservations.set(reservations)
    metrics.queued.set(queued)
