"""Conformance of engines, whatever their modality: lifecycle, ends of choices, cancellation."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import ClassVar

import pytest

from dynamo_core.clock import SystemClock
from dynamo_core.engine import Engine, EngineConfig, EngineContext, EngineFactory
from dynamo_core.enums import FinishReason
from dynamo_core.errors import ConfigurationError
from dynamo_core.ids import new_instance_id
from dynamo_core.noop.context import LocalRequestContext
from dynamo_core.requests import GenerateChunk, GenerateRequest
from dynamo_core.telemetry import Metrics
from dynamo_core.testing._suite import ConformanceSuite
from dynamo_core.wire import GENERATE_CHUNK

MAX_LATE_CHUNKS = 2
"""Chunks a choice may still give after a stop: one that was on its way, and the terminal one."""


class EngineLifecycleConformance(ConformanceSuite, suite=True):
    """Every ``Engine`` must pass this; engines that give tokens pass ``EngineConformance``, which includes it.

    Attributes:
        factory: The engine's entry point, whose refusal of unknown flags is checked.
    """

    factory: ClassVar[EngineFactory]

    @abstractmethod
    def make_engine(self) -> Engine:
        """Return a new engine, not started."""
        ...

    @abstractmethod
    def make_request(self, request_id: str) -> GenerateRequest:
        """Return a short request that ends on its own."""
        ...

    @abstractmethod
    def make_long_request(self, request_id: str) -> GenerateRequest:
        """Return a request with at least 64 chunks to give, so that it can be stopped on the way."""
        ...

    def make_context(self) -> EngineContext:
        """Return what the engine is given at start."""
        return EngineContext(instance_id=new_instance_id(), clock=SystemClock(), metrics=Metrics())

    @asynccontextmanager
    async def started(self) -> AsyncGenerator[tuple[Engine, EngineConfig]]:
        """Yield a started engine, and clean it up."""
        engine = self.make_engine()
        try:
            config = await self.within(engine.start(self.make_context()))
            yield engine, config
        finally:
            await self.within(engine.cleanup())

    async def chunks(
        self, engine: Engine, request: GenerateRequest, context: LocalRequestContext | None = None
    ) -> list[GenerateChunk]:
        """Generate to the end."""
        context = context or LocalRequestContext(request.request_id)
        return await self.within(collect(engine.generate(request, context)))

    async def test_cleanup_without_start(self) -> None:
        engine = self.make_engine()
        await self.within(engine.cleanup())
        await self.within(engine.cleanup())

    async def test_cleanup_twice(self) -> None:
        engine = self.make_engine()
        await self.within(engine.start(self.make_context()))
        await self.within(engine.cleanup())
        await self.within(engine.cleanup())

    async def test_config_describes_the_engine(self) -> None:
        async with self.started() as (_, config):
            assert config.model
            assert config.context_length >= 0
            assert config.kv_block_size >= 0
            assert config.types.request
            assert config.types.response

    async def test_unknown_flag_is_refused_by_name(self) -> None:
        with pytest.raises(ConfigurationError) as caught:
            self.factory.from_args(["--no-such-flag-anywhere"])
        assert "--no-such-flag-anywhere" in caught.value.message

    async def test_every_choice_ends_once_and_last(self) -> None:
        async with self.started() as (engine, _):
            request = self.make_request("ends")
            found = by_choice(await self.chunks(engine, request))
            assert sorted(found) == list(range(request.sampling.n))
            for chunks in found.values():
                assert [chunk.finish_reason is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
                assert chunks[-1].finish_reason not in (FinishReason.ERROR, FinishReason.CANCELLED)

    async def test_chunks_survive_the_wire(self) -> None:
        async with self.started() as (engine, _):
            for chunk in await self.chunks(engine, self.make_request("wire")):
                assert GENERATE_CHUNK.decode(GENERATE_CHUNK.encode(chunk)) == chunk

    async def test_concurrent_requests_do_not_mix(self) -> None:
        async with self.started() as (engine, _):
            alone = await self.chunks(engine, self.make_request("alone"))
            together = await asyncio.gather(*(self.chunks(engine, self.make_request(f"c-{i}")) for i in range(8)))
            assert [outputs(chunks) for chunks in together] == [outputs(alone)] * 8

    async def test_stop_ends_every_choice_as_cancelled(self) -> None:
        async with self.started() as (engine, _):
            request = self.make_long_request("stop")
            context = LocalRequestContext(request.request_id)
            late: list[GenerateChunk] = []
            async with asyncio.timeout(self.patience_s):
                async for chunk in engine.generate(request, context):
                    if context.stopped:
                        late.append(chunk)
                    context.stop()
            assert_cancelled(late, request)

    async def test_stop_before_the_first_chunk(self) -> None:
        async with self.started() as (engine, _):
            request = self.make_long_request("early")
            context = LocalRequestContext(request.request_id)
            context.stop()
            assert_cancelled(await self.chunks(engine, request, context), request)

    async def test_abort_ends_one_request_as_cancelled(self) -> None:
        async with self.started() as (engine, _):
            request = self.make_long_request("abort")
            other = asyncio.create_task(self.chunks(engine, self.make_request("other")))
            late: list[GenerateChunk] = []
            aborted = False
            async with asyncio.timeout(self.patience_s):
                async for chunk in engine.generate(request, LocalRequestContext(request.request_id)):
                    if aborted:
                        late.append(chunk)
                    else:
                        await engine.abort(request.request_id)
                        aborted = True
            assert_cancelled(late, request)
            assert (await other)[-1].finish_reason is not FinishReason.CANCELLED

    async def test_abort_of_an_unknown_request_is_ignored(self) -> None:
        async with self.started() as (engine, _):
            await self.within(engine.abort("nobody"))
            await self.chunks(engine, self.make_request("nobody"))
            await self.within(engine.abort("nobody"))
            chunks = await self.chunks(engine, self.make_request("nobody"))
            assert chunks[-1].finish_reason is not FinishReason.CANCELLED

    async def test_closing_the_iterator_frees_the_request(self) -> None:
        async with self.started() as (engine, _):
            stream = engine.generate(self.make_long_request("left"), LocalRequestContext("left"))
            await self.within(anext(stream))
            assert isinstance(stream, AsyncGenerator)
            await self.within(stream.aclose())
            await self.within(engine.drain())

    async def test_cancelling_the_reader_frees_the_request(self) -> None:
        async with self.started() as (engine, _):
            first = asyncio.Event()

            async def read() -> None:
                async for _ in engine.generate(self.make_long_request("cut"), LocalRequestContext("cut")):
                    first.set()

            reader = asyncio.create_task(read())
            await self.within(first.wait())
            reader.cancel()
            await asyncio.wait([reader])
            await self.within(engine.drain())

    async def test_drain_waits_for_running_requests(self) -> None:
        async with self.started() as (engine, _):
            stream = engine.generate(self.make_request("running"), LocalRequestContext("running"))
            chunks = [await self.within(anext(stream))]
            draining = asyncio.create_task(engine.drain())
            chunks += await self.within(collect(stream))
            await self.within(draining)
            assert chunks[-1].finish_reason not in (None, FinishReason.CANCELLED, FinishReason.ERROR)

    async def test_drain_of_an_idle_engine_returns(self) -> None:
        async with self.started() as (engine, _):
            await self.within(engine.drain())


async def collect(stream: AsyncIterator[GenerateChunk]) -> list[GenerateChunk]:
    """Read a stream to its end."""
    return [chunk async for chunk in stream]


def by_choice(chunks: Sequence[GenerateChunk]) -> dict[int, list[GenerateChunk]]:
    """Group chunks by choice, in order."""
    found: dict[int, list[GenerateChunk]] = {}
    for chunk in chunks:
        found.setdefault(chunk.choice, []).append(chunk)
    return found


def outputs(chunks: Sequence[GenerateChunk]) -> dict[int, tuple[bytes, str, tuple[object, ...], FinishReason | None]]:
    """Return what each choice gave, however it was cut into chunks."""
    return {
        choice: (
            b"".join(chunk.token_ids for chunk in group),
            "".join(chunk.text or "" for chunk in group),
            tuple(part for chunk in group for part in chunk.parts),
            group[-1].finish_reason,
        )
        for choice, group in by_choice(chunks).items()
    }


def assert_cancelled(chunks: Sequence[GenerateChunk], request: GenerateRequest) -> None:
    """Check that each choice ended as cancelled within one step."""
    found = by_choice(chunks)
    assert sorted(found) == list(range(request.sampling.n))
    for group in found.values():
        assert group[-1].finish_reason is FinishReason.CANCELLED
        assert len(group) <= MAX_LATE_CHUNKS
