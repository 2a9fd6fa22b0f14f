"""``ReferenceEngine``: the engine contract around an ``EngineCore`` on its own thread.

It runs Llama-architecture models from safetensors in NumPy: continuous batching, paged KV cache, prefix caching,
chunked prefill, preemption, seeded and grammar-constrained sampling, offload and onboarding of KV blocks.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from dynamo_core.cards import ModelRuntimeConfig
from dynamo_core.content import ContentPart
from dynamo_core.engine import ChunkSink, EngineConfig, EngineContext, KvEventSink
from dynamo_core.enums import Modality, ModelType
from dynamo_core.errors import (
    ConfigurationError,
    InvalidRequestError,
    UnavailableError,
)
from dynamo_core.kv import BlockAccess, BlockDescriptor
from dynamo_core.load import ForwardPassMetrics, ReportedLoad
from dynamo_core.planes import RequestContext
from dynamo_core.requests import GenerateChunk, GenerateRequest
from dynamo_worker._mailbox import Mailbox
from dynamo_worker._output_builder import OutputBuilder
from dynamo_worker._reference._assembly import LoadedEngine, load_engine, load_model
from dynamo_worker._reference._embedding import embed
from dynamo_worker._reference._events import BlockEvents
from dynamo_worker._reference._ranks import Ranks
from dynamo_worker._reference._settings import ReferenceSettings
from dynamo_worker._request_tasks import RequestTasks

CAPABILITIES = ("logit_bias", "logprobs", "lora", "min_p", "n", "penalties", "seed", "top_k")


class ReferenceEngine:
    """A small, real engine; the embedded default and the example for engine authors.

    Log-probabilities are those of the model's own distribution, before bias, penalties and temperature. The draw of a
    sampled token is a function of (seed, choice, output position); a request without a seed gets one from the
    engine's. Equal requests give equal tokens and log-probabilities, bit for bit, however they are batched, cut into
    chunks, cached, preempted or moved, where the card's ``runtime_data`` has ``batch_invariant`` true: when it starts,
    the engine tries whether this machine's BLAS keeps the order of its sums (kernels for AVX-512 do, those for AVX2 do
    not). Elsewhere two tokens whose logits differ by less than 1e-4 may change places.

    Args:
        settings: Options.
    """

    def __init__(self, settings: ReferenceSettings) -> None:
        self._settings = settings
        self._events = [BlockEvents() for _ in range(settings.data_parallel_size)]
        self._context: EngineContext | None = None
        self._ranks: Ranks | None = None
        self._embeddings = RequestTasks(self._embed)
        self._listener: Callable[[ForwardPassMetrics], None] | None = None

    @classmethod
    def from_args(cls, args: Sequence[str]) -> ReferenceEngine:
        """Build an engine from command-line arguments; nothing is loaded.

        Raises:
            ConfigurationError: for an unknown flag, a bad value, or a model folder that is not there.
        """
        return cls(ReferenceSettings.from_args(args))

    async def start(self, context: EngineContext) -> EngineConfig:
        """Load the model.

        Raises:
            ConfigurationError: if it cannot be loaded or does not fit the options.
        """
        if context.kv_connector is not None and self._settings.data_parallel_size > 1:
            raise ConfigurationError(
                f"option --data-parallel-size has the value {self._settings.data_parallel_size}, but a block manager "
                "serves one rank; leave out --kv-connector, or start a worker for each rank"
            )
        loaded = await asyncio.to_thread(load_engine, self._settings, self._events, context.kv_connector)
        self._ranks = ranks = Ranks(loaded, self._settings, context, self._notify, self._events)
        ranks.start()
        for name, folder in self._settings.adapters.items():
            await ranks.loras.load(name, folder)
        first = ranks.first
        await first.thread.call(lambda: self._events[0].bind(context.kv_connector, first.core.cache))
        return _engine_config(self._settings, loaded, guided=ranks.constraints.is_available)

    async def generate(self, request: GenerateRequest, context: RequestContext) -> AsyncIterator[GenerateChunk]:
        """Yield tokens as they come; stopping the context or closing the iterator frees the request within a step.

        Raises:
            InvalidRequestError: for a request it cannot serve, before the first chunk.
            CapacityExhaustedError: if too many requests wait.
            UnavailableError: if the engine drains or has stopped.
        """
        ranks = self._require_ranks()
        if request.modality is Modality.EMBEDDING:
            async for chunk in self._embeddings.generate(request, context):
                yield chunk
            return
        mailbox = Mailbox()
        running = ranks.choose(request)
        active = running.submit(request, mailbox)
        context.on_stop(lambda: running.abort(active))
        try:
            while True:
                for chunk in await mailbox.take():
                    yield chunk
                    if chunk.usage is not None:
                        return
        finally:
            running.abort(active)

    def submit(self, request: GenerateRequest, sink: ChunkSink) -> None:
        """Accept a request whose chunks are pushed; raises as ``generate``."""
        ranks = self._require_ranks()
        if request.modality is Modality.EMBEDDING:
            self._embeddings.submit(request, sink)
        else:
            ranks.choose(request).submit(request, sink)

    async def abort(self, request_id: str) -> None:
        """End all attempts of a request within one step."""
        self._embeddings.abort(request_id)
        if self._ranks is not None:
            self._ranks.abort_id(request_id)

    async def drain(self) -> None:
        """Finish what runs, refuse what is new."""
        if self._ranks is not None:
            await self._embeddings.drain()
            await self._ranks.drain()

    async def cleanup(self) -> None:
        """Stop the thread, fail what still runs, release the memory."""
        await self._embeddings.close()
        ranks, self._ranks = self._ranks, None
        if ranks is not None:
            await ranks.close()

    def set_kv_event_sink(self, sink: KvEventSink, *, dp_rank: int = 0) -> None:
        """Report KV changes of a rank to ``sink``."""
        self._events[dp_rank].sink = sink

    def set_forward_pass_listener(self, listener: Callable[[ForwardPassMetrics], None]) -> None:
        """Report each step to ``listener``."""
        self._listener = listener

    def load(self, *, dp_rank: int = 0) -> ReportedLoad:
        """Return the present load of a rank."""
        return self._require_ranks()[dp_rank].load()

    def block_access(self) -> BlockAccess:
        """Return access to the device blocks, for use on the step thread."""
        return self._require_ranks().first.core.cache

    async def export_blocks(self, sequence_hashes: Sequence[int]) -> list[bytes]:
        """Return the bytes of the longest prefix of these blocks that the device holds."""
        running = self._require_ranks().first
        return await running.thread.call(lambda: running.core.read_blocks(sequence_hashes))

    async def import_blocks(self, blocks: Sequence[BlockDescriptor], data: Sequence[bytes | memoryview]) -> int:
        """Put consecutive blocks of one sequence into the cache; return how many, from the start, are there now.

        Blocks whose parents the device lacks are not taken: nobody could find them.

        Raises:
            InvalidRequestError: if a piece has another size than a block.
        """
        running = self._require_ranks().first
        return await running.thread.call(lambda: running.core.write_blocks(blocks, data))

    async def match_blocks(self, sequence_hashes: Sequence[int]) -> int:
        """Return how many of these blocks, from the start, the device holds."""
        running = self._require_ranks().first
        return await running.thread.call(lambda: running.core.match_blocks(sequence_hashes))

    async def hold_blocks(self, sequence_hashes: Sequence[int]) -> int:
        """Keep the longest prefix of these blocks that the device holds until released; return its length."""
        running = self._require_ranks().first
        return await running.thread.call(lambda: running.core.hold_blocks(sequence_hashes))

    async def release_blocks(self, sequence_hashes: Sequence[int]) -> None:
        """Let go of blocks that ``hold_blocks`` kept."""
        running = self._require_ranks().first
        await running.thread.call(lambda: running.core.release_blocks(sequence_hashes))

    async def read_blocks_into(self, sequence_hashes: Sequence[int], buffer: memoryview) -> int:
        """Copy the longest prefix of these blocks that the device holds to the start of ``buffer``."""
        running = self._require_ranks().first
        return await running.thread.call(lambda: running.core.read_blocks_into(sequence_hashes, buffer))

    async def encode(self, parts: Sequence[ContentPart]) -> tuple[ContentPart, ...]:
        """Return content parts with images as the vectors that the model takes.

        Raises:
            InvalidRequestError: if the engine takes no images, or one cannot be read.
        """
        running = self._require_ranks().first
        return await running.thread.call(lambda: running.core.encode(parts))

    async def clear_kv_blocks(self) -> int:
        """Drop the cached blocks that no request holds, and those of lower tiers; return how many on the device."""
        return await self._require_ranks().clear(self._events)

    async def load_lora(self, name: str, path: str) -> None:
        """Load an adapter in PEFT's layout; raises as ``SupportsLora`` says, and for adapters that do not fit."""
        await self._require_ranks().loras.load(name, Path(path))

    async def unload_lora(self, name: str) -> None:
        """Unload an adapter once no request uses it; new requests for it are refused at once."""
        await self._require_ranks().loras.unload(name)

    async def list_loras(self) -> list[str]:
        """Names of loaded adapters."""
        return self._require_ranks().loras.names

    async def sleep(self, level: int = 1) -> None:
        """Give the KV cache's memory back, at level 2 that of the weights too. Requests are refused until ``wake``.

        Raises:
            ConflictError: if requests run.
            InvalidRequestError: for another level.
        """
        if level not in (1, 2):
            raise InvalidRequestError(f"sleep level {level} is not 1 or 2", param="level")
        await self._require_ranks().sleep(level, self._events)

    async def wake(self) -> None:
        """Take memory again and load dropped weights. Harmless when awake."""
        ranks = self._require_ranks()
        config, context = ranks.first.config, ranks.first.max_context
        await ranks.wake(lambda: load_model(self._settings, config, context))

    def _embed(self, request: GenerateRequest, output: OutputBuilder) -> AsyncIterator[GenerateChunk]:
        return embed(self._require_ranks().first, request, output)

    def _notify(self, metrics: ForwardPassMetrics) -> None:
        if self._listener is not None:
            self._listener(metrics)

    def _require_ranks(self) -> Ranks:
        if self._ranks is None:
            raise UnavailableError("the engine is not started", reason="backend.engine_shutdown")
        return self._ranks


def _engine_config(settings: ReferenceSettings, loaded: LoadedEngine, *, guided: bool) -> EngineConfig:
    return EngineConfig(
        model=settings.model_name,
        model_path=str(settings.model_folder.resolve()),
        context_length=loaded.max_context,
        kv_block_size=settings.block_size if settings.enable_prefix_caching else 0,
        eos_token_ids=loaded.config.eos_token_ids,
        model_types=(ModelType.CHAT, ModelType.COMPLETIONS, ModelType.EMBEDDING),
        input_modalities=(Modality.TEXT, Modality.IMAGE) if settings.image_encoder else (Modality.TEXT,),
        output_modalities=(Modality.TEXT, Modality.EMBEDDING),
        capabilities=tuple(sorted((*CAPABILITIES, "guided_decoding"))) if guided else CAPABILITIES,
        runtime_config=ModelRuntimeConfig(
            total_kv_blocks=settings.num_blocks,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            data_parallel_size=settings.data_parallel_size,
            runtime_data={"batch_invariant": loaded.is_batch_invariant},
        ),
    )
