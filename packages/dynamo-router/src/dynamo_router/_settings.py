"""Settings of the router."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from dynamo_core.settings import DynamoSettings


class RouterSettings(DynamoSettings):
    """Routing policy, limits and records."""

    component: ClassVar[str] = "router"

    policy: Annotated[str, Field(description="Routing policy by name: ttft, kv, round-robin, ...")] = "ttft"
    policy_options: dict[str, Any] = Field(
        default_factory=dict, description='Options of the policy as a JSON object, for example {"temperature": 0.5}'
    )
    policy_budget_s: Annotated[
        float, Field(gt=0, description="Seconds a policy may take; after three over it in a row it rests for a while")
    ] = 0.02
    replica_sync: Annotated[
        bool, Field(description="Share bookings with the other routers of this endpoint over the event bus")
    ] = False
    use_kv_events: Annotated[bool, Field(description="Feed the index with the workers' KV events")] = True
    max_index_blocks: Annotated[
        int, Field(ge=1, description="Most (worker, tier, block) entries of the KV index; about 100 bytes each")
    ] = 8_000_000
    max_reservations: Annotated[int, Field(ge=1, description="Most requests booked at once")] = 100_000
    reservation_idle_s: Annotated[
        float, Field(gt=0, description="Seconds without progress after which a booking is dropped")
    ] = 300.0
    inhibit_s: Annotated[
        float, Field(ge=0, description="Seconds for which a worker is left out after a path to it failed")
    ] = 5.0
    receipts: Annotated[
        Literal["off", "sampled", "on"], Field(description="Which decisions record every candidate")
    ] = "sampled"
    receipts_sample_share: Annotated[
        float, Field(ge=0, le=1, description="Share of decisions that record every candidate when sampled")
    ] = 0.1
    receipts_max_decisions: Annotated[int, Field(ge=0, description="Decisions kept for look-up")] = 4096
    receipts_dir: Annotated[
        str, Field(description="Folder for recorded decisions with their outcomes as JSON lines; empty writes none")
    ] = ""
    receipts_max_bytes: Annotated[int, Field(ge=4096, description="Size from which a file of receipts is rotated")] = (
        64 * 1024 * 1024
    )
    receipts_max_files: Annotated[int, Field(ge=1, description="Files of receipts kept, the newest included")] = 4
    busy_kv_usage: Annotated[
        float | None, Field(gt=0, le=1, description="Share of used KV blocks beyond which a worker is busy")
    ] = None
    busy_prefill_tokens: Annotated[
        int | None, Field(ge=0, description="Booked prefill tokens beyond which a worker is busy")
    ] = None
    busy_prefill_batches: Annotated[
        float | None, Field(gt=0, description="Booked prefill tokens, in largest steps, beyond which it is busy")
    ] = None
    max_queued_requests: Annotated[
        int, Field(ge=0, description="Requests that may wait while all workers are busy; 0 refuses them at once")
    ] = 0
    max_queued_s: Annotated[
        float | None,
        Field(gt=0, description="Seconds that a request may wait for a worker; unset for no limit"),
    ] = None
    queue_classes: dict[str, Any] = Field(
        default_factory=dict,
        description='Classes of waiting requests: {"name": {"quantum_tokens": N, "order": "fcfs|lcfs|wspt|vtc|edf", '
        '"max_requests": N}}',
    )
    track_output_blocks: Annotated[bool, Field(description="Count the blocks of generated tokens as load")] = True
    assume_kv_reuse: Annotated[
        bool, Field(description="Expect a prefix that a booked request computes to be cached for the next one there")
    ] = True
    approximate_ttl_s: Annotated[
        float, Field(gt=0, description="Seconds for which a routed prefix counts as cached where events are missing")
    ] = 120.0
    recovery_attempts: Annotated[
        int, Field(ge=1, description="Queries to a worker for missed KV events before its stream counts as lossy")
    ] = 5
    recovery_timeout_s: Annotated[float, Field(gt=0, description="Seconds to wait for one such query")] = 10.0
