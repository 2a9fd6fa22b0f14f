"""Puts the fake server within reach of the tests of this folder."""

import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fake_server import FakeServer

from dynamo_core.clock import SystemClock
from dynamo_core.engine import EngineContext
from dynamo_core.ids import InstanceId
from dynamo_core.telemetry import Metrics
from dynamo_worker._openai_http.engine import OpenAIHttpEngine

Starter = Callable[..., Awaitable[tuple[FakeServer, OpenAIHttpEngine, Any]]]


@pytest.fixture
async def start() -> AsyncIterator[Starter]:
    """Starts a server and an engine in front of it."""
    opened: list[Any] = []

    async def begin(*flags: str, **server: Any) -> tuple[FakeServer, OpenAIHttpEngine, Any]:
        fake = await FakeServer(**server).start()
        engine = OpenAIHttpEngine.from_args(["--url", fake.url, *flags])
        opened.append((fake, engine))
        config = await engine.start(EngineContext(InstanceId(7), SystemClock(), Metrics()))
        fake.bodies.clear()
        fake.headers.clear()
        return fake, engine, config

    yield begin
    for fake, engine in opened:
        await engine.cleanup()
        await fake.close()
