"""Whatever stands in a store: what is no record is left out and counted, and the others are seen as before."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import json
import secrets
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from dynamo_core.clock import SystemClock
from dynamo_core.discovery import INSTANCES_PREFIX, Instance, RecordPut, WatchSynced
from dynamo_core.ids import EndpointId
from dynamo_core.telemetry import Metrics
from dynamo_core.wire import INSTANCE
from dynamo_runtime._discovery._metrics import GARBLED
from dynamo_runtime._discovery.etcd import EtcdDiscovery
from dynamo_runtime._discovery.etcd_options import etcd_target
from dynamo_runtime._discovery.file import FileDiscovery
from dynamo_runtime._discovery.k8s import K8sDiscovery
from dynamo_runtime._discovery.k8s_client import CONFIG_MAPS
from dynamo_runtime._discovery.k8s_objects import record_object
from dynamo_runtime._discovery.k8s_options import k8s_target
from dynamo_runtime._discovery.options import FileDiscoveryOptions
from dynamo_runtime._endpoints import find_instances

_spec = importlib.util.spec_from_file_location("k8s_server", Path(__file__).with_name("k8s_server.py"))
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)

pytestmark = pytest.mark.asyncio(loop_factories=["uvloop"])
ENDPOINT = EndpointId("test", "backend", "generate")
GOOD = Instance(ENDPOINT, 1, "tcp://127.0.0.1:1")
WELL_FORMED = [INSTANCE.encode(GOOD), INSTANCE.encode(Instance(ENDPOINT, 2, "", metadata={"a": "b"}))]


def garbled(metrics: Metrics) -> float:
    return metrics.registry.get_sample_value(GARBLED) or 0.0


async def follows(discovery: Any, prefix: str, write: Callable[[], Awaitable[None]]) -> None:
    """A watch that was there before sees the good record, which is written last; one that comes later too."""
    watch = discovery.watch(prefix)
    async with asyncio.timeout(30):
        while not isinstance(await anext(watch), WatchSynced):
            pass
        await write()
        await discovery.put(GOOD.key, INSTANCE.encode(GOOD))
        for each in (watch, discovery.watch(prefix)):
            async for event in each:
                if isinstance(event, RecordPut) and event.key == GOOD.key:
                    break
            await each.aclose()
    assert [record.key for record in await discovery.list(GOOD.key)] == [GOOD.key]


async def test_values_that_are_no_instances_hide_no_other(tmp_path: Path, hostile: Any) -> None:
    discovery = FileDiscovery(tmp_path, clock=SystemClock())
    await discovery.start()
    for number, data in enumerate(hostile(WELL_FORMED)):
        await discovery.put(f"{INSTANCES_PREFIX}test/backend/generate/z{number}", data)
    await discovery.put(GOOD.key, INSTANCE.encode(GOOD))
    assert GOOD in await find_instances(discovery, ENDPOINT)
    await discovery.close()


async def test_files_may_hold_anything(tmp_path: Path, hostile: Any, flat_memory: Any) -> None:
    metrics = Metrics()
    times = FileDiscoveryOptions(tend_interval_s=0.05, poll_interval_s=0.05)
    discovery = FileDiscovery(tmp_path, clock=SystemClock(), options=times, metrics=metrics)
    await discovery.start()
    lease = await discovery.lease()
    await discovery.put("v1/instances/own", b"own", lease=lease)
    state = tmp_path / ".state"
    record = (tmp_path / "v1%2Finstances%2Fown").read_bytes()
    lease_file = next((state / "leases").iterdir()).read_bytes()

    async def write() -> None:
        for number, data in enumerate(hostile([record, lease_file])):
            (tmp_path / f"v1%2Finstances%2F{number}").write_bytes(data)
            (state / "leases" / f"{number + 1:x}").write_bytes(data)
            (state / "revision").write_bytes(data[:30])
        (tmp_path / "folder").mkdir()
        (state / "leases" / "f00d").mkdir()
        with (tmp_path / "huge").open("wb") as huge:
            huge.truncate(64 << 30)
        (state / "revision").write_bytes(b"9" * 30)

    with flat_memory():
        await follows(discovery, "v1/instances/", write)
    assert garbled(metrics) > 0
    own = await discovery.get("v1/instances/own")
    assert own is not None
    assert own.value == b"own"
    (tmp_path / "huge").unlink()
    await discovery.close()


async def test_etcd_may_hold_anything(shared_etcd: Any, hostile: Any) -> None:
    metrics = Metrics()
    target, _ = etcd_target(f"etcd://{shared_etcd.host_port}", {})
    discovery = EtcdDiscovery(target, clock=SystemClock(), metrics=metrics)
    await discovery.start()

    async def write() -> None:
        for data in [*hostile([b"some/key", b"\xff\xfe"]), b"\xff", b"\xc3"]:
            await asyncio.to_thread(_put, shared_etcd.host_port, INSTANCES_PREFIX.encode() + data, data)

    await follows(discovery, INSTANCES_PREFIX, write)
    assert garbled(metrics) > 0
    shared_etcd.control("del", "--prefix", INSTANCES_PREFIX)
    await discovery.close()


def _put(place: str, key: bytes, value: bytes) -> None:
    body = {"key": base64.b64encode(key).decode(), "value": base64.b64encode(value).decode()}
    request = urllib.request.Request(f"http://{place}/v3/kv/put", json.dumps(body).encode())
    urllib.request.urlopen(request, timeout=20).close()


async def test_kubernetes_may_hold_anything(hostile: Any) -> None:
    api = _module.ApiServer(page=50)
    await api.start()
    metrics = Metrics()
    target, _ = k8s_target(f"k8s://{api.host_port}/serving", {}, {})
    discovery = K8sDiscovery(target, clock=SystemClock(), metrics=metrics)
    await discovery.start()

    async def write() -> None:
        for data in hostile(WELL_FORMED):
            body = record_object("dynamo", f"{INSTANCES_PREFIX}{secrets.token_hex(4)}", data, None)
            body["metadata"]["name"] = f"strange-{secrets.token_hex(6)}"
            text = data.decode("latin-1")
            damage: list[Callable[[], Any]] = [
                lambda body=body: body["metadata"].pop("annotations"),
                lambda body=body: body.update(binaryData=None),
                lambda body=body, text=text: body.update(binaryData={"value": text}),
                lambda body=body, text=text: body.update(binaryData={"value": text, "other": 1}),
                lambda body=body, text=text: body["metadata"].update(annotations={"dynamo-key": text}),
                lambda body=body: body["metadata"].update(annotations=["dynamo-key"]),
                lambda body=body: body.update(binaryData=[1]),
            ]
            damage[len(data) % len(damage)]()
            await discovery._client.create(CONFIG_MAPS, body)

    await follows(discovery, INSTANCES_PREFIX, write)
    assert garbled(metrics) > 0
    await discovery.close()
    await api.stop()
