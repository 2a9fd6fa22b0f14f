"""Writes down what real vLLM gives, for the tests that run everywhere: ``python record_vllm.py OUT.json``.

Runs with the interpreter of ``dyn slow vllm``'s environment.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
import vllm
import zmq
from prometheus_client import REGISTRY
from vllm import SamplingParams
from vllm.config import KVEventsConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM

MODEL = str(resources.files("dynamo_worker") / "models" / "tinylm")
PROMPT = [3 + 7 * index % 900 for index in range(70)]


class Statistics:
    """A stat logger that keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def __call__(self, *_: Any) -> Statistics:
        return self

    def record(self, scheduler_stats: Any = None, *_: Any, **__: Any) -> None:
        if scheduler_stats is not None:
            self.heard.append({name: plain(getattr(scheduler_stats, name)) for name in STATS})

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


STATS = (
    "num_running_reqs",
    "num_waiting_reqs",
    "num_skipped_waiting_reqs",
    "kv_cache_usage",
    "prefix_cache_stats",
    "iteration_details",
)


def plain(value: Any) -> Any:
    """Return a value as JSON has it; unknown objects by the attributes that the adapter reads."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def output(item: Any) -> dict[str, Any]:
    fields = ("request_id", "finished", "num_cached_tokens", "kv_transfer_params")
    return {**{name: plain(getattr(item, name)) for name in fields}, "outputs": plain(item.outputs)}


def refusal(**fields: Any) -> dict[str, Any]:
    try:
        SamplingParams(**fields)
    except Exception as error:
        return {"fields": fields, "classes": [kind.__name__ for kind in type(error).__mro__], "message": str(error)}
    raise AssertionError(f"vLLM takes {fields}")


async def record(folder: Path) -> dict[str, Any]:
    events = KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=f"ipc://{folder}/ev")
    arguments = AsyncEngineArgs(
        model=MODEL,
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        num_gpu_blocks_override=8,
        max_model_len=200,
        kv_events_config=events,
        disable_log_stats=True,
        enable_logging_iteration_details=True,
    )
    statistics = Statistics()
    subscriber = zmq.Context.instance().socket(zmq.SUB)
    subscriber.setsockopt(zmq.SUBSCRIBE, b"")
    subscriber.connect(events.endpoint)
    llm = AsyncLLM.from_engine_args(arguments, stat_loggers=[statistics])
    found: list[Any] = []
    base = {"max_tokens": 4, "detokenize": False, "output_kind": RequestOutputKind.DELTA, "ignore_eos": True}
    runs: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0.0, "logprobs": 2},
        "again": {"temperature": 0.0, "logprobs": 2},
        "choices": {"temperature": 1.0, "seed": 7, "n": 2},
        "stop": {"temperature": 0.0, "stop_token_ids": list(range(2112))},
    }
    for name, fields in runs.items():
        params = SamplingParams(**{**base, **fields})
        found.append({"name": name, "params": fields, "results": []})
        async for item in llm.generate({"prompt_token_ids": PROMPT}, params, name):
            found[-1]["results"].append(output(item))
    await llm.reset_prefix_cache()
    async for _ in llm.generate({"prompt_token_ids": PROMPT[::-1]}, SamplingParams(**base, temperature=0.0), "last"):
        pass
    messages: list[list[str]] = []
    while subscriber.poll(2000):
        messages.append([frame.hex() for frame in subscriber.recv_multipart()])
    metrics = sorted(family.name for family in REGISTRY.collect() if family.name.startswith("vllm:"))
    llm.shutdown()
    return {
        "version": vllm.__version__,
        "prompt": PROMPT,
        "requests": found,
        "kv_events": messages,
        "statistics": statistics.heard,
        "metrics": metrics,
        "refusals": [refusal(temperature=-1.0), refusal(temperature=0.0, n=3)],
        "sampling_fields": sorted(SamplingParams.__struct_fields__),
        "constraint_fields": sorted(field.name for field in dataclasses.fields(StructuredOutputsParams) if field.init),
        "argument_fields": sorted(field.name for field in dataclasses.fields(AsyncEngineArgs)),
    }


def main() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        recorded = asyncio.run(record(Path(folder)))
    Path(sys.argv[1]).write_text(json.dumps(recorded, indent=1) + "\n")
    print(f"vLLM {recorded['version']}: {len(recorded['kv_events'])} KV event messages", msgspec.__version__)


if __name__ == "__main__":
    main()
