"""Bodies of the selection service, and how they map to core's values."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec

from dynamo_core.cards import ModelCard, ModelRuntimeConfig
from dynamo_core.enums import FinishReason, Tier, WorkerType
from dynamo_core.errors import DynamoError, InvalidRequestError
from dynamo_core.events import BlockRemoved, BlocksCleared, BlockStored, KvEvent, KvEventBatch
from dynamo_core.ids import DecisionId, WorkerId
from dynamo_core.load import ReportedLoad
from dynamo_core.requests import RoutingHints
from dynamo_core.routing import RequestOutcome, RoutingDecision, RoutingPhase, RoutingRequest
from dynamo_core.tokens import BlockHasher, PackedHashes, pack_hashes, pack_tokens
from dynamo_router._engine_address import EngineAddress, rank_endpoint

B = TypeVar("B", bound="Body")
_U64 = (1 << 64) - 1


class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A JSON request body; unknown fields are refused by name."""


class WorkerBody(Body, frozen=True):
    """A worker to route to, all its dp ranks together.

    Attributes:
        worker_type: Its role; prefill workers are chosen by requests of phase ``prefill`` and split ones only.
        kv_events_endpoints: By dp rank, where its engine publishes KV events over ZMQ; empty if events are posted.
        replay_endpoint: The engine's replay socket of dp rank 0; others add their rank to the port.
    """

    worker_id: int
    block_size: int
    model_name: str = "default"
    routing_group: str = "default"
    worker_type: WorkerType = WorkerType.AGGREGATED
    endpoint: str = ""
    data_parallel_start_rank: int = 0
    data_parallel_size: int = 1
    total_kv_blocks: int | None = None
    max_num_batched_tokens: int | None = None
    taints: tuple[str, ...] = ()
    kv_events_endpoints: dict[int, str] = {}
    replay_endpoint: str = ""

    def card(self) -> ModelCard:
        """Return the card that says the same."""
        config = ModelRuntimeConfig(
            total_kv_blocks=self.total_kv_blocks,
            max_num_batched_tokens=self.max_num_batched_tokens,
            data_parallel_start_rank=self.data_parallel_start_rank,
            data_parallel_size=self.data_parallel_size,
            taints=self.taints,
        )
        return ModelCard(self.model_name, kv_block_size=self.block_size, runtime_config=config)

    def workers(self) -> list[WorkerId]:
        """Return its dp ranks."""
        first = self.data_parallel_start_rank
        return [WorkerId(self.worker_id, rank) for rank in range(first, first + self.data_parallel_size)]

    def engine(self) -> EngineAddress:
        """Return where its engines publish.

        Raises:
            InvalidRequestError: if a rank is not the worker's, or the replay address has no port to count ranks from.
        """
        known = {worker.dp_rank for worker in self.workers()}
        if unknown := sorted(self.kv_events_endpoints.keys() - known):
            raise InvalidRequestError(
                f"kv_events_endpoints names dp rank {unknown[0]}, the worker has {min(known)}..{max(known)}; "
                "set data_parallel_size, or leave it out",
                param="kv_events_endpoints",
            )
        replays = {rank: rank_endpoint(self.replay_endpoint, rank) for rank in self.kv_events_endpoints}
        return EngineAddress(self.worker_id, self.kv_events_endpoints, replays)


