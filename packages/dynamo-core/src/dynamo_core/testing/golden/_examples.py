"""One value of every wire type, with no field at its default, from which missing golden files are written."""

from __future__ import annotations

from typing import Any

from dynamo_core.cards import CheckedFile, EndpointTypes, LoraInfo, ModelCard, ModelRuntimeConfig
from dynamo_core.content import ContentPart
from dynamo_core.discovery import EventChannel, Instance, ModelRecord
from dynamo_core.enums import FinishReason, Modality, ModelInput, ModelType, PartKind, Tier, WorkerType
from dynamo_core.errors import ErrorRecord
from dynamo_core.events import (
    BlockRemoved,
    BlocksCleared,
    BlockStored,
    EventEnvelope,
    KvEventBatch,
    KvEventQuery,
    UnknownKvEvent,
)
from dynamo_core.ids import DecisionId, EndpointId, ReservationId, WorkerId
from dynamo_core.kv import BlockLayout, TransferRequest
from dynamo_core.load import (
    ForwardPassMetrics,
    ProjectedLoad,
    QueuedLoad,
    QueuedStats,
    ReportedLoad,
    ScheduledStats,
    WorkerLoad,
)
from dynamo_core.planning import Observation, PoolState, ScalingDecision, TrafficStats
from dynamo_core.requests import (
    GenerateChunk,
    GenerateRequest,
    GuidedDecoding,
    OutputOptions,
    PrefillResult,
    RoutingHints,
    SamplingOptions,
    StopConditions,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from dynamo_core.routing import CandidateScore, RequestOutcome, RoutingDecision, RoutingPhase, RoutingRequest
from dynamo_core.tokens import BlockHasher, pack_tokens

_ENDPOINT = EndpointId("dynamo", "backend", "generate")
_WORKER = WorkerId((1 << 53) - 1, 3)
_TOKENS = pack_tokens((1, 2, 3, 4, 5, 6, 7, (1 << 32) - 1))
_HASHES = BlockHasher(4).hash_tokens(_TOKENS)
_PART = ContentPart(
    kind=PartKind.TENSOR,
    text="caption",
    data=b"\x00\x00\x80?",
    url="https://example.com/tensor",
    media_type="application/octet-stream",
    shape=(1, 1),
    dtype="f32",
    score=0.5,
    index=2,
    content_hash=(1 << 64) - 1,
    name="x",
    metadata={"fps": 24},
)
_PREFILL = PrefillResult(parameters={"host": "10.0.0.7", "port": 4711}, token_ids=pack_tokens((9,)), cached_tokens=4)
_HINTS = RoutingHints(
    instance_id=255,
    dp_rank=1,
    prefill_instance_id=254,
    prefill_dp_rank=2,
    expected_output_tokens=128,
    lora="lora-a",
    cache_salt="tenant-a",
    priority=-3,
    policy_class="interactive",
    session_id="s-1",
    tenant="t-1",
    allowed_instance_ids=(255, 254),
    excluded_instance_ids=(253,),
    required_taints=("gpu=h100",),
    preferred_taints={"zone=a": 0.5},
)
_REQUEST = GenerateRequest(
    request_id="0123456789abcdef0123456789abcdef",
    model="org/Model-7B",
    token_ids=_TOKENS,
    parts=(_PART,),
    modality=Modality.IMAGE,
    sampling=SamplingOptions(
        temperature=0.7,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        repetition_penalty=1.1,
        seed=7,
        n=2,
        logit_bias={5: -1.5},
        allowed_token_ids=(5, 6),
        guided=GuidedDecoding(regex="[a-z]+", backend="outlines"),
    ),
    stop=StopConditions(
        max_tokens=64,
        min_tokens=2,
        stop=("\n\n",),
        stop_token_ids=(13,),
        ignore_eos=True,
        max_thinking_tokens=32,
    ),
    output=OutputOptions(logprobs=3, prompt_logprobs=1, skip_special_tokens=False, modality=Modality.AUDIO),
    routing=_HINTS,
    eos_token_ids=(2,),
    attempt=1,
    prompt_tokens=6,
    handoff=_PREFILL,
    deadline_s=30.0,
    health_check=True,
    extra={"priority": "high"},
)
_ERROR = ErrorRecord(
    error_class="capacity_exhausted",
    reason="capacity.worker_overloaded",
    message="all workers are busy; try again",
    diagnostic="queue 16/16",
    retry_after_s=1.5,
    param="model",
    causes=(ErrorRecord("unavailable", "backend.disconnected", "lost the worker"),),
)
_CHUNK = GenerateChunk(
    token_ids=pack_tokens((5, 6)),
    first_index=2,
    choice=1,
    attempt=1,
    finish_reason=FinishReason.STOP,
    stop_token_id=13,
    usage=Usage(prompt_tokens=6, completion_tokens=4, cached_tokens=4, reasoning_tokens=1),
    logprobs=(TokenLogprob(5, -0.25, (TopLogprob(6, -1.5),)), TokenLogprob(6, -0.5)),
    text="ok",
    parts=(_PART,),
    handoff=_PREFILL,
    error=_ERROR,
    extra={"engine": "x"},
)
_CARD = ModelCard(
    name="org/Model-7B",
    model_path="/models/model-7b",
    files={"tokenizer": CheckedFile("tokenizer.json", "00112233445566778899aabbccddeeff")},
    context_length=8192,
    kv_block_size=16,
    hash_algorithm="xxh3-1337-v2",
    model_types=(ModelType.CHAT, ModelType.EMBEDDING),
    model_input=ModelInput.TEXT,
    input_modalities=(Modality.TEXT, Modality.IMAGE),
    output_modalities=(Modality.TEXT, Modality.AUDIO),
    endpoint_types=EndpointTypes("example.request.v1", "example.response.v1"),
    worker_type=WorkerType.DECODE,
    needs=((WorkerType.PREFILL,), (WorkerType.ENCODE, WorkerType.AGGREGATED)),
    aliases=("model",),
    eos_token_ids=(2,),
    lora=LoraInfo("lora-a", "org/Model-7B", 4),
    capabilities=("logprobs", "n"),
    runtime_config=ModelRuntimeConfig(
        total_kv_blocks=1024,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        tool_call_parser="hermes",
        reasoning_parser="deepseek_r1",
        data_parallel_start_rank=2,
        data_parallel_size=4,
        enable_local_indexer=False,
        taints=("gpu=h100",),
        topology_domains={"rack": "r7"},
        disaggregated_endpoint={"host": "10.0.0.7", "port": 4711},
        runtime_data={"version": "1.2"},
    ),
    router_config={"temperature": 0.1},
    user_data={"team": "search"},
    version=2,
)
_LOAD = ReportedLoad(
    kv_used_blocks=10,
    kv_total_blocks=100,
    active_requests=3,
    waiting_requests=2,
    waiting_prefill_tokens=512,
    cache_hit_rate=0.25,
    reported_at_s=1700000000.5,
)
_FORWARD_PASS = ForwardPassMetrics(
    worker=_WORKER,
    wall_time_s=0.021,
    scheduled=ScheduledStats(1, 512, 2.5, 256, 7, 7000, 1.5),
    queued=QueuedStats(2, 1024, 3.5, 1, 900, 0.5),
    timestamp_s=1700000000.75,
)
_TRAFFIC = TrafficStats(
    model="org/Model-7B",
    interval_s=30.0,
    requests=100,
    prompt_tokens=51200,
    output_tokens=12800,
    cached_tokens=25600,
    errors=1,
    ttft_s=(0.2, 0.3),
    itl_s=(0.02, 0.03),
    ended_at_s=1700000030.0,
)

EXAMPLES: dict[str, Any] = {
    "dynamo.generate_request.v1": _REQUEST,
    "dynamo.generate_chunk.v1": _CHUNK,
    "dynamo.kv_event_batch.v1": KvEventBatch(
        worker=_WORKER,
        events=(
            BlockStored(7, _HASHES.sequence, _HASHES.local, (1 << 64) - 1, 5, Tier.HOST, "lora-a"),
            BlockRemoved(8, _HASHES.sequence, Tier.DISK),
            BlocksCleared(9, Tier.EXTERNAL),
            UnknownKvEvent(10, "frozen"),
        ),
        block_size=4,
        algorithm="xxh3-1337-v2",
        timestamp_s=1700000000.25,
        full_dump=True,
    ),
    "dynamo.kv_event_query.v1": KvEventQuery(worker=_WORKER, first=7, last=10),
    "dynamo.event_envelope.v1": EventEnvelope(
        topic="dynamo.backend.generate.kv-events",
        publisher_id=(1 << 53) - 1,
        sequence=12,
        payload=b"\x00\x01\xff",
        schema="dynamo.kv_event_batch.v1",
        published_at_s=1700000000.5,
        headers={"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
    ),
    "dynamo.error.v1": _ERROR,
    "dynamo.worker_load.v1": WorkerLoad(_WORKER, _LOAD, ProjectedLoad(512, 40, 3), QueuedLoad(2, 1024, 768)),
    "dynamo.forward_pass_metrics.v1": _FORWARD_PASS,
    "dynamo.model_card.v1": _CARD,
    "dynamo.instance.v1": Instance(
        endpoint=_ENDPOINT,
        instance_id=255,
        address="tcp://10.0.0.7:4711",
        types=EndpointTypes("example.request.v1", "example.response.v1"),
        device_type="cuda",
        metadata={"host": "node-7", "pid": "4242"},
    ),
    "dynamo.model_record.v1": ModelRecord(_ENDPOINT, 255, _CARD, "lora-a"),
    "dynamo.event_channel.v1": EventChannel(
        "dynamo.backend.generate.kv-events", 77, "tcp://10.0.0.7:5001", "tcp://10.0.0.7:5002"
    ),
    "dynamo.routing_request.v1": RoutingRequest(
        request_id="r-1",
        model="org/Model-7B",
        prompt_tokens=8,
        block_size=4,
        local_hashes=_HASHES.local,
        sequence_hashes=_HASHES.sequence,
        algorithm="xxh3-1337-v2",
        token_ids=_TOKENS,
        hints=_HINTS,
        phase=RoutingPhase.PREFILL,
        attempt=1,
        reserve=False,
        excluded=(_WORKER, WorkerId(254)),
    ),
    "dynamo.routing_decision.v1": RoutingDecision(
        decision_id=DecisionId("d-1"),
        request_id="r-1",
        worker=_WORKER,
        policy="kv",
        policy_hash="ab12",
        reservation=ReservationId("v-1"),
        overlap_blocks=2,
        tier_blocks={"host_pinned": 1},
        cached_tokens=12,
        candidates=(
            CandidateScore(_WORKER, 10.5, {"prefill_blocks": 4.0}, {"prefill": 10.5}),
            CandidateScore(WorkerId(254), rejected_by="taints: gpu=h100"),
        ),
        margin=1.25,
        reason="lowest cost",
        view_age_s=0.5,
        index_mode="exact",
        queued_s=0.125,
        decided_at_s=1700000000.5,
    ),
    "dynamo.request_outcome.v1": RequestOutcome(
        decision_id=DecisionId("d-1"),
        finish_reason=FinishReason.ERROR,
        prompt_tokens=8,
        output_tokens=4,
        cached_tokens=4,
        ttft_s=0.25,
        duration_s=1.5,
        error_reason="backend.disconnected",
    ),
    "dynamo.traffic_stats.v1": _TRAFFIC,
    "dynamo.observation.v1": Observation(
        at_s=1700000030.0,
        traffic=(_TRAFFIC,),
        pools={"worker": PoolState(2, 1, 1, 3, 1, 20.5)},
        loads={"ff": _LOAD},
        passes=(_FORWARD_PASS,),
        stale=("loads",),
        roles={"ff": "decode"},
    ),
    "dynamo.scaling_decision.v1": ScalingDecision(
        decision_id=3,
        at_s=1700000030.0,
        replicas={"worker": 4},
        previous={"worker": 3},
        reason="scale_up",
        explanation="3.6 replicas needed for 100 requests",
        values={"needed": 3.6},
        advisory=True,
        reasons={"throughput": "set_lower_bound", "load.worker": "scale_up"},
    ),
    "dynamo.transfer_request.v1": TransferRequest(
        transfer_id="t-1",
        sequence_hashes=(14643705804678351452, 1),
        layout=BlockLayout(2, 16, 4, 64, "bf16", 1, 2),
        algorithm="xxh3-1337-v2",
        deadline_s=5.0,
    ),
}
