"""Adapters and sleep through the admin operations, and what discovery shows of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dynamo_core.enums import HealthState
from dynamo_core.errors import ConflictError, InvalidRequestError, NotFoundError


class AdaptableEngine:
    """What a scripted engine lacks."""

    def __init__(self) -> None:
        self.loaded: dict[str, str] = {"early": "/adapters/early"}
        self.levels: list[int] = []
        self.fail_sleep = False

    async def load_lora(self, name: str, path: str) -> None:
        if name in self.loaded:
            raise ConflictError(f"{name} is taken")
        self.loaded[name] = path

    async def unload_lora(self, name: str) -> None:
        if self.loaded.pop(name, None) is None:
            raise NotFoundError(name)

    async def list_loras(self) -> list[str]:
        return sorted(self.loaded)

    async def sleep(self, level: int = 1) -> None:
        if self.fail_sleep:
            raise ConflictError("busy")
        self.levels.append(level)

    async def wake(self) -> None:
        self.levels.append(0)


@pytest.fixture
def engine(kit: Any) -> Any:
    class Engine(AdaptableEngine, kit.ScriptedEngine):
        def __init__(self) -> None:
            AdaptableEngine.__init__(self)
            kit.ScriptedEngine.__init__(self)

    return Engine()


async def names(process: Any) -> list[str]:
    return sorted(record.card.name for record in await process.models())


async def test_each_adapter_is_a_model_of_its_own(process: Any, engine: Any) -> None:
    await process.worker(engine, served_model_name="base", model_aliases=["other"])
    routes = process.context.admin_routes
    assert await names(process) == ["base", "early"]
    await routes["load_lora"]({"lora_name": "late", "source": "file:///adapters/la%20te"})
    assert engine.loaded["late"] == "/adapters/la te"
    assert await routes["list_loras"]({}) == {"loras": ["early", "late"]}
    records = {record.card.name: record for record in await process.models()}
    assert records["late"].suffix == "late"
    assert (records["late"].card.lora.name, records["late"].card.lora.base_model) == ("late", "base")
    assert records["base"].card.aliases == ("other",)
    assert records["late"].card.aliases == ()
    await routes["unload_lora"]({"lora_name": "late"})
    assert await names(process) == ["base", "early"]


async def test_adapters_come_and_go_with_the_worker(process: Any, engine: Any) -> None:
    worker = await process.worker(engine, served_model_name="base")
    routes = process.context.admin_routes
    await worker.pause(1.0)
    assert await names(process) == []
    await routes["load_lora"]({"lora_name": "late", "source": "/adapters/late"})
    assert await names(process) == []
    await worker.resume()
    assert await names(process) == ["base", "early", "late"]


async def test_refused_adapters_are_not_published(process: Any, engine: Any) -> None:
    await process.worker(engine, served_model_name="base")
    routes = process.context.admin_routes
    with pytest.raises(ConflictError):
        await routes["load_lora"]({"lora_name": "early", "source": "/adapters/x"})
    for arguments in ({}, {"lora_name": 3}, {"lora_name": "x", "source": "s3://bucket/x"}, {"lora_name": "x"}):
        with pytest.raises(InvalidRequestError):
            await routes["load_lora"](arguments)
    with pytest.raises(NotFoundError):
        await routes["unload_lora"]({"lora_name": "x"})
    assert await names(process) == ["base", "early"]


async def test_a_sleeping_worker_is_not_in_discovery(process: Any, engine: Any) -> None:
    worker = await process.worker(engine, served_model_name="base")
    routes = process.context.admin_routes
    assert (await routes["sleep"]({"level": 2}))["sleep_level"] == 2
    assert await names(process) == []
    with pytest.raises(ConflictError, match="wake"):
        await routes["resume"]({})
    assert (await routes["wake"]({}))["state"] == "serving"
    assert engine.levels == [2, 0]
    assert worker.health().state is HealthState.READY
    assert "base" in await names(process)


async def test_an_engine_that_cannot_sleep_now_serves_on(process: Any, engine: Any) -> None:
    await process.worker(engine, served_model_name="base")
    engine.fail_sleep = True
    with pytest.raises(ConflictError, match="busy"):
        await process.context.admin_routes["sleep"]({})
    assert "base" in await names(process)


async def test_operations_an_engine_lacks_are_not_offered(process: Any, kit: Any) -> None:
    await process.worker(kit.ScriptedEngine())
    assert not {"sleep", "wake", "load_lora"} & set(process.context.admin_routes)


async def test_real_adapters_through_the_host(process: Any, kit: Any, tmp_path: Path) -> None:
    from dynamo_worker import ReferenceEngine

    await process.worker(ReferenceEngine.from_args(["--num-blocks", "64", "--max-model-len", "256"]))
    with pytest.raises(NotFoundError, match="adapter_config"):
        await process.context.admin_routes["load_lora"]({"lora_name": "a", "source": str(tmp_path)})
