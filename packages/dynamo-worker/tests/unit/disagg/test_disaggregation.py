"""A prefill and a decode worker on the reference engine, with real KV bytes between them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from rig import PROMPT, SAMPLED, Pair, engine_block_bytes, received

from dynamo_core.enums import FinishReason, WorkerType
from dynamo_core.kv import BlockLayout
from dynamo_core.requests import SamplingOptions
from dynamo_core.tokens import pack_tokens
from dynamo_core.wire import GENERATE_REQUEST
from dynamo_worker._disagg.handoff import HEAD_DECODER, HEAD_ENCODER, KvHandoff, TransferHead
from dynamo_worker._metrics import (
    KV_LEASES,
    REMOTE_PREFILLS_TOTAL,
)


async def test_cards_say_the_role(pair: Pair) -> None:
    await pair.start(prefill={}, decode={"local_prefill": False})
    cards = {record.endpoint.component: record.card for record in await pair.process.models()}
    assert (cards["prefill"].worker_type, cards["prefill"].needs) == (WorkerType.PREFILL, ())
    assert (cards["backend"].worker_type, cards["backend"].needs) == (WorkerType.DECODE, ((WorkerType.PREFILL,),))
    names = {str(instance.endpoint) for instance in await pair.process.instances()}
    assert "test.prefill.worker_kv_transfer" in names


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("sampling", [SamplingOptions(temperature=0.0), SAMPLED])
async def test_the_output_equals_aggregated_serving(pair: Pair, shared: bool, sampling: SamplingOptions) -> None:
    options = {"kv_shared_memory": shared}
    await pair.start(prefill=options, decode={**options, "remote_prefill_threshold_tokens": 0})
    request = pair.request(sampling=sampling)
    reply = await pair.ask(pair.decode, request)
    assert reply.error is None
    assert reply.tokens == await pair.aggregated(request)
    assert received(pair) == 22
    assert reply.chunks[-1].usage.cached_tokens == 88, "the decode worker computed none of the moved blocks"
    assert pair.metric(KV_LEASES) == 0
    assert pair.metric(REMOTE_PREFILLS_TOTAL, outcome="remote") == 1


@pytest.mark.parametrize("shared", [True, False])
async def test_more_blocks_than_shared_memory_holds_at_once(
    pair: Pair, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dynamo_worker._disagg import pull, segments, transfer

    size = engine_block_bytes()
    for module in (segments, transfer):
        monkeypatch.setattr(module, "SLOT_BYTES", 2 * size)
    monkeypatch.setattr(transfer, "ITEM_BYTES", size // 3)
    monkeypatch.setattr(pull, "_IMPORT_BYTES", size)
    options = {"kv_shared_memory": shared}
    await pair.start(prefill=options, decode={**options, "remote_prefill_threshold_tokens": 0})
    for number in range(3):
        request = pair.request(f"r{number}", [token + number for token in PROMPT])
        reply = await pair.ask(pair.decode, request)
        assert (reply.error, reply.chunks[-1].usage.cached_tokens) == (None, 88)
        assert reply.tokens == await Pair(pair.process, pair.kit).aggregated(request)
    assert received(pair) == 66


async def test_only_missing_blocks_move(pair: Pair) -> None:
    await pair.start(prefill={}, decode={"remote_prefill_threshold_tokens": 0})
    await pair.ask(pair.decode, pair.request("first", PROMPT[:60]))
    assert received(pair) == 14
    reply = await pair.ask(pair.decode, pair.request("second"))
    assert received(pair) == 21, "the fifteenth block was computed here while the first request decoded"
    assert reply.chunks[-1].usage.cached_tokens == 88


async def test_a_frontend_makes_both_hops(pair: Pair) -> None:
    """The protocol as a frontend drives it: the prefill worker's hand-off goes into the decode request."""
    await pair.start(prefill={}, decode={})
    request = pair.request()
    handoff = await pair.hand_over(request)
    assert pair.metric(KV_LEASES) == 1
    record = KvHandoff.from_result(handoff)
    assert (record.endpoint, record.instance_id) == ("test.prefill.worker_kv_transfer", pair.prefill.instance_id)
    assert len(record.sequence_hashes) == 22 * 8
    reply = await pair.ask(pair.decode, msgspec.structs.replace(request, handoff=handoff))
    assert reply.tokens == await pair.aggregated(request)
    assert received(pair) == 22
    assert pair.metric(KV_LEASES) == 0


