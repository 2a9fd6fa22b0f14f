"""One process that plays 64 workers, over TCP, files and ZMQ."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

from dynamo_core import plugins
from dynamo_core.clock import SystemClock
from dynamo_core.discovery import INSTANCES_PREFIX, Instance
from dynamo_core.events import BlockStored, KvEventQuery
from dynamo_core.ids import WorkerId
from dynamo_core.planes import RequestPlane
from dynamo_core.requests import GenerateRequest, StopConditions
from dynamo_core.streams import call_unary, open_stream
from dynamo_core.tokens import pack_tokens, token_count
from dynamo_core.wire import GENERATE_CHUNK, GENERATE_REQUEST, INSTANCE, KV_EVENT_BATCH, KV_EVENT_QUERY
from dynamo_integration_tests.stack import DynamoProcess

WORKERS = 64
BLOCK_TOKENS = 16


async def test_one_process_plays_64_workers(tmp_path: Path) -> None:
    """Each has an address, an id, output and KV events of its own; all leave when the process is told to stop."""
    planes = ["--discovery", f"file://{tmp_path}", "--request-plane", "tcp://127.0.0.1:0"]
    mock = ["--engine", "mock", "--num-workers", str(WORKERS), "--kv-block-size", str(BLOCK_TOKENS)]
    clock = SystemClock()
    plane = plugins.load("request_planes", "tcp")("tcp://127.0.0.1:0", clock=clock, options={})
    discovery = plugins.load("discoveries", "file")(f"file://{tmp_path}", clock=clock, options={})
    await plane.start()
    await discovery.start()
    try:
        with DynamoProcess(["worker", *planes, "--event-bus", "zmq://127.0.0.1:0", *mock]) as process:
            async with asyncio.timeout(60):
                while process.output.count("worker ready") < WORKERS:
                    await asyncio.sleep(0.05)
            found = [INSTANCE.decode(record.value) for record in await discovery.list(INSTANCES_PREFIX)]
            generate = {item.instance_id: item for item in found if item.endpoint.endpoint == "generate"}
            queries = {item.instance_id: item for item in found if item.endpoint.endpoint == "worker_kv_indexer_query"}
            assert len(generate) == len(queries) == WORKERS
            numbers = dict(zip(sorted(generate), range(WORKERS), strict=True))
            async with asyncio.timeout(60):
                await asyncio.gather(*(_ask(plane, item, numbers[name]) for name, item in generate.items()))
                stored = await asyncio.gather(*(_stored_blocks(plane, item) for item in queries.values()))
            wanted = {name: 1 + number % 4 for name, number in numbers.items()}
            assert dict(zip(queries, stored, strict=True)) == wanted, "each worker tells of its own prompt's blocks"
            assert await asyncio.to_thread(process.interrupt, signal.SIGTERM) == 0, process.output
            assert await discovery.list(INSTANCES_PREFIX) == []
    finally:
        await discovery.close()
        await plane.close()


async def _ask(plane: RequestPlane, instance: Instance, number: int) -> None:
    prompt = [number + 3] * ((1 + number % 4) * BLOCK_TOKENS)
    stop = StopConditions(max_tokens=5, ignore_eos=True)
    payload = GENERATE_REQUEST.encode(GenerateRequest(f"r{number}", "mock", pack_tokens(prompt), stop=stop))
    async with await open_stream(plane, instance.address, instance.endpoint, payload) as stream:
        chunks = [GENERATE_CHUNK.decode(item) async for item in stream]
    assert sum(token_count(chunk.token_ids) for chunk in chunks) == 5


async def _stored_blocks(plane: RequestPlane, instance: Instance) -> int:
    payload = KV_EVENT_QUERY.encode(KvEventQuery(WorkerId(instance.instance_id)))
    batch = KV_EVENT_BATCH.decode(await call_unary(plane, instance.address, instance.endpoint, payload))
    assert batch.worker.instance_id == instance.instance_id
    return sum(len(event) for event in batch.events if isinstance(event, BlockStored))
