"""Names of everything this package measures, in one place for the catalogue."""

from __future__ import annotations

from dynamo_core.telemetry import LATENCY_BUCKETS_S, TOKEN_BUCKETS, Metrics

ENGINE_REQUESTS = "dynamo_worker_engine_requests"
QUEUED_REQUESTS = "dynamo_worker_queued_requests"
REJECTED_REQUESTS_TOTAL = "dynamo_worker_rejected_requests_total"
REQUESTS_TOTAL = "dynamo_worker_requests_total"
REQUEST_DURATION_SECONDS = "dynamo_worker_request_duration_seconds"
FIRST_OUTPUT_SECONDS = "dynamo_worker_first_output_seconds"
PROMPT_TOKENS = "dynamo_worker_prompt_tokens"
OUTPUT_TOKENS_TOTAL = "dynamo_worker_output_tokens_total"
CACHED_TOKENS_TOTAL = "dynamo_worker_cached_tokens_total"
HELD_CHUNKS_TOTAL = "dynamo_worker_held_chunks_total"
PROTOCOL_ERRORS_TOTAL = "dynamo_worker_protocol_errors_total"
PROBES_TOTAL = "dynamo_worker_probes_total"
KV_EVENTS_TOTAL = "dynamo_worker_kv_events_total"
KV_EVENTS_DROPPED_TOTAL = "dynamo_worker_kv_events_dropped_total"
KV_INDEX_BLOCKS = "dynamo_worker_kv_index_blocks"
KV_QUERIES_TOTAL = "dynamo_worker_kv_queries_total"
KV_USED_BLOCKS = "dynamo_worker_kv_used_blocks"
KV_TOTAL_BLOCKS = "dynamo_worker_kv_total_blocks"
MODEL_LOAD_SECONDS = "dynamo_worker_model_load_seconds"

REMOTE_PREFILLS_TOTAL = "dynamo_worker_remote_prefills_total"
REMOTE_ENCODES_TOTAL = "dynamo_worker_remote_encodes_total"
KV_LEASES = "dynamo_worker_kv_leases"
KV_LEASES_EXPIRED_TOTAL = "dynamo_worker_kv_leases_expired_total"
KV_TRANSFER_BLOCKS_TOTAL = "dynamo_worker_kv_transfer_blocks_total"
KV_TRANSFER_BYTES_TOTAL = "dynamo_worker_kv_transfer_bytes_total"
KV_TRANSFER_SECONDS = "dynamo_worker_kv_transfer_seconds"
KV_ROOMS = "dynamo_worker_kv_rooms"


class WorkerMetrics:
    """The metrics of one worker, bound to its scope."""

    def __init__(self, metrics: Metrics) -> None:
        counter, gauge, histogram = metrics.counter, metrics.gauge, metrics.histogram
        self.engine_requests = gauge(ENGINE_REQUESTS, "Requests inside the engine")
        self.queued_requests = gauge(QUEUED_REQUESTS, "Requests that wait for the engine")
        self.rejected = counter(REJECTED_REQUESTS_TOTAL, "Requests refused before the engine", ["reason"])
        self.requests = counter(REQUESTS_TOTAL, "Requests ended", ["outcome"])
        self.duration = histogram(REQUEST_DURATION_SECONDS, "Seconds from arrival to end", buckets=LATENCY_BUCKETS_S)
        self.first_output = histogram(FIRST_OUTPUT_SECONDS, "Seconds from arrival to first output")
        self.prompt_tokens = histogram(PROMPT_TOKENS, "Prompt tokens a request", buckets=TOKEN_BUCKETS)
        self.output_tokens = counter(OUTPUT_TOKENS_TOTAL, "Tokens generated")
        self.cached_tokens = counter(CACHED_TOKENS_TOTAL, "Prompt tokens served from cache")
        self.held_chunks = counter(HELD_CHUNKS_TOTAL, "Chunks held back for slow readers")
        self.protocol_errors = counter(PROTOCOL_ERRORS_TOTAL, "Requests ended for invalid engine output")
        self.probes = counter(PROBES_TOTAL, "Probes through the real path", ["outcome"])
        self.kv_events = counter(KV_EVENTS_TOTAL, "KV events published", ["kind"])
        self.kv_events_dropped = counter(KV_EVENTS_DROPPED_TOTAL, "Blocks not advertised", ["reason"])
        self.kv_index_blocks = gauge(KV_INDEX_BLOCKS, "Blocks advertised", ["dp_rank"])
        self.kv_queries = counter(KV_QUERIES_TOTAL, "KV event queries answered", ["kind"])
        self.kv_used_blocks = gauge(KV_USED_BLOCKS, "Device blocks in use", ["dp_rank"])
        self.kv_total_blocks = gauge(KV_TOTAL_BLOCKS, "Device blocks in all", ["dp_rank"])
        self.model_load = gauge(MODEL_LOAD_SECONDS, "Seconds the engine took to start")
        self.remote_prefills = counter(REMOTE_PREFILLS_TOTAL, "Prompts computed elsewhere, or why not", ["outcome"])
        self.remote_encodes = counter(REMOTE_ENCODES_TOTAL, "Requests with media, by who encoded them", ["outcome"])
        self.kv_rooms = gauge(KV_ROOMS, "Prompts whose blocks are sent while they are computed")
        self.kv_leases = gauge(KV_LEASES, "Holds on computed blocks that wait to be pulled")
        self.kv_leases_expired = counter(KV_LEASES_EXPIRED_TOTAL, "Holds that ended without a pull")
        self.kv_transfer_blocks = counter(KV_TRANSFER_BLOCKS_TOTAL, "KV blocks moved between workers", ["direction"])
        self.kv_transfer_bytes = counter(KV_TRANSFER_BYTES_TOTAL, "KV bytes received from other workers")
        self.kv_transfer_seconds = histogram(KV_TRANSFER_SECONDS, "Seconds to send the blocks of one prompt")
