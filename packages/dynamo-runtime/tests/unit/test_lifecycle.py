from __future__ import annotations

import asyncio

import pytest

from dynamo_core.clock import SystemClock
from dynamo_core.errors import ConfigurationError, InternalError
from dynamo_runtime._lifecycle import Lifecycle, finishes_before


class Part:
    def __init__(self, name: str, calls: list[str], fail_in: str = "", error: Exception | None = None) -> None:
        self.name = name
        self._calls = calls
        self._fail_in = fail_in
        self._error = error or RuntimeError("broken")

    async def start(self) -> None:
        self._note("start")

    async def drain(self, timeout_s: float) -> None:
        self._note("drain")

    async def stop(self) -> None:
        self._note("stop")

    def _note(self, step: str) -> None:
        self._calls.append(f"{step} {self.name}")
        if step == self._fail_in:
            raise self._error


class Stuck(Part):
    async def drain(self, timeout_s: float) -> None:
        await super().drain(timeout_s)
        await asyncio.Event().wait()


def lifecycle_of(*parts: Part) -> Lifecycle:
    return Lifecycle([(part.name, part) for part in parts], SystemClock())


async def test_starts_in_order_and_drains_and_stops_in_reverse() -> None:
    calls: list[str] = []
    lifecycle = lifecycle_of(Part("a", calls), Part("b", calls))
    await lifecycle.start()
    assert await lifecycle.drain(5.0)
    await lifecycle.stop()
    await lifecycle.stop()
    assert calls == ["start a", "start b", "drain b", "drain a", "stop b", "stop a"]


async def test_a_failed_start_is_stopped_but_not_drained_and_names_the_component() -> None:
    calls: list[str] = []
    lifecycle = lifecycle_of(Part("a", calls), Part("b", calls, fail_in="start"), Part("c", calls))
    with pytest.raises(InternalError, match="b failed in start: RuntimeError: broken"):
        await lifecycle.start()
    await lifecycle.drain(5.0)
    await lifecycle.stop()
    assert calls == ["start a", "start b", "drain a", "stop b", "stop a"]


async def test_a_typed_error_of_start_stays_as_it_is() -> None:
    error = ConfigurationError("no such model")
    with pytest.raises(ConfigurationError) as caught:
        await lifecycle_of(Part("a", [], fail_in="start", error=error)).start()
    assert caught.value is error


async def test_one_component_that_cannot_drain_or_stop_does_not_keep_the_others() -> None:
    calls: list[str] = []
    lifecycle = lifecycle_of(Part("a", calls), Part("b", calls, fail_in="drain"), Part("c", calls, fail_in="stop"))
    await lifecycle.start()
    await lifecycle.drain(5.0)
    await lifecycle.stop()
    assert calls[3:] == ["drain c", "drain b", "drain a", "stop c", "stop b", "stop a"]


async def test_a_stuck_drain_is_cut_at_the_deadline_and_reported() -> None:
    calls: list[str] = []
    lifecycle = lifecycle_of(Part("a", calls), Stuck("b", calls))
    await lifecycle.start()
    assert not await lifecycle.drain(0.0)
    assert calls[2:] == ["drain b", "drain a"]


async def test_finishes_before_cancels_whichever_is_left() -> None:
    ended: list[str] = []

    async def forever(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(name)

    async def at_once() -> None:
        return None

    assert await finishes_before(at_once(), forever("limit"))
    assert not await finishes_before(forever("work"), at_once())
    assert ended == ["limit", "work"]


async def test_finishes_before_passes_errors_on() -> None:
    async def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await finishes_before(fail(), asyncio.Event().wait())
