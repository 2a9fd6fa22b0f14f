"""The parts of TensorRT-LLM 1.2's LLM API that the adapter uses, written by hand from its public source.

It is not recorded; ``tests/gpu/real_trtllm.py`` runs the adapter on the real one. As there: one object with all tokens
so far is yielded again and again; greedy is what has no ``top_p``; a stop token stays only if asked for;
``min_tokens`` holds back the one end token; zero log-probabilities are none.
"""

from __future__ import annotations

import asyncio
import sys
import types
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import xxhash

VOCAB = 1000
EOS = 2


@dataclass(kw_only=True)
class GuidedDecodingParams:
    json: Any = None
    regex: str | None = None
    grammar: str | None = None
    json_object: bool = False
    structural_tag: str | None = None


@dataclass(kw_only=True)
class SamplingParams:
    end_id: int | None = None
    pad_id: int | None = None
    max_tokens: int = 32
    stop_token_ids: list[int] | None = None
    bad_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    n: int = 1
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    temperature: float | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    min_p: float | None = None
    logprobs: int | None = None
    guided_decoding: GuidedDecodingParams | None = None
    ignore_eos: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True

    @property
    def is_greedy(self) -> bool:
        return self.top_k in (None, 1) and self.top_p in (None, 0.0)


@dataclass(kw_only=True)
class KvCacheConfig:
    enable_block_reuse: bool = True
    tokens_per_block: int = 32
    event_buffer_max_size: int = 0


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None


@dataclass
class CompletionOutput:
    index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class RequestOutput:
    def __init__(self, llm: LLM, prompt: list[int], params: SamplingParams) -> None:
        self.cached_tokens = len(prompt) // 2
        self.outputs = [CompletionOutput(0)]
        self.is_aborted = False
        self._llm = llm
        self._params = params
        self._tokens, self._finish = _output(prompt, params)

    def abort(self) -> None:
        self.is_aborted = True
        self._llm.aborted += 1

    def __aiter__(self) -> RequestOutput:
        return self

    async def __anext__(self) -> RequestOutput:
        (output,) = self.outputs
        if output.finish_reason is not None:
            raise StopAsyncIteration
        await asyncio.sleep(0)
        count = len(output.token_ids) + 1
        output.token_ids = self._tokens[:count]
        if self._params.logprobs:
            output.logprobs = [{token: Logprob(-1.0, 2), 7: Logprob(-0.5, 1)} for token in output.token_ids]
        if count >= len(self._tokens):
            output.finish_reason = self._finish
        self._llm.step(count)
        return self


def _output(prompt: list[int], params: SamplingParams) -> tuple[list[int], str]:
    history, tokens = list(prompt), list[int]()
    seed = 0 if params.is_greedy else params.seed
    end = None if params.ignore_eos else params.end_id
    stops = params.stop_token_ids or []
    while len(tokens) < params.max_tokens:
        token = 3 + xxhash.xxh3_64_intdigest(repr((seed, *history)).encode()) % (VOCAB - 3)
        forbidden = {*(params.bad_token_ids or ()), *({end} if len(tokens) < (params.min_tokens or 0) else ())}
        if token in forbidden:
            token = next(other for other in range(3, VOCAB) if other not in forbidden)
        if token in stops and not params.include_stop_str_in_output:
            return tokens, "stop"
        tokens.append(token)
        if token == end or token in stops:
            return tokens, "stop"
        history.append(token)
    return tokens, "length"


class LLM:
    made: list[LLM]

    def __init__(self, model: str, **arguments: Any) -> None:
        if unknown := set(arguments) - {
            "enable_iter_perf_stats",
            "guided_decoding_backend",
            "kv_cache_config",
            "max_seq_len",
            "max_batch_size",
        }:
            raise ValueError(f"LLM got invalid argument: {sorted(unknown)[0]}")
        self.args = types.SimpleNamespace(
            max_seq_len=arguments.get("max_seq_len"),
            max_batch_size=arguments.get("max_batch_size", 8),
            max_num_tokens=8192,
            kv_cache_config=arguments["kv_cache_config"],
        )
        self.arguments = arguments
        self.calls: list[tuple[list[int], SamplingParams, dict[str, Any]]] = []
        self.aborted = 0
        self.is_shut_down = False
        self.statistics: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        LLM.made.append(self)

    def generate_async(
        self, inputs: list[int], sampling_params: SamplingParams, *, streaming: bool, **options: Any
    ) -> RequestOutput:
        assert streaming
        if len(inputs) > 8192:
            raise ValueError("The sum of prompt length should not exceed max_num_tokens")
        self.calls.append((inputs, sampling_params, options))
        return RequestOutput(self, inputs, sampling_params)

    def step(self, count: int) -> None:
        is_first = count == 1
        batch = {"numContextRequests": int(is_first), "numCtxTokens": 3 * is_first, "numGenRequests": int(not is_first)}
        cache = {"maxNumBlocks": 96, "usedNumBlocks": 4, "tokensPerBlock": 32, "cacheHitRate": 0.25}
        self.statistics.put_nowait(
            {
                "iter": count,
                "iterLatencyMS": 4.0,
                "numActiveRequests": 1,
                "numQueuedRequests": 2,
                "kvCacheStats": cache,
                "inflightBatchingStats": batch,
            }
        )

    def get_stats_async(self, timeout: float | None = 2) -> AsyncIterator[dict[str, Any]]:
        return _until_quiet(self.statistics, timeout)

    def get_kv_cache_events_async(self, timeout: float | None = 2) -> AsyncIterator[dict[str, Any]]:
        return _until_quiet(self.events, timeout)

    def shutdown(self) -> None:
        self.is_shut_down = True


async def _until_quiet(queue: asyncio.Queue[dict[str, Any]], timeout: float | None) -> AsyncIterator[dict[str, Any]]:
    while True:
        try:
            yield await asyncio.wait_for(queue.get(), timeout)
        except TimeoutError:
            return


def install(monkeypatch: pytest.MonkeyPatch) -> type[LLM]:
    """Put the stand-in in the place of TensorRT-LLM."""
    LLM.made = []
    api = {"GuidedDecodingParams": GuidedDecodingParams, "KvCacheConfig": KvCacheConfig}
    for name, content in {
        "tensorrt_llm": {"LLM": LLM, "SamplingParams": SamplingParams},
        "tensorrt_llm.llmapi": api,
    }.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    vars(sys.modules["tensorrt_llm"])["llmapi"] = sys.modules["tensorrt_llm.llmapi"]
    return LLM