async def test_the_prefill_worker_gives_usage_and_no_tokens(pair: Pair) -> None:
    await pair.start(prefill={}, decode={})
    reply = await pair.ask(pair.prefill, pair.request())
    (chunk,) = reply.chunks
    assert (chunk.token_ids, chunk.finish_reason) == (b"", FinishReason.LENGTH)
    assert (chunk.usage.prompt_tokens, chunk.usage.completion_tokens) == (90, 0)
    again = await pair.hand_over(pair.request("again"))
    assert again.cached_tokens == 88


async def test_a_continuation_is_handed_over_too(pair: Pair) -> None:
    await pair.start(prefill={}, decode={"remote_prefill_threshold_tokens": 0})
    whole = await pair.aggregated(pair.request())
    rest = pair.request("rest", [*PROMPT, *whole[:5]], prompt_tokens=len(PROMPT), attempt=1)
    reply = await pair.ask(pair.decode, rest)
    assert reply.tokens == whole[5:]
    assert reply.chunks[0].first_index == 5
    assert received(pair) == 23


async def test_salt_keeps_tenants_apart(pair: Pair) -> None:
    from dynamo_core.requests import RoutingHints

    await pair.start(prefill={}, decode={"remote_prefill_threshold_tokens": 0})
    await pair.ask(pair.decode, pair.request("plain"))
    reply = await pair.ask(pair.decode, pair.request("salted", routing=RoutingHints(cache_salt="tenant")))
    assert received(pair) == 44
    assert reply.tokens == await pair.aggregated(pair.request("salted"))


@pytest.mark.parametrize("prompt", [PROMPT[:3], PROMPT[:4], PROMPT[:5]])
async def test_short_prompts(pair: Pair, prompt: list[int]) -> None:
    await pair.start(prefill={}, decode={"remote_prefill_threshold_tokens": 0})
    request = pair.request(prompt=prompt)
    handoff = await pair.hand_over(request)
    reply = await pair.ask(pair.decode, msgspec.structs.replace(request, handoff=handoff))
    assert reply.tokens == await pair.aggregated(request)
    assert pair.metric(KV_LEASES) == 0


def test_prompts_are_cut_before_the_newest_token(kit: Any) -> None:
    from dynamo_worker._disagg.handoff import prompt_blocks

    counts = [len(prompt_blocks(kit.request(prompt=list(range(1, n + 1))), 4)) for n in (1, 4, 5, 8, 9)]
    assert counts == [0, 0, 1, 1, 2]
    blocks = prompt_blocks(kit.request(prompt=list(range(1, 14))), 4)
    assert [block.parent_hash for block in blocks] == [None, blocks[0].sequence_hash, blocks[1].sequence_hash]


def test_the_head_survives_the_wire() -> None:
    head = TransferHead(3, "/dev/shm/x", 2, 4)
    assert HEAD_DECODER.decode(HEAD_ENCODER.encode(head)) == head


def test_a_request_with_a_hand_off_survives_the_wire(kit: Any) -> None:
    handoff = KvHandoff("mem://1", "a.b.c", 5, "lease", 3.0, pack_tokens([1, 2]), BlockLayout(2, 4, 1, 8))
    request = kit.request(handoff=handoff.to_result(cached_tokens=8))
    decoded = GENERATE_REQUEST.decode(GENERATE_REQUEST.encode(request))
    assert KvHandoff.from_result(decoded.handoff) == handoff
    assert decoded.handoff.cached_tokens == 8
