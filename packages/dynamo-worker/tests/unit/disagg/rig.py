"""A prefill and a decode worker on the reference engine, and prefill workers that misbehave."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from dynamo_core.discovery import MODELS_PREFIX
from dynamo_core.enums import WorkerType
from dynamo_core.ids import EndpointId
from dynamo_core.kv import BlockLayout
from dynamo_core.planes import CallOptions
from dynamo_core.requests import PrefillResult, SamplingOptions, StopConditions
from dynamo_core.wire import GENERATE_REQUEST
from dynamo_worker import ReferenceEngine
from dynamo_worker._metrics import (
    KV_TRANSFER_BLOCKS_TOTAL,
)

ENGINE = ["--num-blocks", "64", "--max-model-len", "256", "--block-size", "4"]
PROMPT = [100 + 7 * i % 900 for i in range(90)]
STOP = StopConditions(max_tokens=12, ignore_eos=True)
SAMPLED = SamplingOptions(temperature=0.9, seed=11)


def engine() -> ReferenceEngine:
    return ReferenceEngine.from_args(ENGINE)


class Pair:
    """A prefill worker, a decode worker, and what an aggregated one says to the same request."""

    def __init__(self, process: Any, kit: Any) -> None:
        self.process = process
        self.kit = kit

    async def start(self, *, prefill: dict[str, Any] | None = None, decode: dict[str, Any] | None = None) -> Pair:
        self.prefill_engine, self.decode_engine = engine(), engine()
        if prefill is not None:
            self.prefill = await self.process.worker(self.prefill_engine, role="prefill", **prefill)
        self.decode = await self.process.worker(self.decode_engine, role="decode", **(decode or {}))
        await self.process.clock.settle()
        return self

    def request(self, request_id: str = "r1", prompt: Any = PROMPT, **rest: Any) -> Any:
        return self.kit.request(request_id, prompt, **{"stop": STOP, "sampling": SAMPLED, **rest})

    async def call(self, worker: Any, request: Any) -> Any:
        reply = self.kit.Reply()
        options = CallOptions(request.request_id)
        payload = GENERATE_REQUEST.encode(request)
        reply.call = await self.process.plane.open(worker.address, worker.endpoint, payload, reply, options)
        return reply

    async def ask(self, worker: Any, request: Any) -> Any:
        reply = await self.call(worker, request)
        await asyncio.wait_for(reply.done.wait(), 20)
        return reply

    async def hand_over(self, request: Any) -> PrefillResult:
        reply = await self.ask(self.prefill, request)
        assert reply.error is None
        (chunk,) = reply.chunks
        assert chunk.handoff is not None
        return chunk.handoff

    async def aggregated(self, request: Any) -> list[int]:
        alone = engine()
        worker = await self.process.worker(alone, worker_component="alone")
        reply = await self.ask(worker, msgspec.structs.replace(request, handoff=None))
        return reply.tokens

    def metric(self, name: str, **labels: str) -> float:
        return self.process.metric(name, **labels)


def received(pair: Pair) -> float:
    return pair.metric(KV_TRANSFER_BLOCKS_TOTAL, direction="received")


class SilentPrefill:
    """A prefill worker that takes requests and never answers."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.left = asyncio.Event()

    async def register(self, process: Any, place: dict[str, Any] | None = None) -> None:
        from dynamo_core.cards import ModelCard, ModelRuntimeConfig
        from dynamo_core.discovery import Instance, ModelRecord
        from dynamo_core.wire import INSTANCE, MODEL_RECORD

        endpoint = EndpointId("test", "prefill", "generate")
        served = await process.plane.serve(endpoint, self._serve)
        instance = Instance(endpoint, 99, served.address)
        runtime = ModelRuntimeConfig(disaggregated_endpoint=place)
        card = ModelCard("tinylm", kv_block_size=4, worker_type=WorkerType.PREFILL, runtime_config=runtime)
        record = ModelRecord(endpoint, 99, card)
        await process.discovery.put(instance.key, INSTANCE.encode(instance))
        await process.discovery.put(record.key, MODEL_RECORD.encode(record))
        assert record.key.startswith(MODELS_PREFIX)
        await process.clock.settle()

    async def _serve(self, payload: bytes, context: Any, sink: Any) -> None:
        self.asked.set()
        try:
            await context.wait_stopped()
        finally:
            self.left.set()


async def serve_items(process: Any, items: list[bytes]) -> str:
    async def answer(payload: bytes, context: Any, sink: Any) -> None:
        for item in items:
            sink.send(item)

    served = await process.plane.serve(EndpointId("test", "broken", "worker_kv_transfer"), answer)
    return served.address


def engine_block_bytes() -> int:
    from dynamo_worker._reference._config import ModelConfig
    from dynamo_worker._reference._settings import BUNDLED_MODELS

    config = ModelConfig.load(BUNDLED_MODELS / "tinylm")
    return BlockLayout(config.num_layers, 4, config.num_kv_heads, config.head_dim).block_bytes