class SelectBody(Body, frozen=True):
    """A prompt to place, as tokens or as hashes.

    Attributes:
        deadline_s: Seconds for which it is worth waiting for a worker; None for what the hints say.
    """

    selection_id: str = ""
    model_name: str = "default"
    routing_group: str = "default"
    token_ids: list[int] = []
    block_hashes: list[int] = []
    sequence_hashes: list[int] = []
    isl_tokens: int = 0
    hints: RoutingHints = RoutingHints()
    session_id: str = ""
    deadline_s: float | None = None
    phase: RoutingPhase = RoutingPhase.AGGREGATED
    excluded: tuple[WorkerId, ...] = ()

    @property
    def for_prefill(self) -> bool:
        """Whether a prefill worker is to be chosen."""
        return self.phase is RoutingPhase.PREFILL

    def request(self, block_size: int, *, reserve: bool) -> RoutingRequest:
        """Return it as core's request."""
        hints = msgspec.structs.replace(self.hints, session_id=self.session_id) if self.session_id else self.hints
        return RoutingRequest(
            request_id=self.selection_id,
            model=self.model_name,
            prompt_tokens=self.isl_tokens or len(self.token_ids),
            block_size=block_size,
            local_hashes=_hashes(self.block_hashes),
            sequence_hashes=_hashes(self.sequence_hashes),
            token_ids=pack_tokens(self.token_ids),
            hints=hints,
            phase=self.phase,
            reserve=reserve,
            excluded=self.excluded,
        )


class ReservationBody(SelectBody, frozen=True, kw_only=True):
    """A prompt that was placed by someone else, to be booked there."""

    worker_id: int
    dp_rank: int = 0

    def request(self, block_size: int, *, reserve: bool) -> RoutingRequest:
        """Return it as core's request, pinned."""
        hints = msgspec.structs.replace(
            self.hints,
            instance_id=self.worker_id,
            dp_rank=self.dp_rank,
            prefill_instance_id=self.worker_id,
            prefill_dp_rank=self.dp_rank,
        )
        return msgspec.structs.replace(super().request(block_size, reserve=reserve), hints=hints)


class LoadBody(Body, frozen=True):
    """What a worker's engine measured last."""

    kv_used_blocks: int
    kv_total_blocks: int
    dp_rank: int = 0
    active_requests: int = 0
    waiting_requests: int = 0
    waiting_prefill_tokens: int = 0

    def worker(self, body: WorkerBody) -> WorkerId:
        """Return which rank of a worker this is of.

        Raises:
            InvalidRequestError: if the worker has no such rank.
        """
        found = WorkerId(body.worker_id, self.dp_rank)
        if found not in body.workers():
            raise InvalidRequestError(
                f"worker {body.worker_id} has no dp rank {self.dp_rank}; GET /workers shows its ranks", param="dp_rank"
            )
        return found

    def reported(self, now_s: float) -> ReportedLoad:
        """Return it as core's report."""
        return ReportedLoad(
            self.kv_used_blocks,
            self.kv_total_blocks,
            self.active_requests,
            self.waiting_requests,
            self.waiting_prefill_tokens,
            reported_at_s=now_s,
        )


class OutputBlockBody(Body, frozen=True):
    """Output blocks that a request has filled since the last report."""

    blocks: Annotated[int, msgspec.Meta(ge=1)] = 1
    decay_fraction: float | None = None

    def __post_init__(self) -> None:
        if self.decay_fraction is not None:
            raise ValueError(
                "decay_fraction is not supported, since a block counts whole until its reservation ends; leave it out, "
                "and end reservations when their requests end"
            )


class ProgressBody(Body, frozen=True):
    """How far a request is."""

    output_tokens: int


class OutcomeBody(Body, frozen=True):
    """How a request ended."""

    finish_reason: FinishReason = FinishReason.EOS
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int | None = None
    ttft_s: float | None = None
    duration_s: float = 0.0

    def outcome(self, decision_id: str) -> RequestOutcome:
        """Return it as core's outcome."""
        return RequestOutcome(
            DecisionId(decision_id),
            self.finish_reason,
            self.prompt_tokens,
            self.output_tokens,
            self.cached_tokens,
            self.ttft_s,
            self.duration_s,
        )


