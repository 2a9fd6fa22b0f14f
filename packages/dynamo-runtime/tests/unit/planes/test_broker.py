"""The event broker: as a process, and what a bus does when it is lost."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dynamo_core import plugins
from dynamo_core.clock import SystemClock
from dynamo_core.errors import ConfigurationError
from dynamo_core.events import EventEnvelope, SequenceGap
from dynamo_core.memory import MemoryDiscovery
from dynamo_core.planes import Topic
from dynamo_core.telemetry import Metrics
from dynamo_runtime._broker import plugin
from dynamo_runtime._bus._metrics import BrokerMetrics
from dynamo_runtime._bus.broker import ZmqBroker, broker_addresses
from dynamo_runtime._host import Host, HostedComponent
from dynamo_runtime._settings import BrokerSettings, RuntimeSettings

TOPIC = Topic("events", "test")


def bus(port: int, store: MemoryDiscovery) -> Any:
    options = {"broker": f"127.0.0.1:{port}", "heartbeat_interval_s": 0.05}
    return plugins.load("event_buses", "zmq")(
        "zmq://127.0.0.1:0", discovery=store, clock=SystemClock(), options=options
    )


async def test_broker_that_comes_back_shows_what_was_lost_and_the_ring_has_it(until: Any) -> None:
    metrics = Metrics()
    broker = ZmqBroker(BrokerMetrics(metrics))
    broker.start("127.0.0.1", 0)
    port = broker.port
    store = MemoryDiscovery()
    one, other = bus(port, store), bus(port, store)
    publisher = await one.publisher(TOPIC)
    subscription = await other.subscribe(TOPIC)
    publisher.publish(b"before")
    first = await asyncio.wait_for(anext(subscription), 10)
    assert isinstance(first, EventEnvelope)
    assert (metrics.registry.get_sample_value("dynamo_runtime_broker_packets_total") or 0) > 0
    await broker.close()
    for number in range(20):
        publisher.publish(b"%d" % number)
        await asyncio.sleep(0)
    broker = ZmqBroker()
    await until(lambda: _started(broker, port))
    found = {1}
    async with asyncio.timeout(20):
        while found != set(range(1, 22)):
            item = await anext(subscription)
            if isinstance(item, SequenceGap):
                again = await subscription.replay(publisher.id, item.first, item.last)
                found |= {event.sequence for event in again}
            else:
                found.add(item.sequence)
    await one.close()
    await other.close()
    await broker.close()


def _started(broker: ZmqBroker, port: int) -> bool:
    try:
        broker.start("127.0.0.1", port)
    except ConfigurationError:
        # The kernel may hold the port for a moment.
        return False
    return True


async def test_broker_is_a_component_that_says_where_it_is() -> None:
    ready = asyncio.Event()

    async def on_ready() -> None:
        ready.set()

    planes = {"discovery": "mem://", "request_plane": "mem://", "event_bus": "mem://"}
    hosted = HostedComponent("broker", plugin, (BrokerSettings(port=0),))
    host = Host([hosted], RuntimeSettings(**planes), on_ready=on_ready)
    running = asyncio.create_task(host.run())
    await asyncio.wait_for(ready.wait(), 20)
    assert "publishers at 127.0.0.1:" in host.report()["broker"].reason
    host.stop.request("the test is over")
    await running
    assert plugins.load("components", "broker") is plugin


async def test_ports_that_are_taken_are_a_configuration_error() -> None:
    first, second = ZmqBroker(), ZmqBroker()
    first.start("127.0.0.1", 0)
    with pytest.raises(ConfigurationError, match="--port"):
        second.start("127.0.0.1", first.port)
    await second.close()
    await first.close()


@pytest.mark.parametrize("text", ["host", "host:", ":1", "host:x", "host:65535", "host:0"])
def test_broker_must_be_host_and_port(text: str) -> None:
    with pytest.raises(ConfigurationError, match="host:port"):
        broker_addresses(text)
