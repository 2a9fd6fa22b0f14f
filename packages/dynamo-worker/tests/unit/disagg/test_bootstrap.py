"""The bootstrap form: blocks are sent while the rest of the prompt is computed."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from rig import PROMPT, SAMPLED, Pair, SilentPrefill, received

from dynamo_core.errors import BackendProtocolError, DeadlineExceededError, InternalError
from dynamo_core.requests import PrefillResult, SamplingOptions
from dynamo_worker import ReferenceEngine
from dynamo_worker._disagg.handoff import KvHandoff
from dynamo_worker._disagg.prefill import PrefillEngine
from dynamo_worker._disagg.rooms import BOOTSTRAP_KIND, bootstrap_to
from dynamo_worker._metrics import KV_LEASES, KV_ROOMS, KV_TRANSFER_BLOCKS_TOTAL, REMOTE_PREFILLS_TOTAL

BOOTSTRAP: dict[str, Any] = {"remote_prefill_threshold_tokens": 0, "kv_handoff": "bootstrap"}


def is_clean(pair: Pair) -> bool:
    return pair.metric(KV_LEASES) == 0 and pair.metric(KV_ROOMS) == 0


async def occupied(pair: Pair, rooms: int) -> None:
    """Wait until that many rooms are in use: the engine's own thread decides when."""
    async with asyncio.timeout(20):
        while pair.metric(KV_ROOMS) != rooms:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("sampling", [SamplingOptions(temperature=0.0), SAMPLED])
async def test_the_output_equals_aggregated_serving(pair: Pair, shared: bool, sampling: SamplingOptions) -> None:
    options = {"kv_shared_memory": shared}
    await pair.start(prefill=options, decode={**options, **BOOTSTRAP})
    request = pair.request(sampling=sampling)
    reply = await pair.ask(pair.decode, request)
    assert reply.error is None
    assert reply.tokens == await pair.aggregated(request)
    assert received(pair) == pair.metric(KV_TRANSFER_BLOCKS_TOTAL, direction="sent") == 22
    assert reply.chunks[-1].usage.cached_tokens == 88, "the decode worker computed none of the moved blocks"
    assert pair.metric(REMOTE_PREFILLS_TOTAL, outcome="remote") == 1
    assert is_clean(pair)


