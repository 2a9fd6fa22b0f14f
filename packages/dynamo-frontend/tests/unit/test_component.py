"""The component: its plug-in, its traffic reports, its metrics."""

import asyncio

import pytest

from dynamo_core import plugins
from dynamo_core.component import Component, ComponentPlugin
from dynamo_core.errors import ConfigurationError
from dynamo_core.planes import TRAFFIC, Topic
from dynamo_core.settings import resolve_settings
from dynamo_core.wire import TRAFFIC_STATS
from dynamo_frontend import Frontend, FrontendSettings


def test_plugin_is_found_and_keeps_the_contract(stack):
    plugin = plugins.load("components", "frontend")
    assert isinstance(plugin, ComponentPlugin)
    assert plugin.settings_types == (FrontendSettings,)


async def test_frontend_is_a_component(stack):
    await stack.start(workers=0)
    assert isinstance(stack.frontend, Component)
    assert stack.frontend.url.startswith("http://127.0.0.1:")
    await stack.frontend.stop()
    await stack.frontend.stop()


async def test_missing_router_names_what_to_install(stack):
    with pytest.raises(ConfigurationError, match="nonesuch"):
        await stack.start(workers=0, router="nonesuch")


async def test_busy_port_is_a_configuration_error(stack):
    server = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(ConfigurationError, match="--http-port"):
        await stack.start(workers=0, http_port=port)
    server.close()


async def test_traffic_is_published_per_model(stack):
    stack.say("one two three")
    await stack.start(traffic_interval_s=0.01)
    subscription = await stack.bus.subscribe(Topic(TRAFFIC, "test"))
    await stack.chat()
    await stack.chat(nonsense=1)
    async with asyncio.timeout(20):
        async for event in subscription:
            stats = TRAFFIC_STATS.decode(event.payload)
            if stats.requests:
                break
    assert (stats.model, stats.requests, stats.errors) == ("tiny", 1, 0)
    assert stats.output_tokens == len(stack.script.output)
    assert len(stats.ttft_s) == len(stats.itl_s) == 1
    await subscription.close()


async def test_metrics_of_a_request(stack):
    stack.say("one two three")
    await stack.start()
    await stack.chat(stream=True)
    await stack.chat(temperature=0.5, logit_bias={"z": 1})
    text = (await stack.get("/metrics")).body.decode()
    labels = 'endpoint="chat_completions"'
    assert f'dynamo_frontend_requests_total{{{labels},error_type="",model="tiny"' in text
    assert 'error_type="validation"' in text
    assert f'dynamo_frontend_output_tokens_total{{model="tiny"}} {float(len(stack.script.output))}' in text
    assert 'dynamo_frontend_time_to_first_token_seconds_count{model="tiny"} 1.0' in text


async def test_full_house_is_refused_with_the_overload_status(stack, request_bytes):
    stack.say("word " * 2000)
    await stack.start(max_concurrent_requests=1, overload_status=503)
    transport = stack.connect()
    transport.protocol.pause_writing()
    body = b'{"model":"tiny","stream":true,"messages":[{"role":"user","content":"x"}]}'
    transport.protocol.data_received(request_bytes("POST", "/v1/chat/completions", body))
    async with asyncio.timeout(10):
        while not stack.script.sent:
            await asyncio.sleep(0)
    reply = await stack.chat()
    assert (reply.status, reply.json["error"]["code"]) == (503, "capacity.pool_exhausted")
    assert reply.headers["retry-after"] == "1"
    transport.abort()


def test_settings_from_flags_and_environment():
    found = resolve_settings(
        "dynamo frontend",
        (FrontendSettings,),
        ["--http-port", "9000", "--router-options", '{"a": 1}'],
        environ={"DYN_FRONTEND_MIGRATION_LIMIT": "0"},
    ).get(FrontendSettings)
    assert (found.http_port, found.migration_limit, found.router_options) == (9000, 0, {"a": 1})
    with pytest.raises(ConfigurationError, match="--http-port"):
        resolve_settings("dynamo frontend", (FrontendSettings,), ["--http-port", "70000"], environ={})


def test_frontend_is_importable_from_the_package():
    assert Frontend.name == "frontend"
