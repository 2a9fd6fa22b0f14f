"""``TrtllmEngine``: TensorRT-LLM's ``LLM`` in this process, through its LLM API alone."""

from __future__ import annotations

import asyncio
import importlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import structlog

from dynamo_core.cards import ModelRuntimeConfig
from dynamo_core.engine import EngineConfig, EngineContext, KvEventSink
from dynamo_core.enums import Modality
from dynamo_core.errors import BackendProtocolError, ConfigurationError, InvalidRequestError, UnavailableError
from dynamo_core.load import ForwardPassMetrics, ReportedLoad
from dynamo_core.requests import GenerateChunk, GenerateRequest
from dynamo_core.tokens import token_count, unpack_tokens
from dynamo_worker._merged_choices import merged
from dynamo_worker._output_builder import Delta, OutputBuilder
from dynamo_worker._request_tasks import RequestTasks
from dynamo_worker._stream_engine import StreamEngine
from dynamo_worker._trtllm._events import EventReader
from dynamo_worker._trtllm._settings import TrtllmSettings
from dynamo_worker._trtllm._statistics import IterationStatistics
from dynamo_worker._trtllm._translation import (
    ChoiceReader,
    Stage,
    constraint,
    is_greedy,
    require_expressible,
    sampling_fields,
    stages,
)

_CAPABILITIES = ("guided_decoding", "logprobs", "min_p", "n", "penalties", "seed", "top_k")
_DEFAULT_BLOCK_TOKENS = 32

log = structlog.get_logger(__name__)


