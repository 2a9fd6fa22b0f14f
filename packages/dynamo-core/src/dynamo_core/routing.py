"""The router contract: select a worker, book the load, report what became of it, and keep the receipt."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import msgspec

from dynamo_core.cards import ModelCard
from dynamo_core.component import ComponentContext
from dynamo_core.enums import FinishReason, WireEnum
from dynamo_core.ids import DecisionId, EndpointId, ReservationId, WorkerId
from dynamo_core.load import WorkerLoad
from dynamo_core.requests import RoutingHints
from dynamo_core.tokens import XXH3_1337_V1, PackedHashes, PackedTokens

_NO_HASHES = PackedHashes(b"")
_NO_TOKENS = PackedTokens(b"")


class RoutingPhase(WireEnum):
    """Which hop a selection is for."""

    AGGREGATED = "aggregated"
    PREFILL = "prefill"
    DECODE = "decode"
    ENCODE = "encode"
    UNKNOWN = "unknown"


class RoutingRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a router needs to know of a request. Carries hashes, so that nobody hashes a prompt twice.

    Attributes:
        request_id: The request.
        model: Model name.
        prompt_tokens: Length of the prompt.
        block_size: Tokens per block of the hashes; 0 if there are none.
        local_hashes: Content hashes of the prompt's full blocks, packed.
        sequence_hashes: Chained hashes of the same, packed.
        algorithm: Hash algorithm of both.
        token_ids: The prompt itself, for callers that did not hash it; packed.
        hints: What the client asks for.
        phase: Which hop this is.
        attempt: 0 at first, more after a worker's loss.
        reserve: Book the load. False only asks.
        excluded: Workers not to use, for example those that just failed this request.
    """

    request_id: str
    model: str = ""
    prompt_tokens: int = 0
    block_size: int = 0
    local_hashes: PackedHashes = _NO_HASHES
    sequence_hashes: PackedHashes = _NO_HASHES
    algorithm: str = XXH3_1337_V1
    token_ids: PackedTokens = _NO_TOKENS
    hints: RoutingHints = msgspec.field(default_factory=RoutingHints)
    phase: RoutingPhase = RoutingPhase.AGGREGATED
    attempt: int = 0
    reserve: bool = True
    excluded: tuple[WorkerId, ...] = ()


class CandidateScore(msgspec.Struct, frozen=True, omit_defaults=True):
    """One worker in a receipt.

    Attributes:
        worker: Which.
        cost: Total; lower is better. None if a filter removed it.
        raw: Each input by name, unweighted.
        weighted: Each term of the cost by name; they sum to ``cost``.
        rejected_by: The filter that removed it, with the reason; empty if none did.
    """

    worker: WorkerId
    cost: float | None = None
    raw: dict[str, float] = {}
    weighted: dict[str, float] = {}
    rejected_by: str = ""


class RoutingDecision(msgspec.Struct, frozen=True, omit_defaults=True):
    """The receipt of a selection.

    Attributes:
        decision_id: Its identity; goes into the response's headers.
        request_id: The request.
        worker: The choice.
        policy: Name of the policy that chose.
        policy_hash: Digest of the policy's parameters.
        reservation: The booking, if one was asked for.
        overlap_blocks: Blocks of the prompt that the worker is believed to hold on the device.
        tier_blocks: The same by tier name, each counted beyond the nearer tiers.
        cached_tokens: Prompt tokens expected not to be computed.
        candidates: Every worker considered; empty if receipts are off or this one was sampled out.
        margin: Cost of the runner-up minus cost of the choice.
        reason: In words, for example ``fallback: time budget``.
        view_age_s: Age of the oldest load report used.
        index_mode: ``exact``, ``approximate`` or ``load-only``.
        queued_s: Seconds that the request waited in the router.
        decided_at_s: Unix time.
    """

    decision_id: DecisionId
    request_id: str
    worker: WorkerId
    policy: str
    policy_hash: str = ""
    reservation: ReservationId | None = None
    overlap_blocks: int = 0
    tier_blocks: dict[str, int] = {}
    cached_tokens: int = 0
    candidates: tuple[CandidateScore, ...] = ()
    margin: float | None = None
    reason: str = ""
    view_age_s: float | None = None
    index_mode: str = ""
    queued_s: float = 0.0
    decided_at_s: float = 0.0


class RequestOutcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of a routed request; joined with its receipt.

    Attributes:
        decision_id: The receipt.
        finish_reason: How it ended; ``ERROR`` with ``error_reason`` if it failed.
        prompt_tokens: Prompt length.
        output_tokens: Tokens generated.
        cached_tokens: Prompt tokens that the engine says were cached; None if it did not say.
        ttft_s: Seconds to the first token; None if there was none.
        duration_s: Seconds in all.
        error_reason: Reason of the error, if one ended it.
    """

    decision_id: DecisionId
    finish_reason: FinishReason = FinishReason.EOS
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int | None = None
    ttft_s: float | None = None
    duration_s: float = 0.0
    error_reason: str = ""


class RouterScope(msgspec.Struct, frozen=True):
    """The worker set a router serves.

    Attributes:
        endpoint: Endpoint whose instances are candidates.
        card: Card of the set: block size, algorithm, router settings.
        policy: Name of the routing policy; empty for the router's default.
        options: Policy and router settings by name.
    """

    endpoint: EndpointId
    card: ModelCard
    policy: str = ""
    options: dict[str, Any] = {}


@runtime_checkable
class Router(Protocol):
    """Chooses workers. One event loop; ``select`` may be called concurrently, the reports are synchronous.

    A reservation lives from ``select`` until ``complete``; one whose caller vanished is dropped after a time without
    progress, never by absolute age.
    """

    async def start(self) -> None:
        """Begin to watch workers, KV events and loads."""
        ...

    async def stop(self) -> None:
        """Stop watching. Idempotent."""
        ...

    async def select(self, request: RoutingRequest) -> RoutingDecision:
        """Choose a worker and, if asked, book it. May wait in a bounded queue; cancelling leaves the queue.

        Raises:
            UnavailableError: if no worker exists or all are excluded.
            CapacityExhaustedError: if all eligible workers are busy and the queue is full.
            InvalidRequestError: for an unknown pinned worker, another block size or hash algorithm.
        """
        ...

    def first_token(self, reservation: ReservationId) -> None:
        """The prompt is computed: prefill load ends. Unknown reservations are ignored."""
        ...

    def progress(self, reservation: ReservationId, output_tokens: int) -> None:
        """The request has this many output tokens; renews the reservation."""
        ...

    def complete(self, reservation: ReservationId, outcome: RequestOutcome) -> None:
        """The request ended on this worker; frees the booking. Idempotent."""
        ...

    def inhibit(self, worker: WorkerId, reason: str) -> None:
        """Leave a worker out for a short while after a path to it failed; discovery stays authoritative."""
        ...

    def workers(self) -> list[WorkerId]:
        """Workers known at this moment."""
        ...

    def loads(self) -> list[WorkerLoad]:
        """Their loads."""
        ...


class RouterFactory(Protocol):
    """Entry of ``dynamo_core.routers``: makes a router for one worker set."""

    def __call__(self, context: ComponentContext, scope: RouterScope) -> Router:
        """Return a router that is not yet started.

        Raises:
            ConfigurationError: for an unknown policy or option.
        """
        ...


@runtime_checkable
class SupportsReceipts(Protocol):
    """The router keeps its decisions for a while."""

    def decision(self, decision_id: str) -> tuple[RoutingDecision, RequestOutcome | None] | None:
        """Return a receipt with its outcome, if both are still kept."""
        ...


@runtime_checkable
class SupportsStaticWorkers(Protocol):
    """Workers can be named by the caller instead of found by discovery, as a gateway needs."""

    def upsert_worker(self, worker: WorkerId, card: ModelCard) -> None:
        """Add or refresh a worker."""
        ...

    def remove_worker(self, worker: WorkerId) -> None:
        """Forget a worker and what its cache held."""
        ...
