"""``SglangEngine``: SGLang's ``Engine`` in this process."""

from __future__ import annotations

import importlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from dynamo_core.cards import ModelRuntimeConfig
from dynamo_core.clock import Clock
from dynamo_core.engine import EngineConfig, EngineContext, KvEventSink
from dynamo_core.enums import Modality
from dynamo_core.errors import ConfigurationError, InvalidRequestError, UnavailableError
from dynamo_core.load import ReportedLoad
from dynamo_core.requests import GenerateChunk, GenerateRequest
from dynamo_core.tokens import token_count, unpack_tokens
from dynamo_worker._kv_relay.source import KvEventSource
from dynamo_worker._merged_choices import merged
from dynamo_worker._output_builder import Delta, OutputBuilder
from dynamo_worker._request_tasks import RequestTasks
from dynamo_worker._sglang._settings import SglangSettings
from dynamo_worker._sglang._translation import ChoiceReader, is_greedy, sampling_params
from dynamo_worker._stream_engine import StreamEngine

_CAPABILITIES = ("guided_decoding", "logit_bias", "logprobs", "min_p", "n", "penalties", "top_k")
_TOPIC = "kv-events"


class SglangEngine(StreamEngine):
    """An engine over SGLang's ``Engine``.

    Args:
        settings: Options.
    """

    def __init__(self, settings: SglangSettings) -> None:
        super().__init__()
        self._settings = settings
        self._engine: Any = None
        self._kv_events = KvEventSource(settings.kv_events_endpoint, settings.kv_events_replay_endpoint, topic=_TOPIC)
        self._clock: Clock | None = None
        self._context_length = 0
        self._block_size = 0
        self._total_blocks = 0

    @classmethod
    def from_args(cls, args: Sequence[str]) -> SglangEngine:
        """Build an engine from command-line arguments; SGLang is not imported.

        Raises:
            ConfigurationError: for an unknown flag or a bad value.
        """
        return cls(SglangSettings.from_args(args))

    async def start(self, context: EngineContext) -> EngineConfig:
        """Load the model. The event loop waits meanwhile: SGLang sets signal handlers, which the main thread alone may.

        Raises:
            ConfigurationError: if SGLang is not installed, or refuses its arguments.
        """
        self._clock = context.clock
        library = _import_library()
        try:
            self._engine = library.Engine(**self._engine_args())
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"SGLang refuses its arguments: {error}; see --sglang-args") from error
        self._tasks = RequestTasks(self._stream)
        return self._config()

    async def cleanup(self) -> None:
        """Shut SGLang down."""
        await self._tasks.close()
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.shutdown()
        await self._kv_events.close()

    def set_kv_event_sink(self, sink: KvEventSink, *, dp_rank: int = 0) -> None:
        """Relay SGLang's events of a rank to ``sink``."""
        if self._clock is not None:
            self._kv_events.relay(sink, dp_rank=dp_rank, block_size=self._block_size, clock=self._clock)

    def load(self, *, dp_rank: int = 0) -> ReportedLoad:
        """Return how many requests run through this engine."""
        return ReportedLoad(active_requests=len(self._tasks), kv_total_blocks=self._total_blocks)

    async def clear_kv_blocks(self) -> int:
        """Empty SGLang's prefix cache, unless requests run; return how many blocks that was at most."""
        if len(self._tasks):
            return 0
        await self._require_engine().tokenizer_manager.flush_cache()
        return self._total_blocks

    async def _stream(self, request: GenerateRequest, output: OutputBuilder) -> AsyncIterator[GenerateChunk]:
        times = request.sampling.n if is_greedy(request) else 1
        readers = [ChoiceReader(request, choice) for choice in range(request.sampling.n // times)]
        runs = [self._choice(request, reader, choice, output) for choice, reader in enumerate(readers)]
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
        self, request: GenerateRequest, reader: ChoiceReader, choice: int, output: OutputBuilder
    ) -> AsyncGenerator[Delta, None]:
        engine, rid = self._require_engine(), f"{request.request_id}-{request.attempt}-{choice}"
        wanted = request.output.logprobs
        params = sampling_params(request, output.end_token_ids, choice=choice, max_tokens=self._max_tokens(request))
        options: dict[str, Any] = {"return_logprob": True, "top_logprobs_num": wanted} if wanted is not None else {}
        if request.routing.lora:
            options["lora_path"] = request.routing.lora
        if request.routing.dp_rank is not None:
            options["routed_dp_rank"] = request.routing.dp_rank
        if request.routing.cache_salt:
            options["cache_salt"] = request.routing.cache_salt
        prompt = list(unpack_tokens(request.token_ids))
        try:
            async for chunk in await engine.async_generate(
                input_ids=prompt, sampling_params=params, stream=True, rid=rid, **options
            ):
                yield reader.read(chunk)
        except ValueError as error:
            raise InvalidRequestError(f"SGLang refuses the request: {error}") from error
        finally:
            if not reader.is_finished:  # leaving the stream alone does not end it there
                engine.tokenizer_manager.abort_request(rid=rid)

    def _max_tokens(self, request: GenerateRequest) -> int:
        if request.stop.max_tokens is not None:
            return request.stop.max_tokens - request.accepted_tokens
        return self._context_length - token_count(request.token_ids)

    def _require_servable(self, request: GenerateRequest) -> None:
        self._require_engine()
        count = token_count(request.token_ids)
        if request.modality is not Modality.TEXT or request.parts:
            raise InvalidRequestError("this engine takes token prompts only", param="modality")
        if not 0 < count < self._context_length:
            raise InvalidRequestError(
                f"token_ids has {count} tokens; give 1 to {self._context_length - 1}", param="token_ids"
            )
        if request.sampling.n > 1 and request.accepted_tokens:
            raise InvalidRequestError("a continuation has one choice; continue each alone", param="n")

    def _require_engine(self) -> Any:
        if self._engine is None:
            raise UnavailableError("the engine is not started", reason="backend.engine_shutdown")
        return self._engine

    def _engine_args(self) -> dict[str, Any]:
        settings = self._settings
        arguments: dict[str, Any] = {"model_path": settings.model, **settings.sglang_args}
        if settings.kv_events:
            endpoint, replay = self._kv_events.open()
            config = {"publisher": "zmq", "topic": _TOPIC, "endpoint": endpoint, "replay_endpoint": replay or None}
            arguments["kv_events_config"] = json.dumps(config)
        return arguments

    def _config(self) -> EngineConfig:
        settings, engine = self._settings, self._require_engine()
        server_args = engine.server_args
        self._context_length = int(engine.tokenizer_manager.model_config.context_len)
        self._block_size = int(server_args.page_size)
        infos: list[dict[str, Any]] = getattr(getattr(engine, "_scheduler_init_result", None), "scheduler_infos", [])
        tokens = int((infos[0] if infos else getattr(engine, "scheduler_info", {})).get("max_total_num_tokens", 0))
        self._total_blocks = tokens // self._block_size
        return EngineConfig(
            model=settings.served_model_name or Path(settings.model).name,
            model_path=settings.model if Path(settings.model).is_dir() else "",
            context_length=self._context_length,
            kv_block_size=0 if server_args.disable_radix_cache or not settings.kv_events else self._block_size,
            capabilities=_CAPABILITIES,
            runtime_config=ModelRuntimeConfig(
                total_kv_blocks=self._total_blocks or None,
                max_num_seqs=server_args.max_running_requests,
                data_parallel_size=int(server_args.dp_size),
            ),
        )


def _import_library() -> Any:
    try:
        return importlib.import_module("sglang")
    except ImportError as error:
        raise ConfigurationError(
            f"--engine sglang needs SGLang, which cannot be imported ({error}); install it with: pip install sglang"
        ) from error
