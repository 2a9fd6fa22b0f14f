"""``VllmEngine``: vLLM's ``AsyncLLM`` in this process, through its public API alone."""

from __future__ import annotations

import importlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec

from dynamo_core.cards import ModelRuntimeConfig
from dynamo_core.clock import Clock
from dynamo_core.engine import ChunkSink, EngineConfig, EngineContext, KvEventSink
from dynamo_core.enums import Modality, WorkerType
from dynamo_core.errors import (
    BackendProtocolError,
    ConfigurationError,
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    UnavailableError,
)
from dynamo_core.load import ReportedLoad
from dynamo_core.planes import RequestContext
from dynamo_core.requests import GenerateChunk, GenerateRequest, PrefillResult, TokenLogprob, TopLogprob
from dynamo_core.tokens import token_count, unpack_tokens
from dynamo_worker._kv_relay.relay import KvEventRelay, rank_endpoint
from dynamo_worker._output_builder import Delta, OutputBuilder
from dynamo_worker._request_tasks import RequestTasks
from dynamo_worker._vllm._load_logger import LoadLogger
from dynamo_worker._vllm._settings import VllmSettings

HANDOFF_KIND = "vllm.kv_transfer_params.v1"
_WORKER_TYPES = {"agg": WorkerType.AGGREGATED, "prefill": WorkerType.PREFILL, "decode": WorkerType.DECODE}
_REMOTE_DECODE = {"do_remote_decode": True, "do_remote_prefill": False}
_SAMPLING = (
    "n",
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
)
_CONSTRAINTS = ("json", "regex", "choice", "grammar", "structural_tag")


