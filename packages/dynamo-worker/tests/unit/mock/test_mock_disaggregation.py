"""The mock in prefill and decode roles: the real protocol, and the time that moving KV takes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dynamo_core.errors import ConfigurationError, InvalidRequestError
from dynamo_core.ids import WorkerId
from dynamo_core.kv import BlockDescriptor
from dynamo_core.planes import CallOptions
from dynamo_core.requests import GenerateRequest
from dynamo_core.wire import GENERATE_REQUEST
from dynamo_worker import MockEngine, MockSettings
from dynamo_worker._metrics import KV_LEASES, KV_TRANSFER_BLOCKS_TOTAL, REMOTE_PREFILLS_TOTAL
from dynamo_worker._mock._timing import prefill_ms

BLOCK = 16
PROMPT = list(range(100, 100 + 10 * BLOCK + 1))
FIT = {"kv_block_size": BLOCK, "total_kv_blocks": 512}


async def pair(process: Any, *, threshold_tokens: int = 0, **decode: Any) -> tuple[MockEngine, Any]:
    await process.worker(MockEngine(MockSettings(**FIT)), role="prefill")
    engine = MockEngine(MockSettings(**FIT | decode))
    worker = await process.worker(engine, role="decode", remote_prefill_threshold_tokens=threshold_tokens)
    await process.clock.settle()
    return engine, worker


async def ask(process: Any, kit: Any, worker: Any, request: GenerateRequest) -> Any:
    reply = kit.Reply()
    options = CallOptions(request.request_id)
    payload = GENERATE_REQUEST.encode(request)
    reply.call = await process.plane.open(worker.address, worker.endpoint, payload, reply, options)
    await process.clock.run(reply.done.wait())
    assert reply.error is None
    return reply


async def test_the_output_equals_aggregated_serving(process: Any, kit: Any) -> None:
    _, decode = await pair(process)
    alone = await process.worker(MockEngine(MockSettings(**FIT)), worker_component="alone")
    request = kit.request(prompt=PROMPT, max_tokens=20)
    apart = await ask(process, kit, decode, request)
    assert apart.tokens == (await ask(process, kit, alone, request)).tokens
    assert apart.chunks[-1].usage.cached_tokens == 10 * BLOCK
    assert process.metric(KV_TRANSFER_BLOCKS_TOTAL, direction="received") == 10
    assert process.metric(REMOTE_PREFILLS_TOTAL, outcome="remote") == 1
    assert process.metric(KV_LEASES) == 0


@pytest.mark.parametrize("speedup", [1.0, 4.0])
async def test_a_hand_over_takes_the_time_of_its_bytes(process: Any, kit: Any, speedup: float) -> None:
    """160 tokens of 1 MB each over 1 GB/s are 160 ms, after the other worker's prefill and before one token here."""
    _, decode = await pair(process, kv_transfer_bandwidth_gb_s=1.0, kv_bytes_per_token=1_000_000, speedup_ratio=speedup)
    began = process.clock.monotonic()
    await ask(process, kit, decode, kit.request(prompt=PROMPT, max_tokens=1))
    took = process.clock.monotonic() - began
    expected = prefill_ms(len(PROMPT)) / 1000 + (0.160 + prefill_ms(1) / 1000) / speedup
    assert took == pytest.approx(expected, rel=0.02)


async def test_only_missing_blocks_take_time(process: Any, kit: Any) -> None:
    _, decode = await pair(process, kv_transfer_bandwidth_gb_s=1.0, kv_bytes_per_token=1_000_000)
    await ask(process, kit, decode, kit.request("first", PROMPT[: 8 * BLOCK + 1], max_tokens=1))
    began = process.clock.monotonic()
    await ask(process, kit, decode, kit.request("second", PROMPT, max_tokens=1))
    took = process.clock.monotonic() - began
    # The prefill worker computes 33 tokens, two blocks of 16 MB move, and one token is computed here.
    assert took == pytest.approx((prefill_ms(33) + 32 + prefill_ms(1)) / 1000, rel=0.02)


