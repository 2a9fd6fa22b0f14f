"""The prompt of a routing request as block hashes, whatever form the caller gave it in."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from dynamo_core.errors import InvalidRequestError
from dynamo_core.routing import RoutingRequest
from dynamo_core.tokens import (
    BlockHasher,
    chain_hashes,
    pack_hashes,
    require_algorithm,
    token_count,
    unpack_hashes,
)


class Prompt(msgspec.Struct, frozen=True):
    """A prompt ready for look-up.

    Attributes:
        tokens: Its length.
        hashes: Sequence hashes of its full blocks.
    """

    tokens: int
    hashes: Sequence[int]


def read_prompt(request: RoutingRequest, block_size: int) -> Prompt:
    """Return the prompt's hashes; given ones are used, else its tokens are hashed.

    Raises:
        InvalidRequestError: if given hashes are of another block size or algorithm.
    """
    if not (request.sequence_hashes or request.local_hashes):
        return _hash_tokens(request, block_size)
    require_algorithm(request.algorithm)
    if request.block_size != block_size:
        raise InvalidRequestError(
            f"the request's hashes are of block size {request.block_size}, this router's is {block_size}; "
            "hash with the model's kv_block_size",
            reason="request.block_size_mismatch",
            param="block_size",
        )
    packed = request.sequence_hashes or pack_hashes(chain_hashes(unpack_hashes(request.local_hashes)))
    hashes = unpack_hashes(packed)
    # A continuation may hash accepted tokens beyond the original prompt's length.
    tokens = max(request.prompt_tokens, token_count(request.token_ids), len(hashes) * block_size)
    return Prompt(tokens, hashes)


def _hash_tokens(request: RoutingRequest, block_size: int) -> Prompt:
    tokens = max(token_count(request.token_ids), request.prompt_tokens)
    hasher = BlockHasher(block_size, request.hints.lora, request.hints.cache_salt)
    return Prompt(tokens, unpack_hashes(hasher.hash_tokens(request.token_ids).sequence))
