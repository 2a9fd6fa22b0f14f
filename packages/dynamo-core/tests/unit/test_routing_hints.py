from __future__ import annotations

import msgspec

from dynamo_core.requests import GenerateRequest, RoutingHints
from dynamo_core.routing import RoutingRequest
from dynamo_core.wire import GENERATE_REQUEST, ROUTING_REQUEST


def test_a_deadline_travels_with_the_hints_and_costs_nothing_without() -> None:
    hurried = RoutingHints(deadline_s=2.5)
    routed = RoutingRequest("r", hints=hurried)
    generated = GenerateRequest("r", "m", routing=hurried)
    assert ROUTING_REQUEST.decode(ROUTING_REQUEST.encode(routed)) == routed
    assert GENERATE_REQUEST.decode(GENERATE_REQUEST.encode(generated)) == generated
    assert b"deadline" not in ROUTING_REQUEST.encode(RoutingRequest("r", hints=RoutingHints(priority=1)))


def test_a_receiver_that_does_not_know_the_deadline_passes_over_it() -> None:
    class OlderHints(msgspec.Struct):
        priority: int = 0

    encoded = msgspec.msgpack.encode(RoutingHints(priority=3, deadline_s=1.0))
    assert msgspec.msgpack.decode(encoded, type=OlderHints).priority == 3
