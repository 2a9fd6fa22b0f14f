"""Metrics of the block manager."""

from __future__ import annotations

from dynamo_core.telemetry import Metrics

OFFLOADED_BLOCKS = "dynamo_kvbm_offloaded_blocks_total"
ONBOARDED_BLOCKS = "dynamo_kvbm_onboarded_blocks_total"
EVICTED_BLOCKS = "dynamo_kvbm_evicted_blocks_total"
DROPPED_BLOCKS = "dynamo_kvbm_dropped_blocks_total"
MATCHED_BLOCKS = "dynamo_kvbm_matched_blocks_total"
REQUESTED_BLOCKS = "dynamo_kvbm_requested_blocks_total"
REFUSED_BLOCKS = "dynamo_kvbm_refused_blocks_total"
USED_BLOCKS = "dynamo_kvbm_used_blocks"
CAPACITY_BLOCKS = "dynamo_kvbm_capacity_blocks"
TENANT_USED_BLOCKS = "dynamo_kvbm_tenant_used_blocks"
QUEUED_BLOCKS = "dynamo_kvbm_queued_blocks"
ARENA_BYTES = "dynamo_kvbm_arena_bytes"
PREFETCH_REFUSED_BLOCKS = "dynamo_kvbm_prefetch_refused_blocks_total"
PEER_KNOWN_BLOCKS = "dynamo_kvbm_peer_known_blocks"
PEER_UNNOTED_BLOCKS = "dynamo_kvbm_peer_unnoted_blocks_total"
PEER_SENT_BLOCKS = "dynamo_kvbm_peer_sent_blocks_total"
PEER_RECEIVED_BLOCKS = "dynamo_kvbm_peer_received_blocks_total"
PEER_FAILURES = "dynamo_kvbm_peer_failures_total"
FETCH_SECONDS = "dynamo_kvbm_fetch_seconds_total"
RECOMPUTE_SECONDS = "dynamo_kvbm_recompute_block_seconds"


class KvbmMetrics:
    """The instruments, bound to one process's labels; those of a tier have the label ``tier``."""

    def __init__(self, metrics: Metrics) -> None:
        self.offloaded = metrics.counter(OFFLOADED_BLOCKS, "Blocks copied into a tier.", ("tier",))
        self.onboarded = metrics.counter(ONBOARDED_BLOCKS, "Blocks copied from a tier to the device.", ("tier",))
        self.evicted = metrics.counter(EVICTED_BLOCKS, "Blocks that left a tier.", ("tier",))
        self.dropped = metrics.counter(
            DROPPED_BLOCKS, "Blocks that never reached a tier, by reason: queue_full, write_failed.", ("tier", "reason")
        )
        self.matched = metrics.counter(MATCHED_BLOCKS, "Blocks found by prefix matches.", ("tier",))
        self.requested = metrics.counter(REQUESTED_BLOCKS, "Blocks asked for by prefix matches.")
        self.refused = metrics.counter(
            REFUSED_BLOCKS, "Blocks found but not offered, since computing them is faster.", ("tier",)
        )
        self.used = metrics.gauge(USED_BLOCKS, "Blocks held.", ("tier",))
        self.capacity = metrics.gauge(CAPACITY_BLOCKS, "Most blocks held.", ("tier",))
        self.tenant_used = metrics.gauge(
            TENANT_USED_BLOCKS, "Blocks of the host tier that a tenant with a quota has.", ("tenant",)
        )
        self.queued = metrics.gauge(QUEUED_BLOCKS, "Blocks staged for a tier and not yet written.", ("tier",))
        self.arena = metrics.gauge(
            ARENA_BYTES, "Memory of a tier, by the pages it lies on: hugetlb, transparent, small.", ("tier", "pages")
        )
        self.prefetch_refused = metrics.counter(
            PREFETCH_REFUSED_BLOCKS, "Blocks not brought near ahead of use, since the transfer queue was full."
        )
        self.peer_known = metrics.gauge(PEER_KNOWN_BLOCKS, "Blocks known in host tiers of peers.")
        self.peer_unnoted = metrics.counter(
            PEER_UNNOTED_BLOCKS, "Blocks of peers not noted, since peer_blocks are known already."
        )
        self.peer_sent = metrics.counter(PEER_SENT_BLOCKS, "Blocks sent to peers.")
        self.peer_received = metrics.counter(PEER_RECEIVED_BLOCKS, "Blocks that arrived whole from peers.")
        self.peer_failures = metrics.counter(PEER_FAILURES, "Fetches from peers cut short, by reason.", ("reason",))
        self.fetch_s = metrics.counter(FETCH_SECONDS, "Time spent on fetching blocks.", ("tier",))
        self.recompute_s = metrics.gauge(RECOMPUTE_SECONDS, "Time to compute one block, smoothed.")
