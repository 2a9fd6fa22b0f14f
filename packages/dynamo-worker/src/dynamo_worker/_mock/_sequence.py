"""One output being generated: its place in the prompt, its blocks, and the tokens not yet handed out."""

from __future__ import annotations

from dataclasses import dataclass, field

from dynamo_core.engine import ChunkSink
from dynamo_core.enums import FinishReason
from dynamo_core.kv import BlockDescriptor
from dynamo_core.requests import GenerateChunk, GenerateRequest, Usage
from dynamo_core.tokens import BlockHasher, PackedTokens, token_count, unpack_hashes
from dynamo_worker._mock._vocabulary import Vocabulary


@dataclass(slots=True)
class RequestState:
    """What the choices of one request share."""

    request: GenerateRequest
    sink: ChunkSink
    open_choices: int
    cached_tokens: int | None = None
    completion_tokens: int = 0


@dataclass(eq=False)
class Sequence:
    """One choice of one request.

    Attributes:
        shared: State of the request.
        choice: Which choice.
        tokens: Packed prompt and output so far; the prompt of the next prefill after a preemption.
        prompt_tokens: Length of the original prompt.
        output_limit: Output tokens at which it ends.
        limit_reason: How it ends there.
        computed: Tokens whose KV is in the cache.
        generated: Output tokens, over all attempts.
        emitted: Output tokens handed out.
        hashes: Sequence hashes of its registered blocks.
        private: Its blocks that are not registered.
        decoding: Whether its prefill is complete.
        is_running: Whether it is in the batch, with blocks of its own.
    """

    shared: RequestState
    choice: int
    vocabulary: Vocabulary
    hasher: BlockHasher
    output_limit: int
    limit_reason: FinishReason
    tokens: bytearray = field(init=False)
    prompt_tokens: int = field(init=False)
    key: int = field(init=False)
    computed: int = 0
    generated: int = field(init=False)
    emitted: int = field(init=False)
    hashes: list[int] = field(default_factory=list[int])
    private: int = 0
    finish: FinishReason | None = None
    stop_token_id: int | None = None
    ended: bool = False
    decoding: bool = False
    is_running: bool = False
    stops: frozenset[int] = field(init=False)
    ends: frozenset[int] = field(init=False)
    _reusable: list[int] | None = None

    def __post_init__(self) -> None:
        request = self.shared.request
        packed = request.token_ids
        self.tokens = bytearray(packed)
        self.prompt_tokens = request.prompt_tokens or token_count(packed)
        self.generated = self.emitted = request.accepted_tokens
        self.key = self.vocabulary.key(bytes(packed[: 4 * self.prompt_tokens]), self.choice)
        self.stops = frozenset(request.stop.stop_token_ids)
        self.ends = self.stops if request.stop.ignore_eos else self.stops.union(request.eos_token_ids)

    @property
    def length(self) -> int:
        """Tokens of prompt and output."""
        return len(self.tokens) >> 2

    @property
    def pending(self) -> int:
        """Tokens still to compute before the next one can be drawn."""
        return (len(self.tokens) >> 2) - self.computed

    @property
    def blocks(self) -> int:
        """Blocks it holds."""
        return len(self.hashes) + self.private

    def reusable_hashes(self) -> list[int]:
        """Sequence hashes of the full blocks it could take from the cache; the last token is always computed."""
        if self._reusable is None:
            packed = bytes(self.tokens[: 4 * (self.length - 1)])
            self._reusable = list(unpack_hashes(self.hasher.hash_tokens(packed).sequence))
        return self._reusable

    def restart(self) -> None:
        """Forget what was computed, after its blocks were taken away."""
        self.computed = self.private = 0
        self.decoding = False
        self.hashes = []
        self._reusable = None

    def newly_full(self) -> list[BlockDescriptor]:
        """Describe the computed full blocks that are not registered yet."""
        size = self.hasher.block_size
        first, last = len(self.hashes), self.computed // size
        if first >= last:
            return []
        parent = self.hashes[-1] if self.hashes else None
        packed = bytes(self.tokens[: 4 * last * size])
        found = self.hasher.hash_tokens(packed, start_block=first, parent=parent)
        described: list[BlockDescriptor] = []
        for number, (local, sequence) in enumerate(
            zip(unpack_hashes(found.local), unpack_hashes(found.sequence), strict=True)
        ):
            described.append(BlockDescriptor(sequence, local, parent, first + number))
            parent = sequence
        return described

    def draw(self) -> None:
        """Generate the next token, or end at a stop token or at the limit."""
        self.decoding = True
        token = self.vocabulary.token(self.key, self.generated)
        if token in self.ends and self.generated >= self.shared.request.stop.min_tokens:
            self.finish = FinishReason.STOP if token in self.stops else FinishReason.EOS
            self.stop_token_id = token
            return
        self.tokens += token.to_bytes(4, "little")
        self.generated += 1
        if self.generated >= self.output_limit:
            self.end_at_limit()

    def end_at_limit(self) -> None:
        """End because the output is as long as it may be."""
        self.finish = self.limit_reason
        if self.limit_reason is FinishReason.EOS:
            self.stop_token_id = next(iter(self.shared.request.eos_token_ids or self.vocabulary.eos), None)

    def chunk(self) -> GenerateChunk:
        """Return the output since the last chunk."""
        first = self.emitted
        new = self.generated - first
        self.emitted = self.generated
        packed = PackedTokens(bytes(self.tokens[-4 * new :]) if new else b"")
        if self.finish is None:
            return GenerateChunk(packed, first, self.choice, self.shared.request.attempt)
        return GenerateChunk(
            packed,
            first,
            self.choice,
            self.shared.request.attempt,
            finish_reason=self.finish,
            stop_token_id=self.stop_token_id,
            usage=self._final_usage(),
        )

    def _final_usage(self) -> Usage | None:
        shared = self.shared
        shared.open_choices -= 1
        shared.completion_tokens += self.generated
        if shared.open_choices:
            return None
        return Usage(self.prompt_tokens, shared.completion_tokens, shared.cached_tokens or 0)
