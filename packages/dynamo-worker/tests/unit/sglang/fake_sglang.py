"""The parts of SGLang 0.5's ``Engine`` that the adapter uses, written by hand from its public source, not recorded.

``tests/gpu/real_sglang.py`` runs the adapter on the real one.
"""

from __future__ import annotations

import asyncio
import sys
import types
from collections.abc import AsyncIterator
from typing import Any

import pytest
import xxhash

VOCAB = 1000
EOS = 2


class Engine:
    made: list[Engine]
    incremental = False

    def __init__(self, **arguments: Any) -> None:
        if "no_such_argument" in arguments:
            raise TypeError("ServerArgs.__init__() got an unexpected keyword argument 'no_such_argument'")
        namespace = types.SimpleNamespace
        self.arguments = arguments
        self.server_args = namespace(page_size=16, disable_radix_cache=False, max_running_requests=8, dp_size=1)
        self._scheduler_init_result = namespace(scheduler_infos=[{"max_total_num_tokens": 1600}])
        self.aborted: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.flushed = 0
        self.is_shut_down = False
        self.tokenizer_manager = namespace(
            model_config=namespace(context_len=600), abort_request=self._abort, flush_cache=self._flush
        )
        Engine.made.append(self)

    def _abort(self, rid: str = "", abort_all: bool = False) -> None:
        self.aborted.append(rid)

    async def _flush(self) -> None:
        self.flushed += 1

    async def async_generate(self, **call: Any) -> AsyncIterator[dict[str, Any]]:
        self.calls.append(call)
        assert call["stream"] is True
        return self._generate(call["input_ids"], call["sampling_params"], call)

    async def _generate(self, prompt: list[int], params: dict[str, Any], call: dict[str, Any]) -> Any:
        if params["temperature"] < 0:
            raise ValueError("temperature must be non-negative")
        tokens, finish = _output(prompt, params)
        seen = 0
        logprobs = [(-1.0, token, None) for token in tokens]
        tops = [[(-0.5, 7, None), (-1.0, token, None)] for token in tokens]
        for count in range(1, len(tokens) + 1) if tokens else [0]:
            await asyncio.sleep(0)
            first = seen if self.incremental else 0
            meta: dict[str, Any] = {
                "id": call["rid"],
                "completion_tokens": count,
                "prompt_tokens": len(prompt),
                "cached_tokens": len(prompt) // 2,
                "finish_reason": finish if count == len(tokens) else None,
            }
            if call.get("return_logprob"):
                meta |= {"output_token_logprobs": logprobs[first:count], "output_top_logprobs": tops[first:count]}
            seen = count
            yield {"text": "", "output_ids": tokens[first:count], "meta_info": meta}

    def shutdown(self) -> None:
        self.is_shut_down = True


def _output(prompt: list[int], params: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
    history, tokens = list(prompt), list[int]()
    ends = {*params["stop_token_ids"]} | (set() if params["ignore_eos"] else {EOS})
    seed = params.get("sampling_seed") if params["temperature"] else 0
    while len(tokens) < params["max_new_tokens"]:
        token = 3 + xxhash.xxh3_64_intdigest(repr((seed, *history)).encode()) % (VOCAB - 3)
        if token in ends and len(tokens) < params["min_new_tokens"]:
            token = next(other for other in range(3, VOCAB) if other not in ends)
        if token in ends:
            return tokens, {"type": "stop", "matched": token}
        tokens.append(token)
        history.append(token)
    return tokens, {"type": "length", "length": len(tokens)}


def install(monkeypatch: pytest.MonkeyPatch) -> type[Engine]:
    """Put the stand-in in the place of SGLang."""
    Engine.made = []
    module = types.ModuleType("sglang")
    vars(module)["Engine"] = Engine
    monkeypatch.setitem(sys.modules, "sglang", module)
    return Engine
