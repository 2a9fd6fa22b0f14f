from __future__ import annotations

import pytest

from dynamo_core import plugins
from dynamo_core.cards import ModelCard
from dynamo_core.component import Component, ComponentPlugin
from dynamo_core.discovery import INSTANCES_PREFIX, ModelRecord
from dynamo_core.enums import HealthState
from dynamo_core.errors import ConfigurationError, NotFoundError
from dynamo_core.ids import EndpointId, WorkerId
from dynamo_core.routing import RequestOutcome, RoutingRequest
from dynamo_core.streams import call_unary
from dynamo_core.tokens import pack_tokens
from dynamo_core.wire import INSTANCE, ROUTING_DECISION, ROUTING_REQUEST
from dynamo_router import RouterSettings
from dynamo_router._component import ROUTER_REPORT, RouterReport, RouterServiceSettings

SELECT = EndpointId("ns", "router", "select")
REPORT = EndpointId("ns", "router", "report")


def create(planes, target="", **settings):
    plugin = plugins.load("components", "router")
    assert isinstance(plugin, ComponentPlugin)
    return plugin.create(planes.context, (RouterSettings(**settings), RouterServiceSettings(target=target)), [])


async def call(planes, endpoint, payload):
    records = await planes.discovery.list(INSTANCES_PREFIX + str(endpoint).replace(".", "/"))
    return await call_unary(planes.plane, INSTANCE.decode(records[0].value).address, endpoint, payload)


async def test_selects_and_takes_reports_over_the_request_plane(planes):
    await planes.add(1)
    component = create(planes, receipts="on")
    assert isinstance(component, Component)
    await component.start()
    await planes.until(lambda: component.health().state is HealthState.READY)
    request = RoutingRequest("r", "m", token_ids=pack_tokens(range(40)))
    decision = ROUTING_DECISION.decode(await call(planes, SELECT, ROUTING_REQUEST.encode(request)))
    assert decision.worker == WorkerId(1)
    assert decision.candidates
    router = component._routers["m"]
    assert router.loads()[0].projected.active_requests == 1
    outcome = RequestOutcome(decision.decision_id)
    report = RouterReport("m", decision.reservation, first_token=True, output_tokens=4, outcome=outcome)
    await call(planes, REPORT, ROUTER_REPORT.encode(report))
    assert router.loads()[0].projected.active_requests == 0
    assert router.decision(decision.decision_id)[1] == outcome
    with pytest.raises(NotFoundError, match="'other'"):
        await call(planes, SELECT, ROUTING_REQUEST.encode(RoutingRequest("r", "other")))
    await component.drain(5)
    assert await planes.discovery.list(INSTANCES_PREFIX + "ns/router/") == []
    await component.stop()
    await component.stop()


async def test_models_come_and_go(planes):
    component = create(planes)
    await component.start()
    assert component.health().state is HealthState.DEGRADED
    await planes.add(1, ModelCard("one", kv_block_size=4))
    await planes.add(2, ModelCard("two", kv_block_size=8))
    await planes.until(lambda: set(component._routers) == {"one", "two"})
    gone = ModelRecord(EndpointId("ns", "backend", "generate"), 1, ModelCard("one"))
    await planes.discovery.delete(gone.key)
    await planes.until(lambda: set(component._routers) == {"two"})
    await component.stop()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "backend"}, "--target"),
        ({"policy": "kw"}, "kw"),
        ({"policy_options": {"nonsense": 1}}, "nonsense"),
    ],
)
async def test_refuses_what_cannot_work(planes, options, message):
    with pytest.raises(ConfigurationError, match=message):
        create(planes, **options)
