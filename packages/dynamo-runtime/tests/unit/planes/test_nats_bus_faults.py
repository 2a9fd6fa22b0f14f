"""What the NATS event bus does when NATS is killed and comes back."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import pytest

from dynamo_core.clock import SystemClock
from dynamo_core.errors import PayloadTooLargeError, UnavailableError
from dynamo_core.events import EventEnvelope, SequenceGap
from dynamo_core.memory import MemoryDiscovery
from dynamo_core.planes import Topic
from dynamo_core.telemetry import Metrics
from dynamo_runtime._bus.nats import NatsEventBus, nats_event_bus

TOPIC = Topic("events", "test")


async def opened(server: Any, **options: object) -> NatsEventBus:
    options = {"reconnect_interval_s": 0.05, "heartbeat_interval_s": 0.1, **options}
    bus = nats_event_bus(
        f"nats://{server.host_port}", discovery=MemoryDiscovery(), clock=SystemClock(), options=options
    )
    assert isinstance(bus, NatsEventBus)
    await bus.start()
    return bus


async def test_events_lost_while_nats_is_away_show_as_a_gap_and_can_be_replayed(own_nats: Any, until: Any) -> None:
    metrics = Metrics()
    one, other = await opened(own_nats), await opened(own_nats, metrics=metrics)
    subscription = await other.subscribe(TOPIC)
    publisher = await one.publisher(TOPIC)
    assert publisher.publish(b"before") == 1
    event = await asyncio.wait_for(anext(subscription), 10)
    assert isinstance(event, EventEnvelope)
    own_nats.kill()
    await until(lambda: not one.link.connected and not other.link.connected)
    for number in range(40):
        # Far more than the client keeps for a server that is away.
        publisher.publish(b"%d" % number + bytes(200_000))
        await asyncio.sleep(0)
    own_nats.start()
    await until(lambda: one.link.connected and other.link.connected)
    last = publisher.publish(b"after")
    found: set[int] = {1}
    async with asyncio.timeout(20):
        while max(found) < last:
            item = await anext(subscription)
            if isinstance(item, SequenceGap):
                again = await subscription.replay(publisher.id, item.first, item.last)
                assert [envelope.sequence for envelope in again] == list(range(item.first, item.last + 1))
                found |= {envelope.sequence for envelope in again}
            else:
                found.add(item.sequence)
    assert found == set(range(1, last + 1))
    assert (metrics.registry.get_sample_value("dynamo_runtime_bus_lost_events_total") or 0) > 0
    await other.close()
    await one.close()


async def test_event_over_the_limit_of_the_server_is_refused(shared_nats: Any) -> None:
    bus = await opened(shared_nats)
    publisher = await bus.publisher(TOPIC)
    with pytest.raises(PayloadTooLargeError, match="limit"):
        publisher.publish(bytes(1 << 20))
    assert publisher.publish(b"x") == 1
    await bus.close()
    with pytest.raises(UnavailableError, match="closed"):
        await bus.publisher(TOPIC)


async def test_close_comes_to_an_end_though_nats_takes_nothing(own_nats: Any) -> None:
    bus = await opened(own_nats)
    publisher = await bus.publisher(TOPIC)
    await bus.subscribe(TOPIC)
    own_nats.signal(signal.SIGSTOP)
    for number in range(64):
        publisher.publish(b"%d" % number + bytes(500_000))
    await asyncio.wait_for(bus.close(), 20)
    own_nats.signal(signal.SIGCONT)