class EventBody(Body, frozen=True):
    """One KV event: ``stored`` with hashes or tokens, ``removed``, or ``cleared``. Hashes may be signed or unsigned."""

    type: str
    event_id: int
    block_hashes: list[int] = []
    token_hashes: list[int] = []
    token_ids: list[int] = []
    parent_block_hash: int | None = None
    medium: Tier = Tier.DEVICE

    def event(self, block_size: int) -> KvEvent:
        """Return it as core's event.

        Raises:
            InvalidRequestError: for another type.
        """
        if self.type == "stored":
            local = _hashes(self.token_hashes) or BlockHasher(block_size).hash_tokens(pack_tokens(self.token_ids)).local
            parent = None if self.parent_block_hash is None else self.parent_block_hash & _U64
            return BlockStored(self.event_id, _hashes(self.block_hashes), local, parent, tier=self.medium)
        if self.type == "removed":
            return BlockRemoved(self.event_id, _hashes(self.block_hashes), self.medium)
        if self.type == "cleared":
            return BlocksCleared(self.event_id)
        raise InvalidRequestError(
            f"event type {self.type!r} is not stored, removed or cleared; send one of these", param="type"
        )


class EventsBody(Body, frozen=True):
    """KV events of one dp rank in order."""

    worker_id: int
    events: tuple[EventBody, ...]
    dp_rank: int = 0
    model_name: str = "default"
    routing_group: str = "default"
    block_size: int = 0
    full_dump: bool = False

    def batch(self, block_size: int) -> KvEventBatch:
        """Return them as core's batch."""
        events = tuple(event.event(self.block_size or block_size) for event in self.events)
        worker = WorkerId(self.worker_id, self.dp_rank)
        return KvEventBatch(worker, events, self.block_size, full_dump=self.full_dump)


def read_body(kind: type[B], payload: bytes) -> B:
    """Read a JSON body.

    Raises:
        InvalidRequestError: naming the field that does not fit.
    """
    try:
        return msgspec.json.decode(payload or b"{}", type=kind)
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"the body does not fit: {error}") from error


def changed_worker(body: WorkerBody, payload: bytes) -> WorkerBody:
    """Return a worker with the facts that a JSON body changes.

    Raises:
        InvalidRequestError: naming the field that does not fit or cannot change.
    """
    changes = read_fields(payload)
    if changes.get("worker_id", body.worker_id) != body.worker_id:
        raise InvalidRequestError("a worker cannot change its worker_id; register another worker", param="worker_id")
    try:
        return msgspec.convert(msgspec.to_builtins(body, str_keys=True) | changes, WorkerBody, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"the body does not fit: {error}") from error


def read_fields(payload: bytes) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InvalidRequestError: if it is none.
    """
    try:
        return msgspec.json.decode(payload or b"{}", type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"the body is no JSON object: {error}") from error


def selection(decision: RoutingDecision, body: SelectBody, *, block_size: int, endpoint: str) -> dict[str, Any]:
    """Return a decision in the service's shape; counts are in tokens."""
    tiers = {name: blocks * block_size for name, blocks in decision.tier_blocks.items()}
    prompt = max(body.isl_tokens, len(body.token_ids), len(body.block_hashes) * block_size)
    return {
        "selection_id": body.selection_id,
        "decision_id": decision.decision_id,
        "reservation_id": decision.reservation,
        "worker_id": decision.worker.instance_id,
        "dp_rank": decision.worker.dp_rank,
        "endpoint": endpoint,
        "block_size": block_size,
        "overlap": {
            "longest_matched": sum(tiers.values()),
            "gpu": tiers.get(Tier.DEVICE.value, 0),
            "cpu": tiers.get(Tier.HOST.value, 0),
            "disk": tiers.get(Tier.DISK.value, 0),
            "external": tiers.get(Tier.EXTERNAL.value, 0),
        },
        "effective_prefill_tokens": max(prompt - decision.cached_tokens, 0),
        "policy": decision.policy,
        "index_mode": decision.index_mode,
        "queued_s": decision.queued_s,
    }


def error_body(error: DynamoError) -> dict[str, Any]:
    """Return an error as JSON."""
    return {
        "error": {
            "message": error.message,
            "type": error.error_class.value,
            "code": error.reason,
            "param": error.param,
        }
    }


def _hashes(values: list[int]) -> PackedHashes:
    return pack_hashes([value & _U64 for value in values])
