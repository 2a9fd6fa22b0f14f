"""A process whose etcd is away."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp

from dynamo_runtime._host import Host
from dynamo_runtime._settings import RuntimeSettings


async def test_a_process_serves_on_without_etcd_and_says_so(own_etcd: Any, until: Any) -> None:
    ready = asyncio.Event()

    async def on_ready() -> None:
        ready.set()

    settings = RuntimeSettings(
        discovery=f"etcd://{own_etcd.host_port}?probe_interval_s=0.2&max_retry_interval_s=0.1",
        request_plane="mem://",
        event_bus="mem://",
        status_port=0,
    )
    host = Host([], settings, on_ready=on_ready)
    running = asyncio.create_task(host.run())
    await asyncio.wait_for(ready.wait(), 20)
    own_etcd.kill()
    await until(lambda: host.report()["discovery"].state.value == "degraded")
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{host.status_url}/ready") as answer:
            assert answer.status == 200
            assert "cannot be reached" in (await answer.json())["parts"]["discovery"]["reason"]
        async with session.get(f"{host.status_url}/metrics") as answer:
            text = await answer.text()
    assert 'dynamo_runtime_discovery_connected{dynamo_component="runtime",dynamo_namespace="dynamo"} 0.0' in text
    own_etcd.start()
    await until(lambda: host.report()["discovery"].state.value == "ready")
    host.stop.request("the test is over")
    await running
