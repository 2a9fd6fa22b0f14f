from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import pytest

from dynamo_core.errors import ConfigurationError
from dynamo_core.planning import Observation, PoolState, TrafficStats
from dynamo_core.telemetry import Metrics
from dynamo_core.testing import FakeClock
from dynamo_planner import ConstantPredictor, PlannerSettings, create_planner
from dynamo_planner._loop import PlannerLoop
from dynamo_planner._metrics import PlannerMetrics
from dynamo_planner._operate import OperationApi


class Pool:
    def __init__(self) -> None:
        self.replicas = 2

    async def start(self) -> None:
        pass

    async def state(self) -> Mapping[str, PoolState]:
        return {"worker": PoolState(ready=self.replicas, desired=self.replicas)}

    async def scale(self, replicas: Mapping[str, int], *, decision_id: int = 0) -> None:
        self.replicas = replicas["worker"]

    async def close(self) -> None:
        pass


class Steady:
    lost_reports = 0

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock

    async def run(self) -> None:
        pass

    async def observe(self, pools: Mapping[str, PoolState]) -> Observation:
        return Observation(self._clock.time(), (TrafficStats("m", 10.0, requests=300),), dict(pools))

    async def close(self) -> None:
        pass


class Rig:
    def __init__(self) -> None:
        self.clock = FakeClock()
        settings = PlannerSettings(throughput_interval_s=10)
        metrics = PlannerMetrics(Metrics())
        self.pool = Pool()
        planner = create_planner(settings, ConstantPredictor)
        self.loop = PlannerLoop(settings, planner, Steady(self.clock), self.pool, clock=self.clock, metrics=metrics)
        self.api = OperationApi(self.loop, metrics, self.clock, host="127.0.0.1", port=0)

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        url = f"http://127.0.0.1:{self.api.port}/v1/{path}"
        async with aiohttp.ClientSession() as session, session.request(method, url, json=body) as response:
            return response.status, await response.json()


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    await rig.api.start()
    yield rig
    await rig.api.close()
    await rig.api.close()


async def test_status_and_decisions_show_what_was_decided(rig: Rig) -> None:
    assert (await rig.ask("GET", "status"))[1]["decision"] is None
    await rig.loop.tick()
    status = (await rig.ask("GET", "status"))[1]
    assert status["state"] == "ready"
    assert status["decision"]["replicas"] == {"worker": 4}
    assert len((await rig.ask("GET", "decisions"))[1]["decisions"]) == 1
    for limit in ("0", "-1", "many", "1001"):
        assert (await rig.ask("GET", f"decisions?limit={limit}"))[0] == 400


async def test_paused_decides_and_leaves_the_replicas_alone(rig: Rig) -> None:
    assert await rig.ask("POST", "pause") == (200, {"paused": True})
    await rig.loop.tick()
    assert rig.pool.replicas == 2
    assert (await rig.ask("GET", "status"))[1]["decision"]["advisory"]
    await rig.ask("POST", "resume")
    await rig.loop.tick()
    assert rig.pool.replicas == 4


async def test_limits_are_patched_as_a_whole_or_not_at_all(rig: Rig) -> None:
    _, before = await rig.ask("GET", "config")
    for body, status in (
        ({}, 400),
        ({"max_gpu": 3}, 400),
        ({"roles": {"nobody": {"min_replicas": 1}}}, 400),
        ({"roles": {"worker": {"gpus": 1}}}, 400),
        ({"max_gpus": True}, 400),
        ({"max_gpus": 4.5}, 400),
        ({"max_gpus": "4"}, 400),
        ({"max_gpus": None}, 400),
        ({"max_gpus": -1}, 400),
        ({"max_gpus": 10**18}, 400),
        ({"max_gpus": 10**30}, 400),
        ({"roles": None}, 400),
        ({"roles": [1]}, 400),
        ({"roles": {}}, 400),
        ({"roles": {"worker": {}}}, 400),
        ({"roles": {"worker": None}}, 400),
        ({"roles": {"worker": {"min_replicas": True}}}, 400),
        ({"max_gpus": 3, "roles": {"worker": {"min_replica": 1}}}, 400),
        ({"max_gpus": 0}, 422),
        ({"min_gpus": 99}, 422),
        ([1], 400),
        ({"max_gpus": 2, "roles": {"worker": {"min_replicas": 3}}}, 422),
        ({"roles": {"worker": {"min_replicas": 9}}}, 422),
    ):
        assert (await rig.ask("PATCH", "config", body))[0] == status
        assert (await rig.ask("GET", "config"))[1] == before
    answer = await rig.ask("PATCH", "config", {"max_gpus": 3, "roles": {"worker": {"min_replicas": 2}}})
    assert answer == (
        200,
        {"max_gpus": 3, "min_gpus": 0, "roles": {"worker": {"gpus": 1, "min_replicas": 2, "max_replicas": 8}}},
    )
    await rig.loop.tick()
    assert rig.pool.replicas == 3


async def test_minima_have_their_own_address(rig: Rig) -> None:
    assert await rig.ask("PATCH", "min-endpoints", {"worker": 3}) == (200, {"worker": 3})
    assert await rig.ask("GET", "min-endpoints") == (200, {"worker": 3})
    assert (await rig.ask("PATCH", "min-endpoints", {"worker": 99}))[0] == 422
    assert (await rig.ask("PATCH", "min-endpoints", {"worker": "3"}))[0] == 400


