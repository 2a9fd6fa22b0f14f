"""A suite holds its subclasses to every test, and its tests catch broken implementations."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import ClassVar

import pytest

from dynamo_core.discovery import Lease
from dynamo_core.engine import EngineFactory
from dynamo_core.errors import UnavailableError
from dynamo_core.kv import BlockDescriptor
from dynamo_core.memory import MemoryDiscovery, MemoryEventBus
from dynamo_core.memory.event_bus import MemorySubscription
from dynamo_core.noop import DictBlockStore, EchoEngine, RoundRobinRouter
from dynamo_core.planes import RequestContext, Topic
from dynamo_core.requests import GenerateChunk, GenerateRequest
from dynamo_core.routing import RouterScope, RoutingDecision, RoutingRequest
from dynamo_core.testing import (
    BlockStoreConformance,
    ConformanceSuite,
    DiscoveryConformance,
    EngineConformance,
    EventBusConformance,
    RouterConformance,
)


class Suite(ConformanceSuite, suite=True):
    def test_rule(self) -> None:
        pass

    async def test_async_rule(self) -> None:
        pass


def test_replacing_a_test_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Quiet\.test_rule replaces"):

        class Quiet(Suite):
            def test_rule(self) -> None:
                pass


def test_deleting_a_test_is_refused() -> None:
    with pytest.raises(TypeError, match="replaces a test of the contract"):

        class Deleted(Suite):
            test_rule = None  # pyright: ignore[reportAssignmentType] - what is tested


def test_replacing_through_a_mixin_is_refused() -> None:
    class Mixin:
        def test_rule(self) -> None:
            pass

    with pytest.raises(TypeError):

        class Mixed(Mixin, Suite):
            pass


def test_xfail_without_a_reason_is_refused() -> None:
    with pytest.raises(TypeError):

        class Silent(Suite):
            @pytest.mark.xfail
            def test_rule(self) -> None:
                pass


def test_skip_is_refused() -> None:
    with pytest.raises(TypeError):

        class Skipped(Suite):
            @pytest.mark.skip(reason="slow")
            def test_rule(self) -> None:
                pass


def test_reasoned_xfail_and_further_tests_are_allowed() -> None:
    class Honest(Suite):
        @pytest.mark.xfail(reason="the backend cannot")
        def test_rule(self) -> None:
            super().test_rule()

        def test_of_its_own(self) -> None:
            pass

    assert Honest().test_rule() is None


def test_grandchildren_are_held_too() -> None:
    class Child(Suite):
        pass

    with pytest.raises(TypeError):

        class Grandchild(Child):
            async def test_async_rule(self) -> None:
                pass


def test_asynchronous_tests_are_marked() -> None:
    marks = [mark.name for mark in Suite.test_async_rule.pytestmark]  # type: ignore[attr-defined] - set by the suite
    assert marks == ["asyncio"]


async def test_patience_ends() -> None:
    class Impatient(Suite):
        patience_s: ClassVar[float] = 0.01

    with pytest.raises(TimeoutError):
        await Impatient().until(lambda: False)
    with pytest.raises(TimeoutError):
        await Impatient().within(asyncio.Event().wait())


async def test_running_closes_what_failed_to_start() -> None:
    class Broken(MemoryDiscovery):
        async def start(self) -> None:
            raise UnavailableError("no backend")

    parts = (MemoryDiscovery(), Broken())
    with pytest.raises(UnavailableError):
        async with Suite().running(*parts):
            pass
    assert [part.status().connected for part in parts] == [False, False]


class LeakyDiscovery(MemoryDiscovery):
    """Takes writes under ended leases."""

    async def put(self, key: str, value: bytes, *, lease: Lease | None = None) -> int:
        return await super().put(key, value, lease=lease if lease is not None and lease.valid else None)


async def test_discovery_suite_catches_a_dead_lease_that_writes() -> None:
    class Broken(DiscoveryConformance):
        async def make_discovery(self) -> MemoryDiscovery:
            return LeakyDiscovery()

    with pytest.raises(pytest.fail.Exception):
        await Broken().test_ended_lease_is_refused()


class SilentBus(MemoryEventBus):
    """Drops what a slow subscriber missed without a word."""

    async def subscribe(self, topic: Topic) -> MemorySubscription:
        subscription = await super().subscribe(topic)
        subscription._drop = lambda item: None  # type: ignore[method-assign] - breaks it on purpose
        return subscription


async def test_event_bus_suite_catches_silent_loss() -> None:
    class Broken(EventBusConformance):
        first: SilentBus | None = None

        async def make_bus(self) -> MemoryEventBus:
            if self.first is None:
                self.first = SilentBus()
                return self.first
            return SilentBus(topics=self.first._topics)

    with pytest.raises(AssertionError):
        await Broken().test_missed_events_are_reported_as_gaps()


class ForgetfulEngine(EchoEngine):
    """Starts positions over on a continuation."""

    async def generate(self, request: GenerateRequest, context: RequestContext) -> AsyncIterator[GenerateChunk]:
        first: int | None = None
        async for chunk in super().generate(request, context):
            first = chunk.first_index if first is None else first
            yield GenerateChunk(
                token_ids=chunk.token_ids,
                first_index=chunk.first_index - first,
                choice=chunk.choice,
                attempt=chunk.attempt,
                finish_reason=chunk.finish_reason,
                usage=chunk.usage,
            )


async def test_engine_suite_catches_positions_that_start_over() -> None:
    class Broken(EngineConformance):
        factory: ClassVar[EngineFactory] = ForgetfulEngine

        def make_engine(self) -> EchoEngine:
            return ForgetfulEngine()

    await Broken().test_first_index_counts_without_holes()
    with pytest.raises(AssertionError):
        await Broken().test_continuation_gives_the_rest(3, 0.0)


class DeafEngine(EchoEngine):
    """Does not look at the context."""

    def generate(self, request: GenerateRequest, context: RequestContext) -> AsyncIterator[GenerateChunk]:
        class Going:
            stopped = False

        return super().generate(request, Going())  # type: ignore[arg-type] - breaks it on purpose


async def test_engine_suite_catches_deafness_to_stop() -> None:
    class Broken(EngineConformance):
        factory: ClassVar[EngineFactory] = DeafEngine

        def make_engine(self) -> EchoEngine:
            return DeafEngine()

    with pytest.raises(AssertionError):
        await Broken().test_stop_ends_every_choice_as_cancelled()


class FirstRouter(RoundRobinRouter):
    """Always asks as if nothing were excluded."""

    async def select(self, request: RoutingRequest) -> RoutingDecision:
        return await super().select(RoutingRequest(request.request_id, prompt_tokens=request.prompt_tokens))


async def test_router_suite_catches_disobedience() -> None:
    class Broken(RouterConformance):
        def make_router(self, context: object, scope: RouterScope) -> RoundRobinRouter:
            return FirstRouter(context, scope)  # type: ignore[arg-type] - the suite's own context

    with pytest.raises(AssertionError):
        await Broken().test_excluded_workers_are_left_out()


class LyingStore(DictBlockStore):
    """Says nothing of what it evicted."""

    def put(self, blocks: Sequence[BlockDescriptor], data: Sequence[bytes | memoryview]) -> list[int]:
        super().put(blocks, data)
        return []


def test_block_store_suite_catches_silent_eviction() -> None:
    class Broken(BlockStoreConformance):
        def make_store(self, capacity_blocks: int) -> DictBlockStore:
            return LyingStore(capacity_blocks)

    with pytest.raises(AssertionError):
        Broken().test_evicted_blocks_are_named_and_gone()