@pytest.mark.parametrize("events", [True, False])
@pytest.mark.parametrize("shared", [True, False])
async def test_blocks_come_before_the_prompt_is_computed(
    pair: Pair, shared: bool, events: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prefill worker stops in the middle: what it has by then is on the other side, and only the rest follows."""
    from dynamo_worker._disagg import pull

    monkeypatch.setattr(pull, "_IMPORT_BYTES", 1)
    options = {"kv_shared_memory": shared}
    await pair.start(prefill={**options, "kv_events": events}, decode={**options, **BOOTSTRAP})
    half = pair.request("half", PROMPT[:45])
    await pair.ask(pair.prefill, half)
    held = asyncio.Event()
    handed_over = PrefillEngine._compute

    async def late(self: Any, *rest: Any) -> Any:
        await held.wait()
        async for chunk in handed_over(self, *rest):
            yield chunk

    monkeypatch.setattr(PrefillEngine, "_compute", late)
    reply = await pair.call(pair.decode, pair.request())
    async with asyncio.timeout(20):
        while await pair.decode_engine.match_blocks(hashes(pair)) < 11:
            await asyncio.sleep(0)
    assert pair.metric(KV_ROOMS) == 1
    held.set()
    while not reply.done.is_set():
        await pair.process.clock.advance(0.01)
        await asyncio.sleep(0.001)
    assert reply.tokens == await pair.aggregated(pair.request())
    assert received(pair) == 22


def hashes(pair: Pair) -> list[int]:
    from dynamo_worker._disagg.handoff import prompt_blocks

    return [block.sequence_hash for block in prompt_blocks(pair.request(), 4)]


async def test_a_frontend_makes_both_hops_at_once(pair: Pair) -> None:
    """It names the room in both requests, and takes the place from the prefill worker's card."""
    await pair.start(prefill={}, decode={})
    (card,) = [record.card for record in await pair.process.models() if record.endpoint.component == "prefill"]
    place = card.runtime_config.disaggregated_endpoint
    request = pair.request()
    meeting = PrefillResult({**place, "lease_id": "room 7", "bootstrap": True})
    decoding = await pair.call(pair.decode, msgspec.structs.replace(request, handoff=meeting))
    await occupied(pair, 1)  # the decode worker waits for the prompt
    (chunk,) = (await pair.ask(pair.prefill, msgspec.structs.replace(request, handoff=bootstrap_to("room 7")))).chunks
    await asyncio.wait_for(decoding.done.wait(), 20)
    assert decoding.tokens == await pair.aggregated(request)
    assert received(pair) == 22
    assert KvHandoff.from_result(chunk.handoff).lease_id == "room 7"
    assert is_clean(pair)


async def test_a_receiver_that_comes_late_pulls_what_is_kept(pair: Pair) -> None:
    await pair.start(prefill={}, decode={})
    request = pair.request()
    handoff = await pair.hand_over(msgspec.structs.replace(request, handoff=bootstrap_to("room")))
    assert (pair.metric(KV_LEASES), pair.metric(KV_ROOMS)) == (1, 0)
    late = KvHandoff.from_result(handoff)
    assert late.lease_id == "room"
    meeting = msgspec.structs.replace(late, bootstrap=True).to_result(cached_tokens=0)
    reply = await pair.ask(pair.decode, msgspec.structs.replace(request, handoff=meeting))
    assert reply.tokens == await pair.aggregated(request)
    assert received(pair) == 22
    assert is_clean(pair)


async def test_only_missing_blocks_move(pair: Pair) -> None:
    await pair.start(prefill={}, decode=BOOTSTRAP)
    await pair.ask(pair.decode, pair.request("first", PROMPT[:60]))
    assert received(pair) == 14
    reply = await pair.ask(pair.decode, pair.request("second"))
    assert received(pair) == 21
    assert reply.chunks[-1].usage.cached_tokens == 88
    assert is_clean(pair)


async def test_a_receiver_that_has_everything_leaves_no_lease(pair: Pair) -> None:
    await pair.start(prefill={}, decode=BOOTSTRAP)
    for name in ("first", "again"):
        reply = await pair.ask(pair.decode, pair.request(name))
        assert reply.error is None
    assert received(pair) == 22
    assert is_clean(pair)


async def test_a_room_nobody_enters_ends_with_the_transfers_time(pair: Pair) -> None:
    await pair.start(
        prefill={"kv_transfer_timeout_s": 4.0}, decode={"local_prefill": False, "kv_transfer_timeout_s": 4.0}
    )
    place = KvHandoff.from_result(await pair.hand_over(pair.request("other", [5] * 9)))
    meeting = msgspec.structs.replace(place, lease_id="nobody", bootstrap=True).to_result(cached_tokens=0)
    reply = await pair.call(pair.decode, pair.request(handoff=meeting))
    await occupied(pair, 1)
    await pair.process.clock.settle()
    await pair.process.clock.advance(4.5)
    await asyncio.wait_for(reply.done.wait(), 20)
    assert isinstance(reply.error, DeadlineExceededError)
    assert pair.metric(KV_ROOMS) == 0


@pytest.mark.parametrize("local", [True, False])
async def test_a_prefill_that_fails_in_the_middle(pair: Pair, local: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    await pair.start(prefill={}, decode={**BOOTSTRAP, "local_prefill": local})

    async def broken(self: Any, *rest: Any) -> Any:
        raise InternalError("the step failed", reason="backend.engine_step_failed")
        yield

    monkeypatch.setattr(PrefillEngine, "_compute", broken)
    reply = await pair.ask(pair.decode, pair.request())
    if local:
        assert reply.tokens == await pair.aggregated(pair.request())
    else:
        assert reply.error.reason == "backend.engine_step_failed"
    assert is_clean(pair)


async def test_a_silent_prefill_worker_does_not_hang_the_request(pair: Pair) -> None:
    slow = SilentPrefill()
    await pair.start(prefill={}, decode={**BOOTSTRAP, "prefill_timeout_s": 3.0, "local_prefill": False})
    await pair.prefill._registration.leave()
    await slow.register(pair.process, place=pair.prefill._role.engine.place.to_parameters())
    reply = await pair.call(pair.decode, pair.request())
    await asyncio.wait_for(slow.asked.wait(), 10)
    await occupied(pair, 1)
    await pair.process.clock.advance(3.5)
    await asyncio.wait_for(reply.done.wait(), 20)
    assert reply.error.reason == "backend.prefill_timeout"
    await asyncio.wait_for(slow.left.wait(), 10)
    await occupied(pair, 0)


async def test_cancelling_while_the_prompt_is_computed_empties_the_room(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    await pair.start(prefill={}, decode=BOOTSTRAP)
    begun = asyncio.Event()

    async def endless(self: Any, *rest: Any) -> Any:
        begun.set()
        await asyncio.Event().wait()
        yield

    monkeypatch.setattr(PrefillEngine, "_compute", endless)
    reply = await pair.call(pair.decode, pair.request())
    await asyncio.wait_for(begun.wait(), 10)
    reply.call.cancel()
    await asyncio.wait_for(reply.done.wait(), 10)
    async with asyncio.timeout(10):
        while pair.metric(KV_ROOMS):
            await pair.process.clock.advance(1.0)  # the host gives the engine its time to end a cancelled request
    assert pair.metric(KV_LEASES) == 0


async def test_a_worker_whose_card_names_no_place_is_asked_in_the_pull_form(pair: Pair) -> None:
    """As workers of the release before this form do."""
    await pair.start(prefill={}, decode=BOOTSTRAP)
    peers = pair.decode._role.engine._preparation._peers
    peers.meeting_place = lambda instance: None
    reply = await pair.ask(pair.decode, pair.request())
    assert reply.tokens == await pair.aggregated(pair.request())
    assert received(pair) == 22


async def test_rooms_are_taken_once_and_named(pair: Pair) -> None:
    await pair.start(prefill={}, decode={})
    wrong = PrefillResult({"kind": BOOTSTRAP_KIND, "room": 7})
    reply = await pair.ask(pair.prefill, pair.request(handoff=wrong))
    assert isinstance(reply.error, BackendProtocolError)
    assert "7" in reply.error.message
    rooms = pair.prefill._role._rooms
    rooms.enter("taken")
    reply = await pair.ask(pair.prefill, pair.request("second", handoff=bootstrap_to("taken")))
    assert isinstance(reply.error, BackendProtocolError)
    assert "'taken'" in reply.error.message


def test_the_engine_knows_how_to_hand_over() -> None:
    from dynamo_worker import MockEngine
    from dynamo_worker._disagg.handoff import SupportsKvHandoff

    assert isinstance(ReferenceEngine.from_args([]), SupportsKvHandoff)
    assert isinstance(MockEngine(), SupportsKvHandoff)