class TrtllmEngine(StreamEngine):
    """An engine over TensorRT-LLM's ``LLM``.

    Args:
        settings: Options.
    """

    def __init__(self, settings: TrtllmSettings) -> None:
        super().__init__()
        self._settings = settings
        self._library: Any = None
        self._llm: Any = None
        self._context: EngineContext | None = None
        self._statistics = IterationStatistics()
        self._events: EventReader | None = None
        self._polls: list[asyncio.Task[None]] = []
        self._is_closing = False
        self._context_length = 0
        self._block_size = 0

    @classmethod
    def from_args(cls, args: Sequence[str]) -> TrtllmEngine:
        """Build an engine from command-line arguments; TensorRT-LLM is not imported.

        Raises:
            ConfigurationError: for an unknown flag or a bad value.
        """
        return cls(TrtllmSettings.from_args(args))

    async def start(self, context: EngineContext) -> EngineConfig:
        """Load the model. The event loop waits meanwhile: TensorRT-LLM must see it to give asynchronous results.

        Raises:
            ConfigurationError: if TensorRT-LLM is not installed, or refuses its arguments.
        """
        self._context = context
        self._library = library = _import_library()
        try:
            self._llm = library.LLM(**self._llm_args(library))
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"TensorRT-LLM refuses its arguments: {error}; see --trtllm-args") from error
        self._tasks = RequestTasks(self._stream)
        self._is_closing = False
        self._polls.append(asyncio.ensure_future(self._poll(self._llm.get_stats_async, self._take_statistics)))
        return self._config()

    async def cleanup(self) -> None:
        """Shut TensorRT-LLM down."""
        await self._tasks.close()
        self._is_closing = True
        polls, self._polls = self._polls, []
        for poll in polls:
            poll.cancel()
        await asyncio.gather(*polls, return_exceptions=True)
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.shutdown()

    def set_kv_event_sink(self, sink: KvEventSink, *, dp_rank: int = 0) -> None:
        """Report TensorRT-LLM's events to ``sink``; it has one rank."""
        if not (self._settings.kv_events and self._llm is not None) or self._events is not None:
            return
        self._events = EventReader(sink, self._block_size)
        self._polls.append(asyncio.ensure_future(self._poll(self._llm.get_kv_cache_events_async, self._take_event)))

    def set_forward_pass_listener(self, listener: Callable[[ForwardPassMetrics], None]) -> None:
        """Report each iteration to ``listener``."""
        self._statistics.listen(listener)

    def load(self, *, dp_rank: int = 0) -> ReportedLoad:
        """Return what TensorRT-LLM said of its latest iteration."""
        if len(self._tasks):
            return self._statistics.load()
        return ReportedLoad(kv_total_blocks=self._statistics.total_blocks)

    async def _stream(self, request: GenerateRequest, output: OutputBuilder) -> AsyncIterator[GenerateChunk]:
        times = request.sampling.n if is_greedy(request) else 1
        ends = output.end_token_ids
        readers = [ChoiceReader(request, choice) for choice in range(request.sampling.n // times)]
        runs = [self._choice(request, reader, choice, ends) for choice, reader in enumerate(readers)]
        async with aclosing(merged(runs)) as deltas:
            async for delta in deltas:
                for choice in range(times) if times > 1 else (delta.choice,):
                    copy = Delta(choice, delta.token_ids, delta.logprobs, None, delta.finish, delta.is_end_token_last)
                    chunk = output.take(copy)
                    if chunk is not None:
                        yield chunk
        last = output.close(cached_tokens=readers[0].cached_tokens)
        if last is not None:
            yield last

    async def _choice(
        self, request: GenerateRequest, reader: ChoiceReader, choice: int, ends: Sequence[int]
    ) -> AsyncGenerator[Delta, None]:
        for stage in stages(request, ends, max_tokens=self._max_tokens(request)):
            reader.begin()
            result = self._submit(request, stage, choice, reader.tokens)
            is_finished = False
            try:
                async for piece in result:
                    delta = reader.read(piece, stage)
                    is_finished = piece.outputs[0].finish_reason is not None
                    yield delta
            finally:
                if not is_finished:  # leaving the stream alone does not end it there
                    result.abort()

    def _submit(self, request: GenerateRequest, stage: Stage, choice: int, so_far: Sequence[int]) -> Any:
        fields = sampling_fields(request, stage, choice=choice, position=len(so_far))
        options = {"cache_salt": request.routing.cache_salt} if request.routing.cache_salt else {}
        prompt = [*unpack_tokens(request.token_ids), *so_far]
        if request.sampling.guided is not None:
            form = constraint(request.sampling.guided)
            fields["guided_decoding"] = self._library.llmapi.GuidedDecodingParams(**form)
        try:
            params = self._library.SamplingParams(**fields)
            return self._require_llm().generate_async(prompt, params, streaming=True, **options)
        except (TypeError, ValueError) as error:
            raise InvalidRequestError(f"TensorRT-LLM refuses the request: {error}") from error

    def _max_tokens(self, request: GenerateRequest) -> int:
        if request.stop.max_tokens is not None:
            return request.stop.max_tokens - request.accepted_tokens
        return self._context_length - token_count(request.token_ids)

    def _require_servable(self, request: GenerateRequest) -> None:
        self._require_llm()
        if request.modality is not Modality.TEXT or request.parts:
            raise InvalidRequestError("this engine takes token prompts for text only", param="modality")
        count = token_count(request.token_ids)
        if not 0 < count < self._context_length:
            raise InvalidRequestError(
                f"token_ids has {count} tokens; give 1 to {self._context_length - 1}", param="token_ids"
            )
        if request.sampling.n > 1 and request.accepted_tokens:
            raise InvalidRequestError("a continuation has one choice; continue each alone", param="n")
        if request.routing.lora:
            raise InvalidRequestError("this engine has no adapters; leave lora out", param="lora")
        require_expressible(request)

    def _require_llm(self) -> Any:
        if self._llm is None:
            raise UnavailableError("the engine is not started", reason="backend.engine_shutdown")
        return self._llm

    async def _poll(self, source: Callable[..., Any], take: Callable[[Mapping[str, Any]], None]) -> None:
        # Each stream of the library's ends when nothing came for as long as it was told to wait. It waits in a way
        # that can lose a cancellation when something comes at the same moment, hence the look at ``_is_closing``.
        while not self._is_closing:
            async for item in source(timeout=self._settings.poll_timeout_s):
                if self._is_closing:
                    return
                take(item)
            await asyncio.sleep(0)

    def _take_statistics(self, stat: Mapping[str, Any]) -> None:
        if self._context is not None:
            self._statistics.take(stat, self._context)

    def _take_event(self, event: Mapping[str, Any]) -> None:
        assert self._events is not None  # made before this poll
        try:
            self._events.read(event)
        except BackendProtocolError as error:
            log.warning("KV event left out", problem=error.message)

    def _llm_args(self, library: Any) -> dict[str, Any]:
        settings = self._settings
        given = dict(settings.trtllm_args)
        cache: dict[str, Any] = {"enable_block_reuse": True, **given.pop("kv_cache_config", {})}
        if settings.kv_events:
            cache.setdefault("event_buffer_max_size", settings.kv_event_buffer_events)
        self._block_size = int(cache.get("tokens_per_block", _DEFAULT_BLOCK_TOKENS))
        defaults = {"enable_iter_perf_stats": True, "guided_decoding_backend": "xgrammar"}
        # The frontend has the tokenizer; here it is of use to constraints alone.
        return {"model": settings.model, **defaults, **given, "kv_cache_config": library.llmapi.KvCacheConfig(**cache)}

    def _config(self) -> EngineConfig:
        settings, arguments = self._settings, self._require_llm().args
        self._context_length = int(getattr(arguments, "max_seq_len", None) or _trained_length(settings.model))
        reuses = bool(arguments.kv_cache_config.enable_block_reuse)
        return EngineConfig(
            model=settings.served_model_name or Path(settings.model).name,
            model_path=settings.model if Path(settings.model).is_dir() else "",
            context_length=self._context_length,
            kv_block_size=self._block_size if reuses and settings.kv_events else 0,
            capabilities=_CAPABILITIES,
            runtime_config=ModelRuntimeConfig(
                max_num_seqs=getattr(arguments, "max_batch_size", None),
                max_num_batched_tokens=getattr(arguments, "max_num_tokens", None),
            ),
        )


def _trained_length(model: str) -> int:
    path = Path(model) / "config.json"
    length = json.loads(path.read_text(encoding="utf-8")).get("max_position_embeddings") if path.is_file() else None
    if not length:
        raise ConfigurationError("the model names no context length; give max_seq_len in --trtllm-args")
    return int(length)


def _import_library() -> Any:
    try:
        return importlib.import_module("tensorrt_llm")
    except ImportError as error:
        raise ConfigurationError(
            f"--engine trtllm needs TensorRT-LLM, which cannot be imported ({error}); "
            "install it with: pip install tensorrt-llm"
        ) from error
