"""KV through real NIXL, over UCX between memory of one machine: name this file to pytest where NIXL is installed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dynamo_core.planes import CallOptions
from dynamo_core.requests import SamplingOptions, StopConditions
from dynamo_core.wire import GENERATE_REQUEST
from dynamo_worker import ReferenceEngine
from dynamo_worker._metrics import KV_TRANSFER_BLOCKS_TOTAL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PROMPT = [100 + 7 * i % 900 for i in range(701)]


@pytest.mark.parametrize("form", ["pull", "bootstrap"])
async def test_the_output_equals_aggregated_serving(process: Any, kit: Any, form: str) -> None:
    await process.worker(ReferenceEngine.from_args([]), role="prefill", kv_nixl=True, kv_shared_memory=False)
    options = {"remote_prefill_threshold_tokens": 0, "local_prefill": False, "kv_shared_memory": False}
    decode = await process.worker(
        ReferenceEngine.from_args([]), role="decode", kv_nixl=True, kv_handoff=form, **options
    )
    alone = await process.worker(ReferenceEngine.from_args([]), worker_component="alone")
    await process.clock.settle()
    stop = StopConditions(max_tokens=40, ignore_eos=True)
    request = kit.request(prompt=PROMPT, stop=stop, sampling=SamplingOptions(temperature=0.8, seed=5))
    apart = await ask(process, kit, decode, request)
    assert apart.error is None
    assert apart.chunks[-1].usage.cached_tokens == 688
    assert apart.tokens == (await ask(process, kit, alone, request)).tokens
    assert process.metric(KV_TRANSFER_BLOCKS_TOTAL, direction="received") == 43
    segment = decode._role.engine._preparation._puller._nixl.take()
    assert segment is not None
    assert any(segment.view), "the blocks went through NIXL's memory"


async def ask(process: Any, kit: Any, worker: Any, request: Any) -> Any:
    reply = kit.Reply()
    options = CallOptions(request.request_id)
    payload = GENERATE_REQUEST.encode(request)
    reply.call = await process.plane.open(worker.address, worker.endpoint, payload, reply, options)
    async with asyncio.timeout(60):
        while not reply.done.is_set():
            await asyncio.sleep(0.001)
            await process.clock.advance(0.0002)  # the worker looks at a transfer by its own clock
    return reply
