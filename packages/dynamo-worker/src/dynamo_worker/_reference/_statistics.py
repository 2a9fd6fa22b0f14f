"""Forward-pass metrics from what a step scheduled and what waited."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items

from dynamo_core.load import QueuedStats, ScheduledStats
from dynamo_worker._reference._scheduler import ScheduledSequence
from dynamo_worker._reference._sequence import Sequence


def scheduled_stats(items: Iterable[ScheduledSequence]) -> ScheduledStats:
    """Describe a step before it runs."""
    prefills: list[int] = []
    prefill_kv = 0
    decodes: list[int] = []
    for item in items:
        if item.sequence.is_prefilling:
            prefills.append(item.num_tokens)
            prefill_kv += item.sequence.num_computed_tokens
        else:
            decodes.append(len(item.sequence.tokens))
    return ScheduledStats(
        num_prefill_requests=len(prefills),
        sum_prefill_tokens=sum(prefills),
        var_prefill_length=_variance(prefills),
        sum_prefill_kv_tokens=prefill_kv,
        num_decode_requests=len(decodes),
        sum_decode_kv_tokens=sum(decodes),
        var_decode_kv_tokens=_variance(decodes),
    )


def queued_stats(waiting: Iterable[Sequence]) -> QueuedStats:
    """Describe the queue; a preempted sequence that already produced output waits as a decode."""
    prefills: list[int] = []
    decodes: list[int] = []
    for sequence in waiting:
        (decodes if sequence.num_output_tokens else prefills).append(len(sequence.tokens))
    return QueuedStats(
        num_prefill_requests=len(prefills),
        sum_prefill_tokens=sum(prefills),
        var_prefill_length=_variance(prefills),
        num_decode_requests=len(decodes),
        sum_decode_kv_tokens=sum(decodes),
        var_decode_kv_tokens=_variance(decodes),
    )


def _variance(values: Items[int]) -> float:
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values)
