"""``VllmEngine``: vLLM's ``AsyncLLM`` in this process, through its public API alone."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from dynamo_core.cards import ModelRuntimeConfig
from dynamo_core.clock import Clock
from dynamo_core.engine import EngineConfig, EngineContext, KvEventSink
from dynamo_core.enums import Modality, ModelType, WorkerType
from dynamo_core.errors import ConfigurationError, InvalidRequestError, UnavailableError
from dynamo_core.load import ForwardPassMetrics, ReportedLoad
from dynamo_core.requests import GenerateChunk, GenerateRequest
from dynamo_core.tokens import token_count, unpack_tokens
from dynamo_worker._kv_relay.source import KvEventSource
from dynamo_worker._output_builder import OutputBuilder
from dynamo_worker._request_tasks import RequestTasks
from dynamo_worker._stream_engine import StreamEngine
from dynamo_worker._vllm._loras import LoraNames
from dynamo_worker._vllm._outputs import embedding, embedding_chunk, handed_over, to_delta
from dynamo_worker._vllm._params import ParamsBuilder, copies, raise_if_refused
from dynamo_worker._vllm._settings import VllmSettings
from dynamo_worker._vllm._statistics import EngineStatistics

_WORKER_TYPES = {"agg": WorkerType.AGGREGATED, "prefill": WorkerType.PREFILL, "decode": WorkerType.DECODE}
_GENERATES = ("guided_decoding", "logit_bias", "logprobs", "lora", "min_p", "n", "penalties", "seed", "top_k")


class VllmEngine(StreamEngine):
    """An engine over ``AsyncLLM``.

    Args:
        settings: Options.
    """

    def __init__(self, settings: VllmSettings) -> None:
        super().__init__()
        self._settings = settings
        self._llm: Any = None
        self._params: ParamsBuilder | None = None
        self._statistics = EngineStatistics()
        self._loras = LoraNames()
        self._kv_events = KvEventSource(settings.kv_events_endpoint, settings.kv_events_replay_endpoint)
        self._clock: Clock | None = None
        self._context_length = 0
        self._block_size = 0
        self._total_blocks = 0
        self._pools = False

    @classmethod
    def from_args(cls, args: Sequence[str]) -> VllmEngine:
        """Build an engine from command-line arguments; vLLM is not imported.

        Raises:
            ConfigurationError: for an unknown flag or a bad value.
        """
        return cls(VllmSettings.from_args(args))

    async def start(self, context: EngineContext) -> EngineConfig:
        """Load the model.

        Raises:
            ConfigurationError: if vLLM is not installed, or refuses its arguments.
        """
        self._clock = context.clock
        vllm = _import_vllm()
        try:
            arguments = vllm.AsyncEngineArgs(**self._engine_args(vllm.AsyncEngineArgs))
            self._llm = await asyncio.to_thread(self._load_model, arguments)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"vLLM refuses its arguments: {error}; see --vllm-args") from error
        self._tasks = RequestTasks(self._stream)
        config = self._config()
        self._statistics.bind(context, total_blocks=self._total_blocks, block_size=self._block_size)
        is_prefill = self._settings.disaggregation_mode == "prefill"
        self._params = ParamsBuilder(vllm, context_length=self._context_length, is_prefill=is_prefill)
        return config

    async def cleanup(self) -> None:
        """Shut vLLM down."""
        await self._tasks.close()
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.shutdown()
        self._statistics.close()
        await self._kv_events.close()

    def set_kv_event_sink(self, sink: KvEventSink, *, dp_rank: int = 0) -> None:
        """Relay vLLM's events of a rank to ``sink``."""
        if self._clock is not None:
            self._kv_events.relay(sink, dp_rank=dp_rank, block_size=self._block_size, clock=self._clock)

    def load(self, *, dp_rank: int = 0) -> ReportedLoad:
        """Return what vLLM's scheduler said last."""
        if not len(self._tasks):
            return self._statistics.idle_load(dp_rank)
        queued = getattr(self._llm, "get_num_queued_tokens", int)
        return self._statistics.load(dp_rank, waiting_prefill_tokens=queued())

    def set_forward_pass_listener(self, listener: Callable[[ForwardPassMetrics], None]) -> None:
        """Report each step of vLLM's schedulers, where this vLLM times its steps."""
        self._statistics.listen(listener)

    async def clear_kv_blocks(self) -> int:
        """Empty vLLM's prefix cache, unless blocks are in use; return how many blocks that was at most."""
        used = self._statistics.load(0).kv_used_blocks
        return self._total_blocks - used if await self._require_llm().reset_prefix_cache() else 0

    async def load_lora(self, name: str, path: str) -> None:
        """Load an adapter. Raises as ``SupportsLora`` says."""
        await self._loras.load(name, path, self._require_llm().add_lora)

    async def unload_lora(self, name: str) -> None:
        """Unload an adapter; vLLM finishes its running requests."""
        await self._loras.unload(name, self._require_llm().remove_lora)

    async def list_loras(self) -> list[str]:
        """Names of loaded adapters."""
        return self._loras.names

    async def sleep(self, level: int = 1) -> None:
        """Give memory back."""
        await self._require_llm().sleep(level)

    async def wake(self) -> None:
        """Be ready again."""
        await self._require_llm().wake_up()

    async def _stream(self, request: GenerateRequest, output: OutputBuilder) -> AsyncIterator[GenerateChunk]:
        if request.modality is Modality.EMBEDDING:
            yield await self._embed(request, output)
            return
        cached, handoff, times = 0, None, copies(request)
        params = self._require_params().sampling(request, output.end_token_ids)
        async with aclosing(self._results(request, params)) as results:
            async for result in results:
                cached = result.num_cached_tokens or cached
                handoff = getattr(result, "kv_transfer_params", None) or handoff
                for part in result.outputs:
                    for choice in range(times) if times > 1 else (part.index,):
                        chunk = output.take(to_delta(part, request, choice=choice))
                        if chunk is not None:
                            yield chunk
        last = output.close(cached_tokens=cached)
        if last is not None:
            is_prefill = self._settings.disaggregation_mode == "prefill"
            yield handed_over(last, handoff, cached) if is_prefill else last

    async def _results(self, request: GenerateRequest, params: Any) -> AsyncGenerator[Any, None]:
        llm = self._require_llm()
        prompt: dict[str, Any] = {"prompt_token_ids": list(unpack_tokens(request.token_ids))}
        if request.routing.cache_salt:
            prompt["cache_salt"] = request.routing.cache_salt
        options: dict[str, Any] = {"priority": request.routing.priority}
        if request.routing.dp_rank is not None:
            options["data_parallel_rank"] = request.routing.dp_rank
        if lora := self._loras.of(request):
            options["lora_request"] = lora
        try:
            async with aclosing(llm.generate(prompt, params, request.request_id, **options)) as results:
                async for result in results:
                    yield result
        except Exception as error:
            self._raise_known(error)
            raise

    async def _embed(self, request: GenerateRequest, output: OutputBuilder) -> GenerateChunk:
        packed = [part.data for part in request.parts] or [request.token_ids]
        found = await asyncio.gather(*(self._encode(request, data, index) for index, data in enumerate(packed)))
        parts = [embedding(result.outputs.data, index=index) for index, result in enumerate(found)]
        chunk = embedding_chunk(parts, sum(map(token_count, packed)), output)
        assert chunk is not None  # the one choice of an embedding has just ended
        return chunk

    async def _encode(self, request: GenerateRequest, packed: Any, index: int) -> Any:
        prompt = {"prompt_token_ids": list(unpack_tokens(packed))}
        result = None
        try:
            stream = self._require_llm().encode(
                prompt, self._require_params().pooling(), f"{request.request_id}-{index}"
            )
            async with aclosing(stream) as results:
                async for item in results:
                    result = item
        except Exception as error:
            self._raise_known(error)
            raise
        return result

    def _raise_known(self, error: Exception) -> None:
        if self._require_llm().errored:
            died = UnavailableError("vLLM has died.", reason="backend.engine_shutdown", diagnostic=repr(error))
            raise died from error
        raise_if_refused(error)

    def _require_servable(self, request: GenerateRequest) -> None:
        self._require_llm()
        wanted = Modality.EMBEDDING if self._pools else Modality.TEXT
        if request.modality is not wanted or (request.parts and not self._pools):
            raise InvalidRequestError(f"this engine takes token prompts for {wanted.value} only", param="modality")
        for packed in [part.data for part in request.parts] or [request.token_ids]:
            if not 0 < token_count(packed) < self._context_length:
                raise InvalidRequestError(
                    f"token_ids has {token_count(packed)} tokens; give 1 to {self._context_length - 1}",
                    param="token_ids",
                )
        if request.sampling.n > 1 and request.accepted_tokens:
            raise InvalidRequestError("a continuation has one choice; continue each alone", param="n")
        self._loras.of(request)

    def _require_params(self) -> ParamsBuilder:
        self._require_llm()
        assert self._params is not None  # made when the model was loaded
        return self._params

    def _require_llm(self) -> Any:
        if self._llm is None:
            raise UnavailableError("the engine is not started", reason="backend.engine_shutdown")
        return self._llm

    def _load_model(self, arguments: Any) -> Any:
        # On a thread: weights take seconds to minutes, and the process answers health checks meanwhile.
        async_llm = importlib.import_module("vllm.v1.engine.async_llm").AsyncLLM
        return async_llm.from_engine_args(arguments, stat_loggers=[self._statistics.for_engine])

    def _engine_args(self, kind: Any) -> dict[str, Any]:
        settings = self._settings
        reports = _step_reports(kind, settings.vllm_args)
        arguments: dict[str, Any] = {"model": settings.model, **reports, **settings.vllm_args}
        if settings.kv_events:
            endpoint, replay = self._kv_events.open()
            events = importlib.import_module("vllm.config").KVEventsConfig(
                enable_kv_cache_events=True,
                publisher="zmq",
                endpoint=endpoint,
                replay_endpoint=replay or None,
            )
            arguments["kv_events_config"] = events
        return arguments

    def _config(self) -> EngineConfig:
        settings, config = self._settings, self._require_llm().vllm_config
        self._context_length = int(config.model_config.max_model_len)
        self._block_size = int(config.cache_config.block_size)
        self._total_blocks = int(config.cache_config.num_gpu_blocks or 0)
        caching = bool(config.cache_config.enable_prefix_caching)
        self._pools = getattr(config.model_config, "runner_type", "generate") == "pooling"
        return EngineConfig(
            model=settings.served_model_name or Path(settings.model).name,
            model_path=settings.model if Path(settings.model).is_dir() else "",
            context_length=self._context_length,
            kv_block_size=self._block_size if caching and settings.kv_events else 0,
            eos_token_ids=_eos_token_ids(config.model_config),
            worker_type=_WORKER_TYPES[settings.disaggregation_mode],
            model_types=(ModelType.EMBEDDING,) if self._pools else (ModelType.CHAT, ModelType.COMPLETIONS),
            output_modalities=(Modality.EMBEDDING if self._pools else Modality.TEXT,),
            capabilities=() if self._pools else _GENERATES,
            runtime_config=ModelRuntimeConfig(
                total_kv_blocks=self._total_blocks or None,
                max_num_seqs=int(config.scheduler_config.max_num_seqs),
                max_num_batched_tokens=int(config.scheduler_config.max_num_batched_tokens),
                data_parallel_size=int(config.parallel_config.data_parallel_size),
            ),
        )


def _import_vllm() -> Any:
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise ConfigurationError(
            f"--engine vllm needs vLLM, which cannot be imported ({error}); install it with: pip install vllm"
        ) from error


def _step_reports(kind: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that have vLLM time its steps.

    Its own log would have a line for each step then, so it keeps none unless the user asked for it.
    """
    known = {field.name for field in dataclasses.fields(kind)}
    if (
        not {"enable_logging_iteration_details", "disable_log_stats"} <= known
        or given.get("disable_log_stats") is False
    ):
        return {}
    return {"disable_log_stats": True, "enable_logging_iteration_details": True}


def _eos_token_ids(model_config: Any) -> tuple[int, ...]:
    configured = getattr(getattr(model_config, "hf_text_config", None), "eos_token_id", None)
    read = getattr(model_config, "try_get_generation_config", dict[str, Any])
    generation = (read() or {}).get("eos_token_id")
    found: list[int] = []
    for value in (configured, generation):
        found += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(found))
