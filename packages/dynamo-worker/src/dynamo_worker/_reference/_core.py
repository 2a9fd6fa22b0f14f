"""The engine without its thread: requests go in, steps run, chunks come out."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from dynamo_core.content import ContentPart
from dynamo_core.enums import FinishReason
from dynamo_core.errors import ConflictError, DynamoError, InternalError, InvalidRequestError
from dynamo_core.kv import BlockDescriptor
from dynamo_core.load import QueuedStats, ScheduledStats
from dynamo_core.requests import GenerateChunk, GenerateRequest, Usage
from dynamo_core.tokens import pack_tokens
from dynamo_worker._reference._attention import Segment
from dynamo_worker._reference._block_pool import BlockPool
from dynamo_worker._reference._encoder import ImageEncoder, embedding_rows
from dynamo_worker._reference._grammar import Grammar
from dynamo_worker._reference._kv_cache import KVCache
from dynamo_worker._reference._lora import LoraAdapter
from dynamo_worker._reference._model import LlamaModel
from dynamo_worker._reference._sampler import SampledToken, sample
from dynamo_worker._reference._scheduler import ScheduledSequence, Scheduler, SchedulerOutput
from dynamo_worker._reference._sequence import Sequence, SequenceState, sequence_hashes
from dynamo_worker._reference._statistics import queued_stats, scheduled_stats

_RECENT_PROMPTS = 128


@dataclass(eq=False)
class ActiveRequest:
    """A request inside the engine.

    Attributes:
        request: What was asked.
        sequences: Its choices. All but the first start once the first has computed the prompt, and then share it.
        end_tokens: Tokens that end a choice.
        num_unfinished: Choices that still run.
    """

    request: GenerateRequest
    sequences: list[Sequence]
    end_tokens: frozenset[int]
    num_unfinished: int = 0

    def constrain(self, grammar: Grammar) -> None:
        """Make every choice follow a grammar of its own from here on."""
        for sequence in self.sequences:
            sequence.grammar = grammar.fork()


Output = tuple[ActiveRequest, "GenerateChunk | DynamoError"]


@dataclass
class StepStats:
    """One step in numbers."""

    scheduled: ScheduledStats = field(default_factory=ScheduledStats)
    queued: QueuedStats = field(default_factory=QueuedStats)
    num_preempted: int = 0


class EngineCore:
    """Model, cache and scheduler of one engine. Single-threaded: every method runs on the step thread.

    Args:
        model: The model.
        cache: Memory of the KV blocks.
        pool: Who holds them.
        scheduler: Who is next.
        max_context: Most tokens of prompt and output together.
        eos_token_ids: End tokens of requests that name none.
        encoder: Turns images into vectors; None if the engine takes none.
    """

    def __init__(  # noqa: PLR0913 - built once, every argument by name
        self,
        model: LlamaModel,
        cache: KVCache,
        pool: BlockPool,
        scheduler: Scheduler,
        *,
        max_context: int,
        eos_token_ids: Items[int],
        encoder: ImageEncoder | None = None,
    ) -> None:
        self.cache = cache
        self.pool = pool
        self.scheduler = scheduler
        self._model: LlamaModel | None = model
        self._max_context = max_context
        self._eos_token_ids = tuple(eos_token_ids)
        self._encoder = encoder
        self._owners: dict[Sequence, ActiveRequest] = {}
        self._outputs: list[Output] = []
        self._recent_prompts: deque[tuple[int, int]] = deque(maxlen=_RECENT_PROMPTS)

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    @property
    def cache_hit_rate(self) -> float | None:
        """Share of recent prompt tokens that came from the cache; None before the first."""
        recent = list(self._recent_prompts)  # one operation: the event loop asks while the step thread appends
        total = sum(prompt for _, prompt in recent)
        return sum(cached for cached, _ in recent) / total if total else None

    def activate(self, request: GenerateRequest, seed: int, adapter: LoraAdapter | None = None) -> ActiveRequest:
        """Wrap a request; ``add`` queues it."""
        eos = () if request.stop.ignore_eos else request.eos_token_ids or self._eos_token_ids
        sequences = [
            Sequence(
                request,
                choice=choice,
                seed=seed,
                max_context=self._max_context,
                block_size=self.cache.layout.block_size,
            )
            for choice in range(request.sampling.n)
        ]
        for sequence in sequences:
            sequence.adapter = adapter
        return ActiveRequest(request, sequences, frozenset((*eos, *request.stop.stop_token_ids)), len(sequences))

    def add(self, active: ActiveRequest) -> None:
        """Queue a request."""
        for sequence in active.sequences:
            self._owners[sequence] = active
        if not self._take_media(active):
            return
        first = active.sequences[0]
        if first.num_output_tokens >= first.max_output_tokens:  # a continuation whose output was complete already
            self._finish(first, FinishReason.LENGTH)
        elif first.grammar is not None and first.grammar.is_complete:
            self._finish(first, FinishReason.STOP)
        else:
            self.scheduler.add(first)

    def abort(self, active: ActiveRequest) -> None:
        """End what is left of a request and free its blocks."""
        for sequence in active.sequences:
            if sequence.state is not SequenceState.FINISHED:
                self._finish(sequence, FinishReason.CANCELLED)

    def fail(self, active: ActiveRequest, error: DynamoError) -> None:
        """End a request with an error."""
        for sequence in active.sequences:
            if sequence.state is not SequenceState.FINISHED:
                self.scheduler.finish(sequence)
            self._owners.pop(sequence, None)
        self._outputs.append((active, error))

    def fail_all(self, error: DynamoError) -> None:
        """End every request with an error."""
        for active in dict.fromkeys(self._owners.values()):
            self.fail(active, error)

    def take_outputs(self) -> list[Output]:
        """Return what came out since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def step(self) -> StepStats:
        """Run one forward pass and hand each finished prompt and each decoding sequence its next token."""
        output = self.scheduler.schedule()
        stats = self._stats(output)
        for item, token in self._compute_isolated(output.scheduled):
            sequence = item.sequence
            if sequence.state is SequenceState.FINISHED:  # its request failed with another of its choices
                continue
            self.scheduler.advance(item)
            if token is not None:
                self._accept(sequence, token)
        return stats

    def sleep(self, *, drop_weights: bool) -> list[BlockDescriptor]:
        """Give the memory of the cache back, and that of the weights if asked; return the blocks that are gone.

        Raises:
            ConflictError: if blocks are held.
        """
        if self.pool.num_used_blocks:
            raise ConflictError(f"{self.pool.num_used_blocks} KV blocks are in use; drain the engine first")
        dropped = self.pool.clear()
        self.cache.release()
        if drop_weights:
            self._model = None
        return dropped

    def wake(self, model: LlamaModel | None) -> None:
        """Take memory again; ``model`` replaces weights that were dropped."""
        self.cache.allocate()
        self._model = model or self._model

    def embed(self, token_ids: Items[int], adapter: LoraAdapter | None) -> bytes:
        """Return the embedding of a text as little-endian f32. It uses no blocks: every token's state is needed."""
        assert self._model is not None
        layout = self.cache.layout
        count = -(-len(token_ids) // layout.block_size)
        scratch = KVCache(layout, count)
        return self._model.embed(Segment(token_ids, 0, range(count), adapter), scratch).astype("<f4").tobytes()

    def encode(self, parts: Items[ContentPart]) -> tuple[ContentPart, ...]:
        """Return the parts with images as vectors.

        Raises:
            InvalidRequestError: if the engine takes no images, or one cannot be read.
        """
        if self._encoder is None:
            raise InvalidRequestError("this engine takes no images; start it with --image-encoder", param="parts")
        return tuple(map(self._encoder.encode, parts))

    def read_blocks(self, hashes: Items[int]) -> list[bytes]:
        """Copy out the longest known prefix of blocks."""
        return self.cache.read_blocks([block.block_id for block in self.pool.get_computed_blocks(hashes)])

    def read_blocks_into(self, hashes: Items[int], buffer: memoryview) -> int:
        """Copy the longest known prefix of blocks to the start of a buffer; return how many."""
        found = self.pool.get_computed_blocks(hashes)
        self.cache.read_blocks_into([block.block_id for block in found], buffer)
        return len(found)

    def match_blocks(self, hashes: Items[int]) -> int:
        """Return the length of the longest known prefix of blocks."""
        return len(self.pool.get_computed_blocks(hashes))

    def hold_blocks(self, hashes: Items[int]) -> int:
        """Hold the longest known prefix of blocks as a sequence would; return its length."""
        found = self.pool.get_computed_blocks(hashes)
        self.pool.touch(found)
        return len(found)

    def release_blocks(self, hashes: Items[int]) -> None:
        """Let go of held blocks; while they were held nobody could replace them."""
        self.pool.free(self.pool.get_computed_blocks(hashes))

    def write_blocks(self, descriptors: Items[BlockDescriptor], data: Items[bytes | memoryview]) -> int:
        """Put blocks of one sequence into the cache; return how many of them, from the start, are there now."""
        if not descriptors:
            return 0
        lineage = self.pool.get_lineage(descriptors[0].parent_hash)
        if lineage is None:  # without its parents a block can never be found
            return 0
        known = self.pool.get_computed_blocks(sequence_hashes(descriptors))
        self.pool.touch([*lineage, *known])
        missing = slice(len(known), len(known) + min(len(descriptors) - len(known), self.pool.num_free_blocks))
        fresh = self.pool.allocate(len(descriptors[missing])) or []
        try:
            self.cache.write_blocks([block.block_id for block in fresh], data[missing])
            fresh = self.pool.register(fresh, descriptors[missing])
        finally:
            self.pool.free([*lineage, *known, *fresh])
        return len(known) + len(fresh)

    def _take_media(self, active: ActiveRequest) -> bool:
        parts = active.request.parts
        if not parts:
            return True
        try:
            rows = embedding_rows(self.encode(parts), active.sequences[0].num_prompt_tokens)
        except InvalidRequestError as error:
            self.fail(active, error)
            return False
        for sequence in active.sequences:
            sequence.media = rows
        return True

    def _compute_isolated(self, items: list[ScheduledSequence]) -> list[tuple[ScheduledSequence, SampledToken | None]]:
        try:
            return self._compute(items)
        except Exception as error:  # noqa: BLE001 - whatever fails, the requests that did not cause it go on
            if len(items) == 1:
                self.fail(self._owners[items[0].sequence], _step_error(error))
                return []
        alone = [pair for item in items for pair in self._compute_isolated([item])]
        return [pair for pair in alone if pair[0].sequence.state is SequenceState.RUNNING]

    def _compute(self, items: list[ScheduledSequence]) -> list[tuple[ScheduledSequence, SampledToken | None]]:
        if not items:
            return []
        assert self._model is not None
        logits = self._model.forward([_segment(item) for item in items], self.cache)
        rows = [row for row, item in enumerate(items) if item.completes]
        chosen: list[SampledToken | None] = [None] * len(items)
        if rows:
            sequences = [items[row].sequence for row in rows]
            ends = [self._owners[sequence].end_tokens for sequence in sequences]
            mine = logits if len(rows) == len(items) else logits[rows]
            for row, token in zip(rows, sample(mine, sequences, ends), strict=True):
                chosen[row] = token
        return list(zip(items, chosen, strict=True))

    def _accept(self, sequence: Sequence, token: SampledToken) -> None:
        active = self._owners[sequence]
        if sequence is active.sequences[0] and sequence.num_output_tokens == active.request.accepted_tokens:
            self._prompt_computed(active)
        ends = token.token_id in active.end_tokens
        if ends and sequence.num_output_tokens >= active.request.stop.min_tokens:
            is_stop = token.token_id in active.request.stop.stop_token_ids
            self._finish(sequence, FinishReason.STOP if is_stop else FinishReason.EOS, stop_token_id=token.token_id)
            return
        self._append(active, sequence, token)

    def _append(self, active: ActiveRequest, sequence: Sequence, token: SampledToken) -> None:
        if sequence.grammar is not None and not sequence.grammar.accept((token.token_id,)):
            self.fail(active, _step_error(ValueError(f"token {token.token_id} breaks the grammar of its choice")))
            return
        sequence.tokens.append(token.token_id)
        if sequence.grammar is not None and sequence.grammar.is_complete:
            self._finish(sequence, FinishReason.STOP, token)
        elif sequence.num_output_tokens >= sequence.max_output_tokens:
            self._finish(sequence, FinishReason.LENGTH, token)
        else:
            self._outputs.append((active, _chunk(sequence, token)))

    def _prompt_computed(self, active: ActiveRequest) -> None:
        first = active.sequences[0]
        self._recent_prompts.append((first.num_cached_tokens or 0, first.num_prompt_tokens))
        for follower in reversed(active.sequences[1:]):
            if follower.state is not SequenceState.FINISHED:
                self.scheduler.add(follower, first=True)

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        token: SampledToken | None = None,
        *,
        stop_token_id: int | None = None,
    ) -> None:
        active = self._owners.pop(sequence)
        self.scheduler.finish(sequence)
        active.num_unfinished -= 1
        usage = None if active.num_unfinished else _usage(active)
        self._outputs.append((active, _chunk(sequence, token, reason, stop_token_id, usage)))

    def _stats(self, output: SchedulerOutput) -> StepStats:
        return StepStats(scheduled_stats(output.scheduled), queued_stats(self.scheduler.waiting), output.num_preempted)


