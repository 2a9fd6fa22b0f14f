"""One choice of one request on its way through the engine."""

from __future__ import annotations

import enum
from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Items

from dynamo_core.kv import BlockDescriptor
from dynamo_core.requests import GenerateRequest
from dynamo_core.tokens import BlockHasher, unpack_hashes, unpack_tokens
from dynamo_worker._media import media_of_blocks
from dynamo_worker._reference._block_pool import KVCacheBlock
from dynamo_worker._reference._encoder import Rows
from dynamo_worker._reference._grammar import Grammar
from dynamo_worker._reference._lora import LoraAdapter


class SequenceState(enum.Enum):
    """Where a sequence is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """Tokens, KV blocks and progress of one choice.

    ``num_computed_tokens`` counts the tokens whose KV lies in ``blocks``. The others, at least one, are computed in
    coming steps: the rest of a prompt, or the one token sampled last.

    Args:
        request: What was asked; on a continuation its tokens hold accepted output behind the prompt.
        choice: Index of the choice.
        seed: Seed of its draws.
        max_context: Most tokens of prompt and output together.
        block_size: Tokens a block.
    """

    def __init__(self, request: GenerateRequest, *, choice: int, seed: int, max_context: int, block_size: int) -> None:
        self.request = request
        self.choice = choice
        self.seed = seed
        self.tokens = array("I", unpack_tokens(request.token_ids))
        self.num_prompt_tokens = request.prompt_tokens or len(self.tokens)
        self.adjusts_logits = _adjusts_logits(request)
        self.max_output_tokens = _max_output_tokens(request, max_context - self.num_prompt_tokens)
        self.state = SequenceState.WAITING
        self.blocks: list[KVCacheBlock] = []
        self.block_ids: list[int] = []
        self.num_computed_tokens = 0
        self.num_cached_tokens: int | None = None
        self.num_registered_blocks = 0
        self.is_looked_ahead = False
        self.adapter: LoraAdapter | None = None
        self.grammar: Grammar | None = None
        self.media: Rows = ()
        self._block_size = block_size
        self._hasher = BlockHasher(block_size, lora=request.routing.lora, salt=request.routing.cache_salt)
        self._descriptors: list[BlockDescriptor] = []

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens over all attempts."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_pending_tokens(self) -> int:
        """Tokens whose KV is still to be computed."""
        return len(self.tokens) - self.num_computed_tokens

    @property
    def is_prefilling(self) -> bool:
        """Whether more than the newest token is to be computed."""
        return self.num_pending_tokens > 1

    def hold(self, blocks: Items[KVCacheBlock]) -> None:
        """Append blocks to its block table."""
        self.blocks.extend(blocks)
        self.block_ids.extend(block.block_id for block in blocks)

    def replace(self, first: int, blocks: Items[KVCacheBlock]) -> None:
        """Put blocks of the same content in place of those from ``first`` on."""
        self.blocks[first : first + len(blocks)] = blocks
        self.block_ids[first : first + len(blocks)] = [block.block_id for block in blocks]

    def descriptors(self, num_blocks: int) -> list[BlockDescriptor]:
        """Return the first full blocks by content; each is hashed once."""
        known = len(self._descriptors)
        if known < num_blocks:
            self._descriptors.extend(self._hash_blocks(known, num_blocks))
        return self._descriptors[:num_blocks]

    def reset(self) -> None:
        """Forget all progress but the tokens, after its blocks were freed."""
        self.blocks = []
        self.block_ids = []
        self.num_computed_tokens = 0
        self.num_registered_blocks = 0

    def _hash_blocks(self, first: int, stop: int) -> Iterable[BlockDescriptor]:
        parent = self._descriptors[-1].sequence_hash if self._descriptors else None
        packed = self.tokens[first * self._block_size : stop * self._block_size].tobytes()
        media = media_of_blocks(self.request.parts, self._block_size, stop)[first:]
        hashes = self._hasher.hash_tokens(packed, parent=parent, mm_hashes=media)
        for offset, (local, chained) in enumerate(
            zip(unpack_hashes(hashes.local), unpack_hashes(hashes.sequence), strict=True)
        ):
            yield BlockDescriptor(chained, local, parent, first + offset)
            parent = chained


def sequence_hashes(blocks: Items[BlockDescriptor]) -> list[int]:
    """Return the identities of blocks."""
    return [block.sequence_hash for block in blocks]


def _max_output_tokens(request: GenerateRequest, room: int) -> int:
    wanted = request.stop.max_tokens
    return room if wanted is None else min(wanted, room)


def _adjusts_logits(request: GenerateRequest) -> bool:
    options = request.sampling
    return bool(
        request.stop.min_tokens
        or options.allowed_token_ids
        or options.logit_bias
        or options.repetition_penalty != 1.0
        or options.presence_penalty
        or options.frequency_penalty
    )
