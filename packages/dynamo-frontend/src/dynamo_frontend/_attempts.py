"""What one attempt sends: the request of a first or later worker, the routing question, the error of a chunk."""

from __future__ import annotations

from functools import lru_cache

import msgspec

from dynamo_core.cards import ModelCard
from dynamo_core.errors import (
    BackendProtocolError,
    CancelledRequestError,
    DynamoError,
    UnavailableError,
    error_from_record,
)
from dynamo_core.ids import WorkerId
from dynamo_core.requests import GenerateChunk, GenerateRequest
from dynamo_core.routing import RoutingRequest
from dynamo_core.tokens import BlockHasher, PackedHashes, PackedTokens, token_count
from dynamo_frontend._ledger import TokenLedger
from dynamo_frontend._media.source import block_media

_NO_HASHES = PackedHashes(b"")
_NO_TOKENS = PackedTokens(b"")


def attempt_request(request: GenerateRequest, ledger: TokenLedger, left_s: float | None = None) -> GenerateRequest:
    """Return the request for the ledger's present attempt, which may take ``left_s``.

    One choice goes on after its accepted tokens. Several choices have no common sequence to go on from: they are drawn
    again from the same seed, and what is known of them is checked and dropped.
    """
    if not ledger.attempt:
        return request
    if request.sampling.n > 1 or not ledger.total_tokens:
        return msgspec.structs.replace(request, attempt=ledger.attempt, deadline_s=left_s)
    return msgspec.structs.replace(
        request,
        attempt=ledger.attempt,
        deadline_s=left_s,
        token_ids=ledger.continuation(request.token_ids),
        prompt_tokens=token_count(request.token_ids),
    )


@lru_cache(maxsize=1024)
def _hasher(block_size: int, lora: str, salt: str) -> BlockHasher:
    return BlockHasher(block_size, lora, salt)


def routing_request(request: GenerateRequest, card: ModelCard, excluded: tuple[WorkerId, ...]) -> RoutingRequest:
    """Return the question to the router, with the prompt hashed once."""
    local = sequence = _NO_HASHES
    if card.kv_block_size:
        hasher = _hasher(card.kv_block_size, request.routing.lora, request.routing.cache_salt)
        blocks = token_count(request.token_ids) // card.kv_block_size
        media = block_media(request.parts, card.kv_block_size, blocks) if request.parts else ()
        hashes = hasher.hash_tokens(request.token_ids, mm_hashes=media)
        local, sequence = hashes.local, hashes.sequence
    hints = request.routing
    if request.deadline_s is not None:
        hints = msgspec.structs.replace(hints, deadline_s=request.deadline_s)
    return RoutingRequest(
        request_id=request.request_id,
        model=request.model,
        prompt_tokens=token_count(request.token_ids),
        block_size=card.kv_block_size,
        local_hashes=local,
        sequence_hashes=sequence,
        algorithm=card.hash_algorithm,
        token_ids=_NO_TOKENS if card.kv_block_size else request.token_ids,
        hints=hints,
        attempt=request.attempt,
        excluded=excluded,
    )


def chunk_error(chunk: GenerateChunk) -> DynamoError:
    """Return the error that a chunk carries."""
    if chunk.error is None:
        return BackendProtocolError("The worker reported an error without saying which.", reason="backend.protocol")
    error = error_from_record(chunk.error)
    if isinstance(error, CancelledRequestError):
        # Nobody here cancelled: to the client this is a worker that gave up.
        return UnavailableError(error.message, reason="backend.cancelled")
    return error