def _segment(item: ScheduledSequence) -> Segment:
    sequence = item.sequence
    start = sequence.num_computed_tokens
    return Segment(
        sequence.tokens[start : start + item.num_tokens],
        start,
        sequence.block_ids,
        sequence.adapter,
        sequence.media,
        owner=sequence,
    )


def _chunk(
    sequence: Sequence,
    token: SampledToken | None = None,
    reason: FinishReason | None = None,
    stop_token_id: int | None = None,
    usage: Usage | None = None,
) -> GenerateChunk:
    # A token is already part of the sequence when its chunk is made.
    return GenerateChunk(
        token_ids=pack_tokens([token.token_id] if token else ()),
        first_index=sequence.num_output_tokens - (1 if token else 0),
        choice=sequence.choice,
        attempt=sequence.request.attempt,
        finish_reason=reason,
        stop_token_id=stop_token_id,
        usage=usage,
        logprobs=(token.logprob,) if token and token.logprob else (),
    )


def _usage(active: ActiveRequest) -> Usage:
    first = active.sequences[0]
    return Usage(
        prompt_tokens=first.num_prompt_tokens,
        completion_tokens=sum(sequence.num_output_tokens for sequence in active.sequences),
        cached_tokens=first.num_cached_tokens or 0,
    )


def _step_error(error: Exception) -> DynamoError:
    if isinstance(error, DynamoError):
        return error
    failure = InternalError(
        "The engine failed while it computed this request.",
        reason="backend.engine_step_failed",
        diagnostic=f"{type(error).__name__}: {error}",
    )
    failure.__cause__ = error
    return failure