async def test_transfers_share_the_link(process: Any, kit: Any) -> None:
    engine, _ = await pair(process, kv_transfer_bandwidth_gb_s=1.0, kv_bytes_per_token=1_000_000)
    moves = [asyncio.ensure_future(engine.import_blocks(*moved(first))) for first in (1, 101)]
    await process.clock.advance(0.017)
    assert [move.done() for move in moves] == [True, False]
    await process.clock.advance(0.016)
    assert [move.result() for move in moves] == [1, 1]


async def test_without_bandwidth_nothing_takes_time(process: Any, kit: Any) -> None:
    engine, _ = await pair(process, kv_transfer_bandwidth_gb_s=0.0)
    before = process.clock.monotonic()
    assert await engine.import_blocks(*moved(1, count=4)) == 4
    assert process.clock.monotonic() == before
    assert await engine.match_blocks([1, 2, 3, 4, 5]) == 4


async def test_bytes_of_another_block_are_noticed(process: Any) -> None:
    engine, _ = await pair(process)
    blocks, data = moved(1, count=2)
    with pytest.raises(InvalidRequestError, match="are not its own"):
        await engine.import_blocks(blocks, data[::-1])
    with pytest.raises(InvalidRequestError, match="1 pieces of KV bytes for 2 blocks"):
        await engine.import_blocks(blocks, data[:1])


async def test_a_block_without_its_parent_is_not_taken(process: Any, kit: Any) -> None:
    engine, _ = await pair(process, kv_transfer_bandwidth_gb_s=0.0)
    blocks, data = moved(1, count=3)
    assert await engine.import_blocks(blocks[1:], data[1:]) == 0
    assert await engine.import_blocks(blocks[:1], data[:1]) == 1
    assert await engine.import_blocks(blocks[1:], data[1:]) == 2


async def test_no_more_blocks_come_than_fit(process: Any, kit: Any) -> None:
    engine, _ = await pair(process, kv_transfer_bandwidth_gb_s=0.0, total_kv_blocks=3)
    assert await engine.import_blocks(*moved(1, count=5)) == 3


async def test_moved_blocks_are_reported(process: Any, kit: Any) -> None:
    _, decode = await pair(process)
    await ask(process, kit, decode, kit.request(prompt=PROMPT, max_tokens=1))
    from dynamo_core.events import BlockStored, KvEventQuery
    from dynamo_core.streams import call_unary
    from dynamo_core.wire import KV_EVENT_BATCH, KV_EVENT_QUERY

    (mine,) = [
        instance
        for instance in await process.instances()
        if instance.endpoint.endpoint == "worker_kv_indexer_query" and instance.instance_id == decode.instance_id
    ]
    query = KV_EVENT_QUERY.encode(KvEventQuery(WorkerId(decode.instance_id)))
    batch = KV_EVENT_BATCH.decode(await call_unary(process.plane, mine.address, mine.endpoint, query))
    assert sum(len(event) for event in batch.events if isinstance(event, BlockStored)) == 10


async def test_a_block_manager_is_refused(process: Any) -> None:
    from dynamo_core.clock import SystemClock
    from dynamo_core.engine import EngineContext
    from dynamo_core.ids import InstanceId
    from dynamo_core.telemetry import Metrics

    connector: Any = object()
    with pytest.raises(ConfigurationError, match="--kv-connector"):
        await MockEngine().start(EngineContext(InstanceId(1), SystemClock(), Metrics(), kv_connector=connector))


def moved(first: int, *, count: int = 1) -> tuple[list[BlockDescriptor], list[bytes]]:
    """Blocks of a sequence of its own, with the bytes that stand for them."""
    hashes = range(first, first + count)
    blocks = [
        BlockDescriptor(value, value, value - 1 if position else None, position)
        for position, value in enumerate(hashes)
    ]
    return blocks, [value.to_bytes(8, "little") * (2 * BLOCK) for value in hashes]
