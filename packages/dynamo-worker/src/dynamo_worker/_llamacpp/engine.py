"""``LlamaCppEngine``: GGUF models in this process, through llama.cpp's own server as ``xllamacpp`` carries it."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any

from dynamo_core.cards import ModelRuntimeConfig
from dynamo_core.engine import EngineConfig, EngineContext, KvEventSink
from dynamo_core.enums import Modality
from dynamo_core.errors import ConfigurationError, InvalidRequestError, UnavailableError
from dynamo_core.load import ReportedLoad
from dynamo_core.requests import GenerateChunk, GenerateRequest
from dynamo_core.tokens import token_count
from dynamo_worker._llamacpp._body import is_greedy
from dynamo_worker._llamacpp._completion import Step, stream
from dynamo_worker._llamacpp._generation import Generation
from dynamo_worker._llamacpp._gguf import read_metadata
from dynamo_worker._llamacpp._server import LlamaServer
from dynamo_worker._llamacpp._settings import LlamaCppSettings
from dynamo_worker._llamacpp._slots import Slots
from dynamo_worker._llamacpp._tokenizer import (
    control_token_ids,
    end_token_ids,
    tokenizer_config_json,
    tokenizer_json,
)
from dynamo_worker._merged_choices import merged
from dynamo_worker._output_builder import Delta, OutputBuilder
from dynamo_worker._request_tasks import RequestTasks
from dynamo_worker._stream_engine import StreamEngine

CAPABILITIES = ("guided_decoding", "logit_bias", "logprobs", "min_p", "n", "penalties", "seed", "top_k")
_MAX_LOGPROBS = 64


class LlamaCppEngine(StreamEngine):
    """An engine over llama.cpp: continuous batching, prefix reuse, quantised models.

    A seeded request draws the same tokens again. A sampled continuation draws anew: llama.cpp's generator counts
    draws, not positions.

    Args:
        settings: Options.
    """

    def __init__(self, settings: LlamaCppSettings) -> None:
        super().__init__()
        self._settings = settings
        self._server: LlamaServer | None = None
        self._slots: Slots | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._folder = ""
        self._control_tokens: frozenset[int] = frozenset()
        self._vocab_size = 0
        self._context_length = 0

    @classmethod
    def from_args(cls, args: Sequence[str]) -> LlamaCppEngine:
        """Build an engine from command-line arguments; nothing is loaded.

        Raises:
            ConfigurationError: for an unknown flag, a bad value, or a file that is not there.
        """
        return cls(LlamaCppSettings.from_args(args))

    async def start(self, context: EngineContext) -> EngineConfig:
        """Load the model.

        Raises:
            ConfigurationError: if xllamacpp is not installed, or the file cannot be used.
        """
        metadata = await asyncio.to_thread(read_metadata, Path(self._settings.model))
        self._context_length = self._settings.max_model_len or _trained_length(metadata)
        folder = await asyncio.to_thread(self._tokenizer_folder, metadata)
        self._server = await asyncio.to_thread(LlamaServer, self._settings, self._context_length)
        self._control_tokens = control_token_ids(metadata)
        self._vocab_size = len(metadata["tokenizer.ggml.tokens"])
        self._threads = ThreadPoolExecutor(self._settings.max_num_seqs, thread_name_prefix="llamacpp")
        ends = end_token_ids(metadata)
        is_exact = self._settings.keeps_slots_whole(self._context_length)
        self._slots = Slots(self._settings.max_num_seqs, self._settings.kv_block_size) if is_exact else None
        self._tasks = RequestTasks(self._stream, ends)
        return EngineConfig(
            model=self._settings.model_name,
            model_path=folder,
            context_length=self._context_length,
            kv_block_size=self._settings.kv_block_size if is_exact else 0,
            eos_token_ids=ends,
            capabilities=CAPABILITIES,
            runtime_config=ModelRuntimeConfig(
                max_num_seqs=self._settings.max_num_seqs,
                max_num_batched_tokens=self._settings.max_num_batched_tokens,
            ),
        )

    async def cleanup(self) -> None:
        """Wait for the step that is being computed, and release the model."""
        await self._tasks.close()
        threads, self._threads = self._threads, None
        if threads is not None:
            await asyncio.to_thread(threads.shutdown)
        server, self._server = self._server, None
        if server is not None:
            await asyncio.to_thread(server.close)
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = ""

    def set_kv_event_sink(self, sink: KvEventSink, *, dp_rank: int = 0) -> None:
        """Report what the slots hold to ``sink``."""
        if self._slots is not None:
            self._slots.reports.sink = sink

    def load(self, *, dp_rank: int = 0) -> ReportedLoad:
        """Return how many requests run and wait."""
        running = min(len(self._tasks), self._settings.max_num_seqs)
        return ReportedLoad(active_requests=running, waiting_requests=len(self._tasks) - running)

    async def _stream(self, request: GenerateRequest, output: OutputBuilder) -> AsyncIterator[GenerateChunk]:
        times = request.sampling.n if is_greedy(request) else 1
        generations = [self._generation(request, output, index) for index in range(request.sampling.n // times)]
        async with aclosing(merged([item.run(self._complete) for item in generations])) as deltas:
            async for delta in deltas:
                for choice in range(times) if times > 1 else (delta.choice,):
                    chunk = output.take(Delta(choice, delta.token_ids, delta.logprobs, finish=delta.finish))
                    if chunk is not None:
                        yield chunk
        last = output.close(cached_tokens=generations[0].cached_tokens)
        if last is not None:
            yield last

    def _generation(self, request: GenerateRequest, output: OutputBuilder, choice: int) -> Generation:
        room = self._context_length - token_count(request.token_ids)
        wanted = request.stop.max_tokens
        left = room if wanted is None else min(room, wanted - request.accepted_tokens)
        return Generation(request, choice, left, output.end_token_ids, self._control_tokens)

    async def _complete(self, body: dict[str, Any]) -> AsyncGenerator[Step, None]:
        server, threads, slots = self._server, self._threads, self._slots
        if server is None or threads is None:
            raise UnavailableError("the engine is not started", reason="backend.engine_shutdown")
        if slots is None:
            async with aclosing(stream(server.complete, body, threads)) as steps:
                async for step in steps:
                    yield step
            return
        async with (
            slots.held(body["prompt"]) as slot,
            aclosing(stream(server.complete, {**body, "id_slot": slot.index}, threads)) as steps,
        ):
            async for step in steps:
                slot.take(step)
                yield step

    def _require_servable(self, request: GenerateRequest) -> None:
        if self._server is None:
            raise UnavailableError("the engine is not started", reason="backend.engine_shutdown")
        count, sampling = token_count(request.token_ids), request.sampling
        problems = {
            "modality": request.modality is not Modality.TEXT or bool(request.parts),
            "lora": bool(request.routing.lora),
            "allowed_token_ids": bool(sampling.allowed_token_ids),
            "prompt_logprobs": request.output.prompt_logprobs is not None,
            "handoff": request.handoff is not None,
        }
        for name, is_used in problems.items():
            if is_used:
                raise InvalidRequestError(f"{name} is not supported by the llama.cpp engine; leave it out", param=name)
        if not 0 < count < self._context_length:
            raise InvalidRequestError(
                f"token_ids has {count} tokens; give 1 to {self._context_length - 1}", param="token_ids"
            )
        if not 0 <= (request.output.logprobs or 0) <= _MAX_LOGPROBS:
            raise InvalidRequestError(f"logprobs must be from 0 to {_MAX_LOGPROBS}", param="logprobs")
        if sampling.n > 1 and request.accepted_tokens:
            raise InvalidRequestError("a continuation has one choice; continue each alone", param="n")

    def _tokenizer_folder(self, metadata: Mapping[str, Any]) -> str:
        if self._settings.tokenizer:
            return self._settings.tokenizer
        files = {"tokenizer.json": tokenizer_json(metadata), "tokenizer_config.json": tokenizer_config_json(metadata)}
        self._folder = tempfile.mkdtemp(prefix="dynamo-llamacpp-")
        for name, content in files.items():
            (Path(self._folder) / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        return self._folder


def _trained_length(metadata: Mapping[str, Any]) -> int:
    architecture = metadata.get("general.architecture")
    length = metadata.get(f"{architecture}.context_length")
    if not length:
        raise ConfigurationError("the GGUF file names no context length; give --max-model-len")
    return int(length)