class VllmEngine:
    """An engine over ``AsyncLLM``.

    Args:
        settings: Options.
    """

    def __init__(self, settings: VllmSettings) -> None:
        self._settings = settings
        self._llm: Any = None
        self._vllm: Any = None
        self._tasks = RequestTasks(self._stream)
        self._load = LoadLogger()
        self._loras: dict[str, Any] = {}
        self._relays: list[KvEventRelay] = []
        self._endpoints = (settings.kv_events_endpoint, settings.kv_events_replay_endpoint)
        self._folder = ""
        self._clock: Clock | None = None
        self._context_length = 0
        self._block_size = 0
        self._total_blocks = 0

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
        self._vllm = _import_vllm()
        try:
            arguments = self._vllm.AsyncEngineArgs(**self._engine_args())
            async_llm = importlib.import_module("vllm.v1.engine.async_llm").AsyncLLM
            self._llm = async_llm.from_engine_args(arguments, stat_loggers=[self._load.for_engine])
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"vLLM refuses its arguments: {error}; see --vllm-args") from error
        self._tasks = RequestTasks(self._stream)
        return self._config()

    def submit(self, request: GenerateRequest, sink: ChunkSink) -> None:
        """Accept a request whose chunks are pushed; raises as ``generate``."""
        self._require_servable(request)
        self._tasks.submit(request, sink)

    async def generate(self, request: GenerateRequest, context: RequestContext) -> AsyncIterator[GenerateChunk]:
        """Yield tokens as vLLM gives them; stopping the context or closing the iterator aborts the request there.

        Raises:
            InvalidRequestError: for a request that vLLM cannot serve.
            NotFoundError: for an adapter that is not loaded.
            UnavailableError: if vLLM has died.
        """
        self._require_servable(request)
        async for chunk in self._tasks.generate(request, context):
            yield chunk

    async def abort(self, request_id: str) -> None:
        """End a request; leaving vLLM's iterator aborts it there."""
        self._tasks.abort(request_id)

    async def drain(self) -> None:
        """Finish what runs, refuse what is new."""
        await self._tasks.drain()

    async def cleanup(self) -> None:
        """Shut vLLM down."""
        await self._tasks.close()
        for relay in self._relays:
            await relay.close()
        self._relays = []
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.shutdown()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = ""

    def set_kv_event_sink(self, sink: KvEventSink, *, dp_rank: int = 0) -> None:
        """Relay vLLM's events of a rank to ``sink``."""
        endpoint, replay = self._endpoints
        if not (self._settings.kv_events and endpoint and self._clock is not None):
            return
        relay = KvEventRelay(
            rank_endpoint(endpoint, dp_rank),
            replay_endpoint=rank_endpoint(replay, dp_rank),
            topic="",
            block_size=self._block_size,
            sink=sink,
            clock=self._clock,
        )
        relay.start()
        self._relays.append(relay)

    def load(self, *, dp_rank: int = 0) -> ReportedLoad:
        """Return what vLLM's scheduler said last."""
        return (
            self._load.of(dp_rank, self._total_blocks)
            if len(self._tasks)
            else ReportedLoad(kv_total_blocks=self._total_blocks)
        )

    async def load_lora(self, name: str, path: str) -> None:
        """Load an adapter. Raises as ``SupportsLora`` says."""
        if name in self._loras:
            raise ConflictError(f"the adapter name {name!r} is taken; unload it first", param="lora_name")
        if not (Path(path) / "adapter_config.json").is_file():
            raise NotFoundError(f"{path} has no LoRA adapter", param="path")
        request_type = importlib.import_module("vllm.lora.request").LoRARequest
        lora = request_type(name, max((item.lora_int_id for item in self._loras.values()), default=0) + 1, path)
        await self._require_llm().add_lora(lora)
        self._loras[name] = lora

    async def unload_lora(self, name: str) -> None:
        """Unload an adapter; vLLM finishes its running requests."""
        lora = self._loras.pop(name, None)
        if lora is None:
            raise NotFoundError(f"no adapter is named {name!r}", param="lora_name")
        await self._require_llm().remove_lora(lora.lora_int_id)

    async def list_loras(self) -> list[str]:
        """Names of loaded adapters."""
        return sorted(self._loras)

    async def sleep(self, level: int = 1) -> None:
        """Give memory back."""
        await self._require_llm().sleep(level)

    async def wake(self) -> None:
        """Be ready again."""
        await self._require_llm().wake_up()

    async def _stream(self, request: GenerateRequest, output: OutputBuilder) -> AsyncIterator[GenerateChunk]:
        cached, handoff = 0, None
        async for result in self._results(request, output):
            cached = result.num_cached_tokens or cached
            handoff = getattr(result, "kv_transfer_params", None) or handoff
            for part in result.outputs:
                chunk = output.take(_delta(part, request))
                if chunk is not None:
                    yield chunk
        last = output.close(cached_tokens=cached)
        if last is not None:
            yield self._handed_over(last, handoff) if self._settings.disaggregation_mode == "prefill" else last

    async def _results(self, request: GenerateRequest, output: OutputBuilder) -> AsyncIterator[Any]:
        llm = self._require_llm()
        prompt: dict[str, Any] = {"prompt_token_ids": list(unpack_tokens(request.token_ids))}
        if request.routing.cache_salt:
            prompt["cache_salt"] = request.routing.cache_salt
        options: dict[str, Any] = {"priority": request.routing.priority}
        if request.routing.dp_rank is not None:
            options["data_parallel_rank"] = request.routing.dp_rank
        if lora := self._lora_of(request):
            options["lora_request"] = self._loras[lora]
        params = self._params(request, output)
        try:
            async with aclosing(llm.generate(prompt, params, request.request_id, **options)) as results:
                async for result in results:
                    yield result
        except ValueError as error:
            raise InvalidRequestError(f"vLLM refuses the request: {error}") from error
        except Exception as error:
            if not llm.errored:
                raise
            died = UnavailableError("vLLM has died.", reason="backend.engine_shutdown", diagnostic=repr(error))
            raise died from error

    def _handed_over(self, last: GenerateChunk, parameters: Any) -> GenerateChunk:
        result = PrefillResult({"kind": HANDOFF_KIND, "kv_transfer_params": parameters}, cached_tokens=0)
        return msgspec.structs.replace(last, handoff=result)

    def _params(self, request: GenerateRequest, output: OutputBuilder) -> Any:
        sampling, stop, wanted = request.sampling, request.stop, request.output
        fields: dict[str, Any] = {name: getattr(sampling, name) for name in _SAMPLING}
        fields |= {
            "top_k": max(0, sampling.top_k),
            "stop_token_ids": output.end_token_ids,
            "ignore_eos": stop.ignore_eos,
            "max_tokens": self._max_tokens(request),
            "min_tokens": max(0, stop.min_tokens - request.accepted_tokens),
            "logprobs": wanted.logprobs,
            "skip_special_tokens": wanted.skip_special_tokens,
            "detokenize": False,
            "output_kind": self._vllm.sampling_params.RequestOutputKind.DELTA,
            "logit_bias": dict(sampling.logit_bias) or None,
            "allowed_token_ids": list(sampling.allowed_token_ids) or None,
            **self._constraint(request),
        }
        if transfer := self._transfer_params(request):
            fields["extra_args"] = {"kv_transfer_params": transfer}
        try:
            return self._vllm.SamplingParams(**fields)
        except (TypeError, ValueError) as error:
            raise InvalidRequestError(f"vLLM refuses the sampling options: {error}", param="sampling") from error

    def _max_tokens(self, request: GenerateRequest) -> int:
        if self._settings.disaggregation_mode == "prefill":
            return 1
        if request.stop.max_tokens is not None:
            return request.stop.max_tokens - request.accepted_tokens
        return self._context_length - token_count(request.token_ids)

    def _constraint(self, request: GenerateRequest) -> dict[str, Any]:
        guided = request.sampling.guided
        if guided is None:
            return {}
        given = {name: getattr(guided, name) for name in _CONSTRAINTS if getattr(guided, name) not in (None, ())}
        if "choice" in given:
            given["choice"] = list(given["choice"])
        module = self._vllm.sampling_params
        if hasattr(module, "StructuredOutputsParams"):
            return {"structured_outputs": module.StructuredOutputsParams(**given)}
        return {"guided_decoding": module.GuidedDecodingParams(**given)}

    def _transfer_params(self, request: GenerateRequest) -> dict[str, Any] | None:
        if self._settings.disaggregation_mode == "prefill":
            return dict(_REMOTE_DECODE)
        if request.handoff is None:
            return None
        if request.handoff.parameters.get("kind") != HANDOFF_KIND:
            raise BackendProtocolError(
                f"the hand-off is {request.handoff.parameters.get('kind')!r}, vLLM takes {HANDOFF_KIND!r}; "
                "use prefill and decode workers of one engine"
            )
        return request.handoff.parameters["kv_transfer_params"]

    def _lora_of(self, request: GenerateRequest) -> str:
        return request.routing.lora or (request.model if request.model in self._loras else "")

    def _require_servable(self, request: GenerateRequest) -> None:
        self._require_llm()
        count = token_count(request.token_ids)
        if request.modality is not Modality.TEXT or request.parts:
            raise InvalidRequestError("this engine takes token prompts only", param="modality")
        if not count or count >= self._context_length:
            raise InvalidRequestError(
                f"token_ids has {count} tokens; give 1 to {self._context_length - 1}", param="token_ids"
            )
        if request.sampling.n > 1 and request.accepted_tokens:
            raise InvalidRequestError("a continuation has one choice; continue each alone", param="n")
        lora = self._lora_of(request)
        if lora and lora not in self._loras:
            raise NotFoundError(f"no adapter is named {lora!r}", param="lora")

    def _require_llm(self) -> Any:
        if self._llm is None:
            raise UnavailableError("the engine is not started", reason="backend.engine_shutdown")
        return self._llm

    def _engine_args(self) -> dict[str, Any]:
        settings = self._settings
        arguments: dict[str, Any] = {"model": settings.model, **settings.vllm_args}
        if settings.kv_events:
            if not settings.kv_events_endpoint:
                self._folder = tempfile.mkdtemp(prefix="dynamo-vllm-")
                self._endpoints = (f"ipc://{self._folder}/events", f"ipc://{self._folder}/replay")
            events = importlib.import_module("vllm.config").KVEventsConfig(
                enable_kv_cache_events=True,
                publisher="zmq",
                endpoint=self._endpoints[0],
                replay_endpoint=self._endpoints[1] or None,
            )
            arguments["kv_events_config"] = events
        return arguments

    def _config(self) -> EngineConfig:
        settings, config = self._settings, self._require_llm().vllm_config
        self._context_length = int(config.model_config.max_model_len)
        self._block_size = int(config.cache_config.block_size)
        self._total_blocks = int(config.cache_config.num_gpu_blocks or 0)
        caching = bool(config.cache_config.enable_prefix_caching)
        return EngineConfig(
            model=settings.served_model_name or Path(settings.model).name,
            model_path=settings.model if Path(settings.model).is_dir() else "",
            context_length=self._context_length,
            kv_block_size=self._block_size if caching and settings.kv_events else 0,
            worker_type=_WORKER_TYPES[settings.disaggregation_mode],
            capabilities=("guided_decoding", "logprobs", "lora", "min_p", "n", "penalties", "seed", "top_k"),
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


def _delta(part: Any, request: GenerateRequest) -> Delta:
    tokens = list(part.token_ids)
    logprobs = ()
    if request.output.logprobs is not None and part.logprobs:
        logprobs = tuple(
            _logprob(token, entry, request.output.logprobs) for token, entry in zip(tokens, part.logprobs, strict=True)
        )
    return Delta(part.index, tokens, logprobs, finish=part.finish_reason)


def _logprob(token: int, entry: Mapping[int, Any], count: int) -> TokenLogprob:
    best = sorted(entry.items(), key=lambda item: -item[1].logprob)
    top = tuple(TopLogprob(other, value.logprob) for other, value in best[:count])
    return TokenLogprob(token, entry[token].logprob, top)
