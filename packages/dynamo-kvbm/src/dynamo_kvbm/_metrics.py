"""Metrics of the block manager."""

from __future__ import annotations

from dynamo_core.telemetry import Metrics

OFFLOADED_BLOCKS = "dynamo_kvbm_offloaded_blocks_total"
ONBOARDED_BLOCKS = "dynamo_kvbm_onboarded_blocks_total"
EVICTED_BLOCKS = "dynamo_kvbm_evicted_blocks_total"
MATCHED_BLOCKS = "dynamo_kvbm_matched_blocks_total"
REQUESTED_BLOCKS = "dynamo_kvbm_requested_blocks_total"
USED_BLOCKS = "dynamo_kvbm_used_blocks"
CAPACITY_BLOCKS = "dynamo_kvbm_capacity_blocks"


class KvbmMetrics:
    """The instruments, bound to one process's labels; every one has the label ``tier``."""

    def __init__(self, metrics: Metrics) -> None:
        self.offloaded = metrics.counter(OFFLOADED_BLOCKS, "Blocks copied into a tier.", ("tier",))
        self.onboarded = metrics.counter(ONBOARDED_BLOCKS, "Blocks copied from a tier to the device.", ("tier",))
        self.evicted = metrics.counter(EVICTED_BLOCKS, "Blocks that a tier dropped to make room.", ("tier",))
        self.matched = metrics.counter(MATCHED_BLOCKS, "Blocks found by prefix matches.", ("tier",))
        self.requested = metrics.counter(REQUESTED_BLOCKS, "Blocks asked for by prefix matches.")
        self.used = metrics.gauge(USED_BLOCKS, "Blocks held.", ("tier",))
        self.capacity = metrics.gauge(CAPACITY_BLOCKS, "Most blocks held.", ("tier",))