async def test_an_override_expires_or_is_released(rig: Rig) -> None:
    status, shown = await rig.ask("POST", "override", {"role": "worker", "replicas": 7, "for_s": 60})
    assert (status, shown["worker"]["replicas"]) == (200, 7)
    await rig.loop.tick()
    assert rig.pool.replicas == 7
    assert await rig.ask("DELETE", "override/worker") == (200, {})
    for body in (
        {"role": "worker", "replicas": 7},
        {"role": "worker", "replicas": -1, "for_s": 5},
        {"role": "worker", "replicas": 99, "for_s": 5},
        {"role": "nobody", "replicas": 1, "for_s": 5},
        {"role": "worker", "replicas": 1, "for_s": 1e9},
        {"role": "worker", "replicas": 1, "for_s": 5, "why": "x"},
        {"role": "worker", "replicas": 1, "for_s": True},
        {"role": "worker", "replicas": 1, "for_s": "60"},
        {"role": "worker", "replicas": 1, "for_s": 0},
        {"role": "worker", "replicas": True, "for_s": 5},
        {"role": ["worker"], "replicas": 1, "for_s": 5},
        {},
    ):
        assert (await rig.ask("POST", "override", body))[0] == 400
    assert (await rig.ask("DELETE", "override/nobody"))[0] == 400


async def test_an_override_ends_at_its_time_and_not_before(rig: Rig) -> None:
    assert (await rig.ask("POST", "override", {"role": "worker", "replicas": 7, "for_s": 60}))[0] == 200
    for _ in range(6):
        assert (await rig.ask("GET", "status"))[1]["overrides"]["worker"]["replicas"] == 7
        await rig.loop.tick()
        assert rig.pool.replicas == 7
        await rig.clock.advance(10)
    assert (await rig.ask("GET", "status"))[1]["overrides"] == {}
    for _ in range(10):
        await rig.loop.tick()
        await rig.clock.advance(10)
    assert rig.pool.replicas == 4


async def test_a_newer_override_takes_the_place_of_an_older_one(rig: Rig) -> None:
    for replicas in (7, 5):
        answer = await rig.ask("POST", "override", {"role": "worker", "replicas": replicas, "for_s": 60})
        assert answer[1]["worker"]["replicas"] == replicas
    await rig.loop.tick()
    assert rig.pool.replicas == 5
    # Limits that are lowered below it still hold.
    assert (await rig.ask("PATCH", "config", {"roles": {"worker": {"max_replicas": 3}}}))[0] == 200
    await rig.loop.tick()
    assert rig.pool.replicas == 3


async def test_patches_at_the_same_time_each_hold_as_a_whole(rig: Rig) -> None:
    patches = [{"max_gpus": 10 + n, "roles": {"worker": {"max_replicas": 10 + n}}} for n in range(40)]
    answers = await asyncio.gather(*(rig.ask("PATCH", "config", patch) for patch in patches))
    assert {status for status, _ in answers} == {200}
    # Each answer shows one patch, never half of one and half of another; so does what is left.
    _, left = await rig.ask("GET", "config")
    for shown in (*(body for _, body in answers), left):
        assert shown["max_gpus"] == shown["roles"]["worker"]["max_replicas"]
    fields = [{"min_gpus": 2}, {"max_gpus": 20}, {"roles": {"worker": {"min_replicas": 2}}}] * 5
    await asyncio.gather(*(rig.ask("PATCH", "config", patch) for patch in fields))
    _, left = await rig.ask("GET", "config")
    assert (left["min_gpus"], left["max_gpus"], left["roles"]["worker"]["min_replicas"]) == (2, 20, 2)


@pytest.mark.parametrize("path", ["config", "min-endpoints", "override"])
async def test_a_body_that_is_no_object_is_refused(rig: Rig, path: str) -> None:
    method = "POST" if path == "override" else "PATCH"
    url = f"http://127.0.0.1:{rig.api.port}/v1/{path}"
    async with aiohttp.ClientSession() as session:
        for body, status in (
            (b"", 400),
            (b"{", 400),
            (b'{"max_gpus": NaN}', 400),
            (b"\xff\xfe", 400),
            (b"x" * 70_000, 413),
        ):
            async with session.request(method, url, data=body) as response:
                assert response.status == status
                assert set((await response.json())["error"]) == {"reason", "message"}


async def test_what_is_not_there_says_so_in_json(rig: Rig) -> None:
    for method, path, status in (
        ("GET", "nothing", 404),
        ("POST", "status", 405),
        ("GET", "pause", 405),
        ("PUT", "config", 405),
        ("DELETE", "override", 405),
    ):
        answer = await rig.ask(method, path)
        assert answer[0] == status
        assert answer[1]["error"]["message"]


async def test_pause_and_resume_may_be_repeated_and_show_in_the_metric(rig: Rig) -> None:
    for _ in range(2):
        assert await rig.ask("POST", "pause") == (200, {"paused": True})
        assert (await rig.ask("GET", "status"))[1]["paused"] is True
    for _ in range(2):
        assert await rig.ask("POST", "resume") == (200, {"paused": False})
    await rig.loop.tick()
    assert rig.pool.replicas == 4


async def test_a_port_that_is_taken_is_refused_with_a_remedy(rig: Rig) -> None:
    other = OperationApi(rig.loop, PlannerMetrics(Metrics()), rig.clock, host="127.0.0.1", port=rig.api.port)
    with pytest.raises(ConfigurationError, match="--api-port"):
        await other.start()
