"""The mock engine behind the engine contract."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as Arguments
from pathlib import Path

from dynamo_core.cards import ModelRuntimeConfig
from dynamo_core.engine import ChunkSink, EngineConfig, EngineContext, KvEventSink
from dynamo_core.enums import FinishReason
from dynamo_core.errors import ConfigurationError, DynamoError, InvalidRequestError, UnavailableError
from dynamo_core.ids import WorkerId
from dynamo_core.kv import BlockAccess, BlockDescriptor
from dynamo_core.load import ForwardPassMetrics, ReportedLoad
from dynamo_core.planes import RequestContext
from dynamo_core.requests import GenerateChunk, GenerateRequest
from dynamo_core.tokens import BlockHasher
from dynamo_worker._mock._blocks import KvLink, MockBlocks
from dynamo_worker._mock._profile import TimingProfile
from dynamo_worker._mock._rank import Rank
from dynamo_worker._mock._requests import check_request, output_limit
from dynamo_worker._mock._sequence import RequestState, Sequence
from dynamo_worker._mock._settings import MockSettings
from dynamo_worker._mock._vocabulary import Vocabulary


class MockEngine:
    """Plays a GPU engine: real scheduling and caching, modelled time, made-up tokens.

    The output is a function of prompt, choice and position, so a request that moves to another worker goes on with
    the same tokens. On a fake clock a run is deterministic to the last event.

    Args:
        settings: Flags; defaults if omitted.
    """

    def __init__(self, settings: MockSettings | None = None) -> None:
        self._settings = settings if settings is not None else MockSettings()
        self._vocabulary = Vocabulary.plain(self._settings.vocab_size)
        self._ranks: list[Rank] = []
        self._blocks: MockBlocks | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._running: dict[str, list[tuple[Rank, Sequence]]] = {}
        self._draining = False

    @classmethod
    def from_args(cls, args: Arguments[str]) -> MockEngine:
        """Build the engine from flags.

        Raises:
            ConfigurationError: for an unknown flag or a bad value.
        """
        return cls(MockSettings.from_args(args))

    async def start(self, context: EngineContext) -> EngineConfig:
        """Take as long as configured, then step whenever there is work.

        Raises:
            ConfigurationError: if the model folder or the timing profile cannot be read, or a block manager is given.
        """
        settings = self._settings
        if context.kv_connector is not None:
            raise ConfigurationError("the mock engine has no KV bytes to offload; leave out --kv-connector")
        if settings.folder is not None:
            self._vocabulary = await asyncio.to_thread(Vocabulary.of_model, settings.folder)
        profile = None
        if settings.timing_profile:
            profile = await asyncio.to_thread(TimingProfile.load, Path(settings.timing_profile))
        await context.clock.sleep(settings.startup_time_s)
        for number in range(settings.data_parallel_size):
            rank = Rank(WorkerId(context.instance_id, number), settings, context.clock, profile)
            self._ranks.append(rank)
            self._tasks.append(asyncio.get_running_loop().create_task(rank.run(), name=f"mock rank {number}"))
        self._blocks = MockBlocks(
            self._ranks[0].pool,
            block_size=settings.kv_block_size,
            bytes_per_token=settings.kv_bytes_per_token,
            link=KvLink(context.clock, settings.kv_transfer_bandwidth_gb_s * 1e9 * settings.speedup_ratio),
        )
        return self._config()

    def submit(self, request: GenerateRequest, sink: ChunkSink) -> None:
        """Queue a request; its chunks come step by step.

        Raises:
            InvalidRequestError: for a request that could never be served, or an option that would have no effect.
            UnavailableError: while draining, or before start.
        """
        if self._draining or not self._ranks:
            raise UnavailableError("The engine takes no requests now.", reason="backend.draining")
        check_request(request, self._settings)
        rank = self._choose_rank(request)
        state = RequestState(request, _EndListener(self, request.request_id, sink), request.sampling.n)
        sequences = [self._sequence(state, choice) for choice in range(request.sampling.n)]
        self._running[request.request_id] = [(rank, sequence) for sequence in sequences]
        for sequence in sequences:
            if sequence.generated >= sequence.output_limit:  # a continuation of what was already complete
                sequence.end_at_limit()
                state.sink.push(sequence.chunk())
            else:
                rank.add(sequence)

    async def generate(self, request: GenerateRequest, context: RequestContext) -> AsyncGenerator[GenerateChunk, None]:
        """Yield the chunks of a request. Closing the iterator frees what it holds."""
        queue = _ChunkQueue()
        self.submit(request, queue)
        context.on_stop(lambda: self._cancel(request.request_id))
        try:
            while True:
                item = await queue.items.get()
                if isinstance(item, DynamoError):
                    raise item
                yield item
                if item.usage is not None:
                    return
        finally:
            self._cancel(request.request_id)

    async def abort(self, request_id: str) -> None:
        """End a request now; unknown ids are ignored."""
        self._cancel(request_id)

    async def drain(self) -> None:
        """Take nothing new and wait for what runs."""
        self._draining = True
        for rank in self._ranks:
            await rank.idle.wait()

    async def cleanup(self) -> None:
        """Stop stepping; what still runs ends with ``backend.engine_shutdown``. Idempotent."""
        self._draining = True
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._blocks = None
        ranks, self._ranks = self._ranks, []
        for rank in ranks:
            rank.fail(UnavailableError("The engine shut down.", reason="backend.engine_shutdown"))
        self._running.clear()

    def set_kv_event_sink(self, sink: KvEventSink, *, dp_rank: int = 0) -> None:
        """Report stored and removed blocks of a rank to ``sink``."""
        self._ranks[dp_rank].pool.sink = sink

    def load(self, *, dp_rank: int = 0) -> ReportedLoad:
        """Return the present load of a rank."""
        return self._ranks[dp_rank].load()

    def set_forward_pass_listener(self, listener: Callable[[ForwardPassMetrics], None]) -> None:
        """Report every step to ``listener``."""
        for rank in self._ranks:
            rank.listener = listener

    async def clear_kv_blocks(self) -> int:
        """Forget all cached blocks that no request holds; return how many."""
        return sum(rank.pool.clear() for rank in self._ranks)

    def block_access(self) -> BlockAccess:
        """Return the shape of the bytes that stand for a block."""
        return self._require_blocks()

    async def export_blocks(self, sequence_hashes: Arguments[int]) -> list[bytes]:
        """Return the bytes that stand for the longest prefix of these blocks that is cached."""
        return self._require_blocks().export(sequence_hashes)

    async def import_blocks(self, blocks: Arguments[BlockDescriptor], data: Arguments[bytes | memoryview]) -> int:
        """Let consecutive blocks of one sequence arrive, as fast as the link is; return how many are there now.

        Raises:
            InvalidRequestError: if the bytes are not those of the blocks.
        """
        return await self._require_blocks().bring_in(blocks, data)

    async def match_blocks(self, sequence_hashes: Arguments[int]) -> int:
        """Return how many of these blocks, from the start, are cached."""
        return self._require_blocks().match(sequence_hashes)

    async def hold_blocks(self, sequence_hashes: Arguments[int]) -> int:
        """Keep the longest cached prefix of these blocks until released; return its length."""
        return self._require_blocks().hold(sequence_hashes)

    async def release_blocks(self, sequence_hashes: Arguments[int]) -> None:
        """Let go of blocks that ``hold_blocks`` kept."""
        self._require_blocks().release(sequence_hashes)

    async def read_blocks_into(self, sequence_hashes: Arguments[int], buffer: memoryview) -> int:
        """Copy the bytes of the longest cached prefix of these blocks to the start of ``buffer``."""
        return self._require_blocks().read_into(sequence_hashes, buffer)

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._running.pop(request_id, None)

    def _require_blocks(self) -> MockBlocks:
        if self._blocks is None:
            raise UnavailableError("The engine is not started.", reason="backend.engine_shutdown")
        return self._blocks

    def _config(self) -> EngineConfig:
        settings = self._settings
        return EngineConfig(
            model=settings.served_name,
            model_path=str(settings.folder or ""),
            context_length=settings.context_length,
            kv_block_size=settings.kv_block_size,
            eos_token_ids=self._vocabulary.eos,
            capabilities=("n",),
            runtime_config=ModelRuntimeConfig(
                total_kv_blocks=settings.total_kv_blocks,
                max_num_seqs=settings.max_num_seqs,
                max_num_batched_tokens=settings.max_num_batched_tokens,
                data_parallel_size=settings.data_parallel_size,
                runtime_data={"vocab_size": self._vocabulary.size},
            ),
        )

    def _choose_rank(self, request: GenerateRequest) -> Rank:
        wanted = request.routing.dp_rank
        if wanted is None:
            return min(self._ranks, key=lambda rank: len(rank.scheduler.running) + len(rank.scheduler.waiting))
        if not 0 <= wanted < len(self._ranks):
            raise InvalidRequestError(
                f"dp_rank {wanted} is not one of 0..{len(self._ranks) - 1}; name one of them or none", param="dp_rank"
            )
        return self._ranks[wanted]

    def _sequence(self, state: RequestState, choice: int) -> Sequence:
        request = state.request
        limit, reason = output_limit(request, self._settings, choice)
        hasher = BlockHasher(self._settings.kv_block_size, lora=request.routing.lora, salt=request.routing.cache_salt)
        return Sequence(state, choice, self._vocabulary, hasher, limit, reason)

    def _cancel(self, request_id: str) -> None:
        for rank, sequence in self._running.pop(request_id, []):
            if not sequence.ended and sequence.finish is None:
                rank.end(sequence)
                sequence.finish = FinishReason.CANCELLED
                sequence.shared.sink.push(sequence.chunk())


class _EndListener:
    """Passes chunks on, and tells the engine when the last one has gone."""

    def __init__(self, engine: MockEngine, request_id: str, sink: ChunkSink) -> None:
        self._engine = engine
        self._request_id = request_id
        self._sink = sink

    def push(self, chunk: GenerateChunk) -> None:
        if chunk.usage is not None:
            self._engine.forget(self._request_id)
        self._sink.push(chunk)

    def fail(self, error: DynamoError) -> None:
        self._engine.forget(self._request_id)
        self._sink.fail(error)


class _ChunkQueue:
    """The pull form of a sink. Bounded by the request's own output limit."""

    def __init__(self) -> None:
        self.items: asyncio.Queue[GenerateChunk | DynamoError] = asyncio.Queue()

    def push(self, chunk: GenerateChunk) -> None:
        self.items.put_nowait(chunk)

    def fail(self, error: DynamoError) -> None:
        self.items.put_nowait(error)
