"""Conformance of routers: who is chosen, who is not, and what is booked."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from dynamo_core.cards import ModelCard, ModelRuntimeConfig
from dynamo_core.component import ComponentContext
from dynamo_core.discovery import Instance, ModelRecord
from dynamo_core.errors import ConfigurationError, InvalidRequestError, UnavailableError
from dynamo_core.ids import EndpointId, ReservationId, WorkerId
from dynamo_core.memory import MemoryDiscovery, MemoryEventBus, MemoryRequestPlane
from dynamo_core.requests import RoutingHints
from dynamo_core.routing import (
    RequestOutcome,
    Router,
    RouterScope,
    RoutingDecision,
    RoutingRequest,
    SupportsStaticWorkers,
)
from dynamo_core.telemetry import Metrics
from dynamo_core.testing._clock import FakeClock
from dynamo_core.testing._suite import ConformanceSuite
from dynamo_core.tokens import BlockHasher, pack_tokens
from dynamo_core.wire import INSTANCE, MODEL_RECORD, ROUTING_DECISION

ENDPOINT = EndpointId("conformance", "backend", "generate")
BLOCK_SIZE = 4


class RouterHarness:
    """A router over in-process planes and a fake clock, with the workers that discovery shows it."""

    def __init__(self, router: Router, context: ComponentContext, clock: FakeClock, card: ModelCard) -> None:
        self.router = router
        self.context = context
        self.clock = clock
        self.card = card
        self._numbers = iter(range(10**6))

    async def register(self, *instances: int, endpoint: EndpointId = ENDPOINT) -> None:
        """Put instances and their cards into discovery."""
        for instance_id in instances:
            instance = Instance(endpoint, instance_id, f"mem://{instance_id}")
            record = ModelRecord(endpoint, instance_id, self.card)
            await self.context.discovery.put(record.key, MODEL_RECORD.encode(record))
            await self.context.discovery.put(instance.key, INSTANCE.encode(instance))

    async def deregister(self, instance_id: int) -> None:
        """Take an instance and its card out of discovery."""
        await self.context.discovery.delete(Instance(ENDPOINT, instance_id, "").key)
        await self.context.discovery.delete(ModelRecord(ENDPOINT, instance_id, self.card).key)

    def request(self, **fields: Any) -> RoutingRequest:
        """Return a request for a prompt of its own, hashed."""
        number = next(self._numbers)
        tokens = pack_tokens(range(number * 100, number * 100 + 2 * BLOCK_SIZE))
        hashes = BlockHasher(BLOCK_SIZE).hash_tokens(tokens)
        values: dict[str, Any] = {
            "request_id": f"r-{number}",
            "model": self.card.name,
            "prompt_tokens": 2 * BLOCK_SIZE,
            "block_size": BLOCK_SIZE,
            "local_hashes": hashes.local,
            "sequence_hashes": hashes.sequence,
            "token_ids": tokens,
        }
        return RoutingRequest(**(values | fields))

    async def select(self, **fields: Any) -> RoutingDecision:
        """Select for a request of its own, on the fake clock."""
        return await self.clock.run(self.router.select(self.request(**fields)))

    async def chosen(self, count: int, **fields: Any) -> set[int]:
        """Instances chosen for that many requests."""
        return {(await self.select(**fields)).worker.instance_id for _ in range(count)}

    def active(self) -> int:
        """Requests that the router has booked."""
        return sum(load.projected.active_requests for load in self.router.loads())


class RouterConformance(ConformanceSuite, suite=True):
    """Every ``Router`` must pass this."""

    @abstractmethod
    def make_router(self, context: ComponentContext, scope: RouterScope) -> Router:
        """Return a router, not started."""
        ...

    @asynccontextmanager
    async def harness(self, *instances: int, ranks: int = 1) -> AsyncGenerator[RouterHarness]:
        """Yield a started router that knows these instances."""
        clock = FakeClock()
        card = ModelCard("model", kv_block_size=BLOCK_SIZE, runtime_config=ModelRuntimeConfig(data_parallel_size=ranks))
        tasks: list[asyncio.Task[None]] = []

        def spawn(coroutine: Coroutine[Any, Any, None], /, *, name: str) -> asyncio.Task[None]:
            tasks.append(asyncio.create_task(coroutine, name=name))
            return tasks[-1]

        context = ComponentContext(
            namespace="conformance",
            discovery=MemoryDiscovery(),
            request_plane=MemoryRequestPlane(clock=clock),
            event_bus=MemoryEventBus(clock=clock),
            metrics=Metrics(),
            clock=clock,
            spawn=spawn,
        )
        router = self.make_router(context, RouterScope(ENDPOINT, card))
        found = RouterHarness(router, context, clock, card)
        await found.register(*instances)
        try:
            await clock.run(router.start())
            await self.known(found, len(instances) * ranks)
            yield found
        finally:
            await clock.run(router.stop())
            await clock.run(router.stop())
            await context.event_bus.close()
            await context.request_plane.close()
            await context.discovery.close()
            await clock.settle()
            failed = [task.exception() for task in tasks if task.done() and not task.cancelled()]
            left = [task.get_name() for task in tasks if not task.done()]
            for task in tasks:
                task.cancel()
            assert [error for error in failed if error is not None] == []
            assert left == [], "tasks outlive stop()"

    async def known(self, found: RouterHarness, count: int) -> None:
        """Wait until the router knows that many workers."""
        await self.until(lambda: len(found.router.workers()) == count)

    async def test_no_worker_is_unavailable(self) -> None:
        async with self.harness() as found:
            with pytest.raises(UnavailableError):
                await found.select()

    async def test_receipt_names_the_request_and_a_known_worker(self) -> None:
        async with self.harness(1, 2) as found:
            request = found.request()
            decision = await found.clock.run(found.router.select(request))
            assert decision.request_id == request.request_id
            assert decision.worker in found.router.workers()
            assert decision.decision_id
            assert decision.policy
            assert decision.reservation
            assert decision.decided_at_s >= found.clock.time() - 60
            assert ROUTING_DECISION.decode(ROUTING_DECISION.encode(decision)) == decision

    async def test_concurrent_decisions_have_ids_of_their_own(self) -> None:
        async with self.harness(1, 2, 3) as found:
            work = asyncio.gather(*(found.router.select(found.request()) for _ in range(40)))
            decisions = await found.clock.run(work)
            assert len({decision.decision_id for decision in decisions}) == 40
            assert len({decision.reservation for decision in decisions}) == 40

    async def test_load_spreads_over_all_workers(self) -> None:
        async with self.harness(1, 2, 3) as found:
            assert await found.chosen(30) == {1, 2, 3}

    async def test_workers_follow_discovery(self) -> None:
        async with self.harness(1) as found:
            await found.register(2)
            await self.known(found, 2)
            await found.deregister(1)
            await self.known(found, 1)
            assert found.router.workers() == [WorkerId(2)]
            assert await found.chosen(3) == {2}

    async def test_other_endpoints_are_not_candidates(self) -> None:
        async with self.harness(1) as found:
            await found.register(9, endpoint=EndpointId("conformance", "prefill", "generate"))
            await found.register(2)
            await self.known(found, 2)
            assert sorted(found.router.workers()) == [WorkerId(1), WorkerId(2)]

    async def test_every_data_parallel_rank_is_a_worker(self) -> None:
        async with self.harness(1, 2, ranks=2) as found:
            assert sorted(found.router.workers()) == [WorkerId(i, rank) for i in (1, 2) for rank in (0, 1)]

    async def test_excluded_workers_are_left_out(self) -> None:
        async with self.harness(1, 2, 3) as found:
            assert await found.chosen(6, excluded=(WorkerId(1), WorkerId(3))) == {2}
            with pytest.raises(UnavailableError):
                await found.select(excluded=(WorkerId(1), WorkerId(2), WorkerId(3)))

    async def test_excluded_and_allowed_instances_of_the_hints(self) -> None:
        async with self.harness(1, 2, 3) as found:
            assert await found.chosen(6, hints=RoutingHints(excluded_instance_ids=(2,))) <= {1, 3}
            assert await found.chosen(6, hints=RoutingHints(allowed_instance_ids=(3,))) == {3}
            with pytest.raises(UnavailableError):
                await found.select(hints=RoutingHints(allowed_instance_ids=(3,), excluded_instance_ids=(3,)))

    async def test_pin_is_obeyed(self) -> None:
        async with self.harness(1, 2, 3, ranks=2) as found:
            assert await found.chosen(4, hints=RoutingHints(instance_id=2)) == {2}
            decision = await found.select(hints=RoutingHints(instance_id=3, dp_rank=1))
            assert decision.worker == WorkerId(3, 1)

    async def test_pin_to_an_unknown_worker_is_invalid(self) -> None:
        async with self.harness(1) as found:
            with pytest.raises(InvalidRequestError):
                await found.select(hints=RoutingHints(instance_id=77))

    async def test_inhibited_worker_is_left_out_for_a_while(self) -> None:
        async with self.harness(1, 2) as found:
            found.router.inhibit(WorkerId(1), "connection refused")
            assert await found.chosen(4) == {2}
            assert sorted(found.router.workers()) == [WorkerId(1), WorkerId(2)]

    async def test_selection_books_and_completion_frees(self) -> None:
        async with self.harness(1) as found:
            decision = await found.select()
            assert decision.reservation is not None
            assert found.active() == 1
            assert found.router.loads()[0].projected.prefill_tokens == 2 * BLOCK_SIZE
            found.router.first_token(decision.reservation)
            assert found.router.loads()[0].projected.prefill_tokens == 0
            found.router.progress(decision.reservation, 5)
            assert found.active() == 1
            outcome = RequestOutcome(decision.decision_id, output_tokens=5)
            found.router.complete(decision.reservation, outcome)
            found.router.complete(decision.reservation, outcome)
            assert found.active() == 0

    async def test_asking_books_nothing(self) -> None:
        async with self.harness(1, 2) as found:
            decision = await found.select(reserve=False)
            assert decision.reservation is None
            assert found.active() == 0

    async def test_unknown_reservations_are_ignored(self) -> None:
        async with self.harness(1) as found:
            unknown = ReservationId("nobody's")
            found.router.first_token(unknown)
            found.router.progress(unknown, 3)
            decision = await found.select()
            found.router.complete(unknown, RequestOutcome(decision.decision_id))
            assert found.active() == 1

    async def test_other_hash_algorithm_is_refused(self) -> None:
        async with self.harness(1) as found:
            with pytest.raises(InvalidRequestError):
                await found.select(algorithm="sha256-v9")

    async def test_other_block_size_is_refused(self) -> None:
        async with self.harness(1) as found:
            with pytest.raises(InvalidRequestError):
                await found.select(block_size=2 * BLOCK_SIZE)

    async def test_static_workers_come_and_go(self) -> None:
        async with self.harness() as found:
            if not isinstance(found.router, SupportsStaticWorkers):
                return
            found.router.upsert_worker(WorkerId(5), found.card)
            found.router.upsert_worker(WorkerId(5), found.card)
            assert found.router.workers() == [WorkerId(5)]
            assert await found.chosen(2) == {5}
            found.router.remove_worker(WorkerId(5))
            found.router.remove_worker(WorkerId(5))
            with pytest.raises(UnavailableError):
                await found.select()

    async def test_unknown_option_is_a_configuration_error(self) -> None:
        async with self.harness() as found:
            scope = RouterScope(ENDPOINT, found.card, options={"no_such_option": 1})
            with pytest.raises(ConfigurationError) as caught:
                self.make_router(found.context, scope)
            assert "no_such_option" in caught.value.message
