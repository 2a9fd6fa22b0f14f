"""The parts of vLLM's public API that the adapter uses, over a made-up model.

It behaves as vLLM 0.32.0 was seen to: refusals are ``VLLMValidationError``, which is no ``ValueError``; equal choices
are refused; what stops is a token that is part of the output; a seeded generator counts its draws.
``recorded/vllm-0.32.0.json`` holds what that release really gave.
"""

from __future__ import annotations

import asyncio
import enum
import sys
import types
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
import xxhash
from prometheus_client import REGISTRY, Gauge

VOCAB = 1000
EOS = 2


class VLLMClientError(Exception):
    pass


class VLLMValidationError(VLLMClientError):
    pass


class RequestOutputKind(enum.Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class StructuredOutputsParams:
    json: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    structural_tag: Any = None


@dataclass
class SamplingParams:
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    structured_outputs: StructuredOutputsParams | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    extra_args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise VLLMValidationError(f"temperature must be non-negative, got {self.temperature}.")
        if self.temperature == 0 and self.n > 1:
            raise VLLMValidationError(f"n must be 1 when using greedy sampling, got {self.n}.")


@dataclass
class PoolingParams:
    task: str | None = None


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None


@dataclass
class CompletionOutput:
    index: int
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    text: str = ""
    logprobs: list[dict[int, Logprob]] | None = None


@dataclass
class RequestOutput:
    request_id: str
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int | None = None
    kv_transfer_params: dict[str, Any] | None = None


@dataclass
class AsyncEngineArgs:
    model: str
    max_model_len: int = 600
    block_size: int = 16
    enable_lora: bool = False
    runner: str = "auto"
    kv_events_config: Any = None
    disable_log_stats: bool = False
    enable_logging_iteration_details: bool = False


@dataclass
class KVEventsConfig:
    enable_kv_cache_events: bool = False
    publisher: str = "null"
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


class Tensor:
    """What the adapter asks of a ``torch.Tensor``."""

    def __init__(self, values: list[int]) -> None:
        self._values = values

    def flatten(self) -> Tensor:
        return self

    def tolist(self) -> list[float]:
        return [float(value) for value in self._values]


@dataclass
class IterationDetails:
    num_ctx_requests: int
    num_ctx_tokens: int
    num_generation_requests: int
    num_generation_tokens: int
    elapsed_ms: float


@dataclass
class PrefixCacheStats:
    queries: int = 0
    hits: int = 0


@dataclass
class Stats:
    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    kv_cache_usage: float = 0.0
    prefix_cache_stats: PrefixCacheStats | None = None
    iteration_details: IterationDetails | None = None


class EngineDeadError(Exception):
    pass


class AsyncLLM:
    made: list[AsyncLLM]

    def __init__(self, arguments: AsyncEngineArgs, stat_loggers: list[Any]) -> None:
        namespace = types.SimpleNamespace
        self.arguments = arguments
        self.vllm_config = namespace(
            model_config=namespace(
                max_model_len=arguments.max_model_len,
                runner_type="pooling" if arguments.runner == "pooling" else "generate",
                hf_text_config=namespace(eos_token_id=EOS),
                try_get_generation_config=lambda: {"eos_token_id": [EOS, 0]},
            ),
            cache_config=namespace(block_size=arguments.block_size, num_gpu_blocks=96, enable_prefix_caching=True),
            scheduler_config=namespace(max_num_seqs=8, max_num_batched_tokens=512),
            parallel_config=namespace(data_parallel_size=1),
        )
        self.logger = stat_loggers[0](self.vllm_config, 0)
        _unregister_metrics()
        self.running = Gauge("vllm:num_requests_running", "Number of requests that run.", ["model_name", "engine"])
        self.calls: list[tuple[Any, SamplingParams, dict[str, Any]]] = []
        self.left: list[str] = []
        self.sleeping: int | None = None
        self.errored = False
        self.resets = 0
        self.is_shut_down = False
        self.loras: dict[int, LoRARequest] = {}

    @classmethod
    def from_engine_args(cls, engine_args: AsyncEngineArgs, stat_loggers: list[Any] | None = None) -> AsyncLLM:
        made = cls(engine_args, stat_loggers or [])
        AsyncLLM.made.append(made)
        return made

    async def generate(
        self, prompt: dict[str, Any], sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncIterator[RequestOutput]:
        self.calls.append((prompt, sampling_params, options))
        assert sampling_params.output_kind is RequestOutputKind.DELTA
        tokens = prompt["prompt_token_ids"]
        choices = [_output(tokens, sampling_params, index) for index in range(sampling_params.n)]
        try:
            for step in range(max(len(output) for output, _ in choices)):
                await asyncio.sleep(0)
                if self.errored:
                    raise EngineDeadError("EngineCore died")
                parts = [
                    _part(index, output, reason, step, sampling_params)
                    for index, (output, reason) in enumerate(choices)
                    if step < len(output)
                ]
                self._record(len(tokens), step)
                finished = all(step >= len(output) - 1 for output, _ in choices)
                extra = sampling_params.extra_args or {}
                transfer = {"remote_block_ids": [1, 2]} if finished and "kv_transfer_params" in extra else None
                yield RequestOutput(request_id, parts, finished, len(tokens) // 2, transfer)
        except (asyncio.CancelledError, GeneratorExit):
            self.left.append(request_id)
            raise

    def get_num_queued_tokens(self) -> int:
        return 40

    def _record(self, prompt_tokens: int, step: int) -> None:
        is_first = step == 0
        lookups = PrefixCacheStats(prompt_tokens, prompt_tokens // 2) if is_first else PrefixCacheStats()
        details = IterationDetails(*((1, prompt_tokens, 0, 0) if is_first else (0, 0, 1, 1)), elapsed_ms=4.0)
        timed = details if self.arguments.enable_logging_iteration_details else None
        self.running.labels("fake", "0").set(1)
        self.logger.record(Stats(1, 2, 0.5, lookups, timed), None, engine_idx=0)

    async def encode(
        self, prompt: dict[str, Any], pooling_params: PoolingParams, request_id: str
    ) -> AsyncIterator[Any]:
        assert pooling_params.task == "embed"
        tokens = prompt["prompt_token_ids"]
        await asyncio.sleep(0)
        yield types.SimpleNamespace(outputs=types.SimpleNamespace(data=Tensor([len(tokens), *tokens[:2]])))

    async def reset_prefix_cache(self) -> bool:
        self.resets += 1
        return True

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        self.loras[lora_request.lora_int_id] = lora_request
        return True

    async def remove_lora(self, lora_id: int) -> bool:
        return self.loras.pop(lora_id, None) is not None

    async def sleep(self, level: int = 1) -> None:
        self.sleeping = level

    async def wake_up(self) -> None:
        self.sleeping = None

    def shutdown(self) -> None:
        self.is_shut_down = True


def _output(prompt: list[int], params: SamplingParams, choice: int) -> tuple[list[int], str]:
    history, tokens = list(prompt), list[int]()
    ends = {*(params.stop_token_ids or ())} | (set() if params.ignore_eos else {EOS})
    seed = (params.seed, choice) if params.temperature else (0, 0)
    while len(tokens) < (params.max_tokens or 16):
        # Greedy output follows from the tokens alone, a draw also from how many there were before it.
        draws = len(tokens) if params.temperature else 0
        token = 3 + xxhash.xxh3_64_intdigest(repr((seed, draws, *history)).encode()) % (VOCAB - 3)
        if token in ends and len(tokens) < params.min_tokens:
            token = next(other for other in range(3, VOCAB) if other not in ends)
        tokens.append(token)
        if token in ends:
            return tokens, "stop"
        history.append(token)
    return tokens, "length"


def _part(index: int, output: list[int], reason: str, step: int, params: SamplingParams) -> CompletionOutput:
    token = output[step]
    logprobs = [{token: Logprob(-1.0, 2), 7: Logprob(-0.5, 1)}] if params.logprobs is not None else None
    last = step == len(output) - 1
    return CompletionOutput(index, [token], reason if last else None, logprobs=logprobs)


def _unregister_metrics() -> None:
    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", "").startswith("vllm:"):
            REGISTRY.unregister(collector)


def install(monkeypatch: pytest.MonkeyPatch) -> type[AsyncLLM]:
    """Put the fake in the place of vLLM."""
    AsyncLLM.made = []
    sampling = {"RequestOutputKind": RequestOutputKind, "StructuredOutputsParams": StructuredOutputsParams}
    modules: dict[str, dict[str, Any]] = {
        "vllm": {"AsyncEngineArgs": AsyncEngineArgs, "SamplingParams": SamplingParams, "PoolingParams": PoolingParams},
        "vllm.sampling_params": sampling,
        "vllm.config": {"KVEventsConfig": KVEventsConfig},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.async_llm": {"AsyncLLM": AsyncLLM},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["vllm"].sampling_params = sys.modules["vllm.sampling_params"]  # type: ignore[attr-defined] - a fake
    return AsyncLLM
