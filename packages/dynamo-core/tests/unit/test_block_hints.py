from __future__ import annotations

import msgspec

from dynamo_core.kv import BlockHints, SupportsBlockHints, SupportsPrefetch
from dynamo_core.noop.kv import DictBlockStore
from dynamo_core.requests import GenerateRequest
from dynamo_core.wire import GENERATE_REQUEST


def test_hints_travel_with_a_request_and_cost_nothing_without() -> None:
    plain = GenerateRequest("r", "m")
    hinted = msgspec.structs.replace(plain, block_hints=BlockHints(next_turn_s=30.0, tenant="a"))
    assert GENERATE_REQUEST.decode(GENERATE_REQUEST.encode(hinted)) == hinted
    assert b"hints" not in GENERATE_REQUEST.encode(plain)


def test_a_receiver_that_does_not_know_hints_passes_over_them() -> None:
    class OlderRequest(msgspec.Struct):
        request_id: str
        model: str

    encoded = GENERATE_REQUEST.encode(GenerateRequest("r", "m", block_hints=BlockHints(session_ended=True)))
    assert msgspec.msgpack.decode(encoded, type=OlderRequest).model == "m"


def test_abilities_are_told_apart_by_their_methods() -> None:
    store = DictBlockStore(1)
    assert not isinstance(store, SupportsBlockHints)
    assert not isinstance(store, SupportsPrefetch)
