"""The encode role, and how other workers have their media encoded by it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import msgspec
import structlog

from dynamo_core.clock import Clock
from dynamo_core.content import ContentPart
from dynamo_core.engine import Engine, EngineConfig, EngineContext
from dynamo_core.enums import FinishReason, PartKind
from dynamo_core.errors import DeadlineExceededError, DynamoError, InvalidRequestError, UnavailableError
from dynamo_core.planes import RequestContext
from dynamo_core.requests import GenerateChunk, GenerateRequest, Usage
from dynamo_core.tokens import PackedTokens, token_count
from dynamo_worker._deadline import within
from dynamo_worker._disagg.handoff import ends_of_choices
from dynamo_worker._disagg.peers import Peers
from dynamo_worker._media import content_hash
from dynamo_worker._metrics import WorkerMetrics

MAX_KEPT_ENCODINGS = 256
_ATTEMPTS = 2
_RAW = (PartKind.IMAGE, PartKind.AUDIO, PartKind.VIDEO)

log = structlog.get_logger(__name__)


@runtime_checkable
class SupportsEncode(Protocol):
    """An engine whose encoder can run apart from its model."""

    async def encode(self, parts: Sequence[ContentPart]) -> tuple[ContentPart, ...]:
        """Return the parts with media as the tensors that the model takes, in the same order and places.

        Raises:
            InvalidRequestError: if it does not take one of them.
        """
        ...


class EncodeEngine:
    """An engine that only encodes, around one that could do more. The inner engine's life is its host's.

    Args:
        engine: Answers canaries.
        encoder: The same engine's encoder.
    """

    def __init__(self, engine: Engine, encoder: SupportsEncode) -> None:
        self._engine = engine
        self._encoder = encoder

    async def start(self, context: EngineContext) -> EngineConfig:
        """Start the inner engine."""
        return await self._engine.start(context)

    async def generate(self, request: GenerateRequest, context: RequestContext) -> AsyncIterator[GenerateChunk]:
        """Yield one chunk: no tokens, and the request's parts, encoded. A canary gets what the engine gives.

        Raises:
            InvalidRequestError: if the request brings nothing to encode, or what the engine does not take.
        """
        if request.health_check:
            chunks: Any = self._engine.generate(request, context)
            async for chunk in chunks:
                yield chunk
            return
        if not request.parts:
            raise InvalidRequestError("an encode worker takes requests with content parts", param="parts")
        parts = await self._encoder.encode(request.parts)
        for chunk in ends_of_choices(request, FinishReason.STOP):
            yield chunk
        yield GenerateChunk(
            first_index=request.accepted_tokens,
            attempt=request.attempt,
            finish_reason=FinishReason.STOP,
            usage=Usage(request.prompt_tokens or token_count(request.token_ids), request.accepted_tokens),
            parts=parts,
        )

    async def abort(self, request_id: str) -> None:
        """Abort in the inner engine; an encoding that runs is not worth a stop."""
        await self._engine.abort(request_id)

    async def drain(self) -> None:
        """Drain the inner engine."""
        await self._engine.drain()

    async def cleanup(self) -> None:
        """Clean the inner engine up."""
        await self._engine.cleanup()


@dataclass(frozen=True)
class EncodeOptions:
    """How media are encoded.

    Attributes:
        timeout_s: Longest wait for an encode worker.
        local_encode: Whether the engine encodes what no encode worker has.
    """

    timeout_s: float
    local_encode: bool


class RemoteEncoding:
    """The preparation of requests with media: an encode worker turns them into tensors. Recent ones are kept.

    Args:
        model: Served model name.
        peers: Encode workers.
        options: How long, and what then.
        clock: Time.
        metrics: Where counts go.
    """

    def __init__(
        self, *, model: str, peers: Peers, options: EncodeOptions, clock: Clock, metrics: WorkerMetrics
    ) -> None:
        self._model = model
        self._peers = peers
        self._options = options
        self._clock = clock
        self._metrics = metrics
        self._kept: OrderedDict[tuple[PartKind, int], ContentPart] = OrderedDict()

    def concerns(self, request: GenerateRequest) -> bool:
        """Whether a part is still as its sender had it."""
        return any(part.kind in _RAW for part in request.parts)

    async def prepare(self, request: GenerateRequest) -> GenerateRequest:
        """Return the request with encoded parts, or as it is if the engine is to encode them.

        Raises:
            DynamoError: if they cannot be encoded elsewhere and must not be here, or are at fault themselves.
        """
        outcome = "remote"
        try:
            limit_s = self._options.timeout_s
            if request.deadline_s is not None:
                limit_s = min(limit_s, request.deadline_s)
            outcome, request = await within(self._clock, limit_s, self._encoded(request, limit_s))
        except TimeoutError:
            outcome = "timeout"
            if not self._options.local_encode:
                raise DeadlineExceededError(
                    f"The media were not encoded within {self._options.timeout_s} s.", reason="backend.encode_timeout"
                ) from None
        except InvalidRequestError:
            outcome = "refused"
            raise
        except DynamoError as error:
            outcome = "failed"
            if not self._options.local_encode:
                raise
            log.info("media are encoded here", request_id=request.request_id, reason=error.reason, why=error.message)
        finally:
            self._metrics.remote_encodes.labels(outcome=outcome).inc()
        return request

    async def _encoded(self, request: GenerateRequest, limit_s: float) -> tuple[str, GenerateRequest]:
        missing = tuple(part for part in request.parts if part.kind in _RAW and _key(part) not in self._kept)
        if missing:
            encoded = await self._ask_peers(request, missing, limit_s)
            if encoded is None:
                return "no_peer", request
            for raw, part in zip(missing, encoded, strict=True):
                self._kept[_key(raw)] = part
        found = tuple(self._of(part) if part.kind in _RAW else part for part in request.parts)
        while len(self._kept) > MAX_KEPT_ENCODINGS:
            self._kept.popitem(last=False)
        return "remote" if missing else "kept", msgspec.structs.replace(request, parts=found)

    async def _ask_peers(
        self, request: GenerateRequest, parts: tuple[ContentPart, ...], limit_s: float
    ) -> tuple[ContentPart, ...] | None:
        asked = msgspec.structs.replace(
            request, parts=parts, token_ids=PackedTokens(b""), prompt_tokens=0, handoff=None
        )
        tried: set[int] = set()
        for attempt in range(_ATTEMPTS):
            instance = self._peers.choose(self._model, excluded=frozenset(tried))
            if instance is None:
                break
            tried.add(instance.instance_id)
            try:
                return await self._peers.encode(instance, asked, deadline_s=limit_s)
            except UnavailableError:
                if attempt + 1 == _ATTEMPTS:
                    raise
        if self._options.local_encode:
            return None
        raise UnavailableError(
            f"No encode worker serves {self._model} at {self._peers.endpoint}.", reason="backend.worker_unavailable"
        )

    def _of(self, part: ContentPart) -> ContentPart:
        """Return the kept encoding, at this part's place."""
        key = _key(part)
        self._kept.move_to_end(key)
        return msgspec.structs.replace(
            self._kept[key], metadata=part.metadata, index=part.index, content_hash=content_hash(part)
        )


def _key(part: ContentPart) -> tuple[PartKind, int]:
    return part.kind, content_hash(part)
