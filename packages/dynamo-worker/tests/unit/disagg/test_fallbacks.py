"""When the prompt does not come from elsewhere: it is computed here, or the error is typed; nothing hangs."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from rig import PROMPT, Pair, SilentPrefill, engine, received, serve_items

from dynamo_core.enums import FinishReason
from dynamo_core.errors import (
    BackendProtocolError,
    DeadlineExceededError,
    InvalidRequestError,
    UnavailableError,
)
from dynamo_core.ids import EndpointId, WorkerId
from dynamo_core.kv import BlockLayout, TransferRequest
from dynamo_core.requests import PrefillResult
from dynamo_core.streams import open_stream
from dynamo_core.wire import TRANSFER_REQUEST
from dynamo_worker._disagg.handoff import HEAD_ENCODER, KvHandoff, TransferHead
from dynamo_worker._metrics import (
    KV_LEASES,
    KV_LEASES_EXPIRED_TOTAL,
    REMOTE_PREFILLS_TOTAL,
)


async def test_below_the_threshold_the_prompt_is_computed_here(pair: Pair) -> None:
    await pair.start(prefill={}, decode={"remote_prefill_threshold_tokens": 50})
    await pair.ask(pair.decode, pair.request("short", PROMPT[:49]))
    assert received(pair) == 0
    await pair.ask(pair.decode, pair.request("mostly cached", PROMPT[:90]))
    assert received(pair) == 0, "only 42 of its tokens are uncached"
    assert pair.metric(REMOTE_PREFILLS_TOTAL, outcome="short") == 1


async def test_without_a_prefill_worker_the_prompt_is_computed_here(pair: Pair) -> None:
    await pair.start(decode={"remote_prefill_threshold_tokens": 0})
    reply = await pair.ask(pair.decode, pair.request())
    assert reply.tokens == await pair.aggregated(pair.request())
    assert pair.metric(REMOTE_PREFILLS_TOTAL, outcome="no_peer") == 1


async def test_without_a_prefill_worker_and_fallback_it_is_unavailable(pair: Pair) -> None:
    await pair.start(decode={"remote_prefill_threshold_tokens": 0, "local_prefill": False})
    reply = await pair.ask(pair.decode, pair.request())
    assert isinstance(reply.error, UnavailableError)
    assert reply.error.reason == "backend.worker_unavailable"


async def test_a_dead_prefill_worker_is_left_alone(pair: Pair) -> None:
    """Its record is still in discovery: the first request finds out, the next does not ask it again."""
    await pair.start(prefill={}, decode={"remote_prefill_threshold_tokens": 0})
    await pair.prefill._served.close()
    reply = await pair.ask(pair.decode, pair.request())
    assert reply.tokens == await pair.aggregated(pair.request())
    await pair.ask(pair.decode, pair.request("next", PROMPT[10:]))
    assert pair.metric(REMOTE_PREFILLS_TOTAL, outcome="no_peer") == 2


async def test_a_second_prefill_worker_takes_over(pair: Pair) -> None:
    await pair.start(prefill={}, decode={"remote_prefill_threshold_tokens": 0})
    second = await pair.process.worker(engine(), role="prefill")
    await pair.process.clock.settle()
    await pair.prefill._served.close()
    for number in range(3):
        await pair.ask(pair.decode, pair.request(f"r{number}", [token + number for token in PROMPT]))
    assert received(pair) == 66
    assert second.status()["kv_transfers"] == 0


async def test_an_expired_lease_costs_a_computation(pair: Pair) -> None:
    await pair.start(prefill={"kv_lease_s": 4.0}, decode={})
    request = pair.request()
    handoff = await pair.hand_over(request)
    assert pair.prefill.status()["kv_transfers"] == 1
    assert not pair.prefill.status()["safe_to_delete"]
    await pair.process.clock.advance(5.0)
    async with asyncio.timeout(10):
        while pair.metric(KV_LEASES):
            await asyncio.sleep(0)
    assert pair.metric(KV_LEASES_EXPIRED_TOTAL) == 1
    await pair.prefill_engine.clear_kv_blocks()
    reply = await pair.ask(pair.decode, msgspec.structs.replace(request, handoff=handoff))
    assert reply.tokens == await pair.aggregated(request)
    assert received(pair) == 0


async def test_leased_blocks_survive_pressure(pair: Pair) -> None:
    await pair.start(prefill={}, decode={})
    handoff = await pair.hand_over(pair.request())
    for number in range(2):
        await pair.ask(pair.prefill, pair.request(f"other{number}", [number * 13 + 5] * 17))
    await pair.prefill_engine.clear_kv_blocks()
    await pair.ask(pair.decode, msgspec.structs.replace(pair.request(), handoff=handoff))
    assert received(pair) == 22


async def test_leases_are_bounded_by_blocks(pair: Pair) -> None:
    """Half of the 64 blocks at most: two prompts of 22 blocks do not fit, the older one goes."""
    await pair.start(prefill={}, decode={})
    first = await pair.hand_over(pair.request("first"))
    await pair.hand_over(pair.request("second", [token + 1 for token in PROMPT]))
    assert pair.metric(KV_LEASES) == 1
    assert pair.metric(KV_LEASES_EXPIRED_TOTAL) == 1
    reply = await pair.ask(pair.decode, msgspec.structs.replace(pair.request("first"), handoff=first))
    assert reply.error is None


async def test_a_slow_prefill_worker_does_not_hang_the_request(pair: Pair, kit: Any) -> None:
    slow = SilentPrefill()
    await pair.start(decode={"remote_prefill_threshold_tokens": 0, "prefill_timeout_s": 3.0})
    await slow.register(pair.process)
    request = pair.request()
    expected = await pair.aggregated(request)
    reply = await pair.call(pair.decode, request)
    await asyncio.wait_for(slow.asked.wait(), 10)
    await pair.process.clock.advance(3.5)
    await asyncio.wait_for(reply.done.wait(), 20)
    assert reply.tokens == expected
    await asyncio.wait_for(slow.left.wait(), 10)
    assert pair.metric(REMOTE_PREFILLS_TOTAL, outcome="timeout") == 1


async def test_without_fallback_a_slow_prefill_worker_is_a_typed_error(pair: Pair) -> None:
    slow = SilentPrefill()
    await pair.start(decode={"remote_prefill_threshold_tokens": 0, "prefill_timeout_s": 3.0, "local_prefill": False})
    await slow.register(pair.process)
    reply = await pair.call(pair.decode, pair.request())
    await asyncio.wait_for(slow.asked.wait(), 10)
    await pair.process.clock.advance(3.5)
    await asyncio.wait_for(reply.done.wait(), 20)
    assert isinstance(reply.error, DeadlineExceededError)
    assert reply.error.reason == "backend.prefill_timeout"


async def test_cancelling_while_the_prompt_comes(pair: Pair) -> None:
    slow = SilentPrefill()
    await pair.start(decode={"remote_prefill_threshold_tokens": 0})
    await slow.register(pair.process)
    reply = await pair.call(pair.decode, pair.request())
    await asyncio.wait_for(slow.asked.wait(), 10)
    reply.call.cancel()
    await asyncio.wait_for(reply.done.wait(), 10)
    assert reply.finish is FinishReason.CANCELLED
    await asyncio.wait_for(slow.left.wait(), 10)


async def test_stopping_while_the_prompt_comes(pair: Pair) -> None:
    slow = SilentPrefill()
    await pair.start(decode={"remote_prefill_threshold_tokens": 0})
    await slow.register(pair.process)
    reply = await pair.call(pair.decode, pair.request())
    await asyncio.wait_for(slow.asked.wait(), 10)
    await pair.decode.stop()
    await asyncio.wait_for(reply.done.wait(), 10)
    assert reply.error.reason == "backend.engine_shutdown"


@pytest.mark.parametrize(
    "items",
    [
        [],
        [b"\xc1"],
        [HEAD_ENCODER.encode(TransferHead(3)), b"short"],
        [HEAD_ENCODER.encode(TransferHead(99))],
        [HEAD_ENCODER.encode(TransferHead(2, "/etc/passwd", 1, 1))],
        [HEAD_ENCODER.encode(TransferHead(2, "/dev/shm/no-such-segment", 1, 1))],
    ],
)
async def test_a_broken_sender_costs_a_computation(pair: Pair, items: list[bytes]) -> None:
    await pair.start(prefill={}, decode={})
    address = await serve_items(pair.process, items)
    handoff = KvHandoff.from_result(await pair.hand_over(pair.request()))
    broken = msgspec.structs.replace(handoff, address=address, endpoint="test.broken.worker_kv_transfer")
    request = pair.request(handoff=broken.to_result(cached_tokens=0))
    reply = await pair.ask(pair.decode, request)
    assert reply.error is None
    assert reply.tokens == await pair.aggregated(request)
    assert pair.metric(REMOTE_PREFILLS_TOTAL, outcome="failed") == 1


async def test_a_foreign_hand_off_is_named_without_fallback(pair: Pair) -> None:
    await pair.start(prefill={}, decode={"local_prefill": False})
    reply = await pair.ask(pair.decode, pair.request(handoff=PrefillResult({"kind": "other"})))
    assert isinstance(reply.error, BackendProtocolError)
    assert "'other'" in reply.error.message


async def test_another_layout_is_refused(pair: Pair) -> None:
    await pair.start(prefill={}, decode={})
    handoff = KvHandoff.from_result(await pair.hand_over(pair.request()))
    payload = TRANSFER_REQUEST.encode(TransferRequest(handoff.lease_id, (1,), BlockLayout(1, 4, 1, 8)))
    stream = await open_stream(pair.process.plane, handoff.address, EndpointId.parse(handoff.endpoint), payload)
    with pytest.raises(InvalidRequestError) as caught:
        await asyncio.wait_for(stream.receive(), 10)
    assert caught.value.reason == "request.kv_layout_mismatch"
    assert pair.metric(KV_LEASES) == 0


async def test_kv_events_of_moved_blocks_are_published(pair: Pair) -> None:
    await pair.start(prefill={}, decode={"remote_prefill_threshold_tokens": 0})
    await pair.ask(pair.decode, pair.request())
    instances = [i for i in await pair.process.instances() if i.endpoint.endpoint == "worker_kv_indexer_query"]
    (mine,) = [i for i in instances if i.instance_id == pair.decode.instance_id]
    from dynamo_core.events import BlockStored, KvEventQuery
    from dynamo_core.streams import call_unary
    from dynamo_core.wire import KV_EVENT_BATCH, KV_EVENT_QUERY

    query = KV_EVENT_QUERY.encode(KvEventQuery(WorkerId(pair.decode.instance_id)))
    batch = KV_EVENT_BATCH.decode(await call_unary(pair.process.plane, mine.address, mine.endpoint, query))
    assert sum(len(event) for event in batch.events if isinstance(event, BlockStored)) >= 22


async def test_drain_waits_for_the_pull(pair: Pair) -> None:
    await pair.start(prefill={}, decode={})
    request = pair.request()
    handoff = await pair.hand_over(request)
    draining = asyncio.ensure_future(pair.prefill.drain(30))
    await pair.process.clock.settle()
    assert not draining.done()
    await pair.ask(pair.decode, msgspec.structs.replace(request, handoff=handoff))
    await asyncio.wait_for(draining, 10)
    assert received(pair) == 22


async def test_an_engine_without_block_access_cannot_take_a_role(process: Any, kit: Any) -> None:
    from dynamo_core.errors import ConfigurationError

    with pytest.raises(ConfigurationError, match="--role agg"):
        await process.worker(kit.ScriptedEngine(), role="prefill")


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_an_engine_with_several_ranks_cannot_take_a_role(process: Any, role: str) -> None:
    from dynamo_core.errors import ConfigurationError
    from dynamo_worker import ReferenceEngine

    with pytest.raises(ConfigurationError, match="worker for each rank"):
        await process.worker(ReferenceEngine.from_args(["--data-parallel-size", "2"]), role=role)


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"role": "agg", "kv_lease_s": 3.0}, "--kv-lease-s"),
        ({"role": "prefill", "remote_prefill_threshold_tokens": 3}, "--remote-prefill-threshold-tokens"),
        ({"role": "decode", "kv_lease_s": 3.0}, "--kv-lease-s"),
    ],
)
def test_options_of_other_roles_are_refused(options: dict[str, Any], flag: str) -> None:
    from pydantic import ValidationError

    from dynamo_worker import WorkerSettings

    with pytest.raises(ValidationError, match=flag):
        WorkerSettings(**options)
