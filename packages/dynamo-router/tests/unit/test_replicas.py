"""Twins of a hosted router on one bus: each counts the other's bookings."""

from __future__ import annotations

from contextlib import asynccontextmanager

from hypothesis import example, given, settings
from hypothesis import strategies as st

from dynamo_core.cards import ModelCard
from dynamo_core.clock import SystemClock
from dynamo_core.component import ComponentContext
from dynamo_core.ids import EndpointId, ReservationId, WorkerId
from dynamo_core.planes import DECISIONS, Topic
from dynamo_core.routing import RequestOutcome, RouterScope, RoutingRequest
from dynamo_core.telemetry import Metrics
from dynamo_core.tokens import pack_tokens
from dynamo_router import KvRouter, create_router
from dynamo_router._replicas import REPLICA_MESSAGE, SILENT_S, BookingEvent, ReplicaMessage, Replicas

ENDPOINT = EndpointId("ns", "backend", "generate")
CARD = ModelCard("m", kv_block_size=4)
PROMPT = pack_tokens(range(40))


@asynccontextmanager
async def twin(planes, **options):
    context = ComponentContext(
        namespace="ns",
        discovery=planes.discovery.peer(),
        request_plane=planes.plane.peer(),
        event_bus=planes.bus.peer(),
        metrics=Metrics(),
        clock=SystemClock(),
        spawn=planes.spawn,
    )
    for part in (context.discovery, context.request_plane, context.event_bus):
        await part.start()
    router = create_router(context, RouterScope(ENDPOINT, CARD, "kv", {"replica_sync": True, **options}))
    await router.start()
    try:
        yield router
    finally:
        await router.stop()
        for part in (context.event_bus, context.request_plane, context.discovery):
            await part.close()


def projected(router):
    return [(load.worker, load.projected) for load in router.loads()]


async def select(router, prompt=PROMPT):
    return await router.select(RoutingRequest("r", token_ids=prompt))


async def test_each_counts_what_the_other_books(planes):
    await planes.add(1)
    await planes.add(2)
    async with twin(planes) as one, twin(planes) as two:
        decision = await select(one)
        await planes.until(lambda: projected(two) == projected(one))
        assert sum(load.projected.active_requests for load in two.loads()) == 1
        one.first_token(decision.reservation)
        await planes.until(lambda: all(load.projected.prefill_tokens == 0 for load in two.loads()))
        one.progress(decision.reservation, 9)
        await planes.until(lambda: projected(two) == projected(one))
        assert sum(load.projected.decode_blocks for load in two.loads()) == 12
        one.complete(decision.reservation, RequestOutcome(decision.decision_id))
        await planes.until(lambda: sum(load.projected.active_requests for load in two.loads()) == 0)
        assert all(load.projected.decode_blocks == 0 for load in two.loads())


async def test_two_at_once_do_not_pile_on_one_worker(planes):
    for number in (1, 2):
        await planes.add(number)
    async with twin(planes) as one, twin(planes) as two:
        first = await select(one)
        await planes.until(lambda: sum(load.projected.active_requests for load in two.loads()) == 1)
        second = await select(two, pack_tokens(range(100, 140)))
        assert first.worker != second.worker


async def test_a_booking_may_end_at_another_replica(planes):
    await planes.add(1)
    async with twin(planes) as one, twin(planes) as two:
        decision = await select(one)
        await planes.until(lambda: decision.reservation in two._book)
        two.complete(decision.reservation, RequestOutcome(decision.decision_id))
        await planes.until(lambda: decision.reservation not in one._book)


async def test_one_that_comes_later_is_told_all(planes):
    await planes.add(1)
    async with twin(planes) as one:
        decision = await select(one)
        one.first_token(decision.reservation)
        one.progress(decision.reservation, 6)
        async with twin(planes) as two:
            await planes.until(lambda: projected(two) == projected(one))
            assert two.loads()[0].projected.decode_blocks == 11
            assert two.metrics.replicas._value.get() == 1


async def test_what_the_bus_lost_is_asked_for(planes):
    await planes.add(1)
    topic = Topic.of(DECISIONS, ENDPOINT)
    async with twin(planes) as one, twin(planes) as two:
        await planes.until(lambda: len(one._replicas) == len(two._replicas) == 1)
        planes.bus.lose_next(topic, 1)
        lost = await select(one)
        await planes.until(lambda: lost.reservation in two._book)


async def test_a_peer_that_leaves_takes_its_bookings_along(planes):
    await planes.add(1)
    async with twin(planes) as one:
        async with twin(planes) as two:
            await select(two)
            await planes.until(lambda: one.loads()[0].projected.active_requests == 1)
        await planes.until(lambda: one.loads()[0].projected.active_requests == 0)
        assert len(one._replicas) == 0


async def test_own_decisions_of_a_peer_warm_the_predicted_index(planes):
    for number in (1, 2):
        await planes.add(number, ModelCard("m", kv_block_size=4), answers=False)
    async with twin(planes, recovery_attempts=1) as one, twin(planes, recovery_attempts=1) as two:
        decision = await select(one)
        await planes.until(lambda: decision.reservation in two._book)
        one.complete(decision.reservation, RequestOutcome(decision.decision_id))
        await planes.until(lambda: decision.reservation not in two._book)
        again = await select(two)
        assert again.worker == decision.worker
        assert again.cached_tokens == 40


async def test_other_models_and_unreadable_messages_are_passed_over(planes):
    await planes.add(1)
    publisher = await planes.bus.publisher(Topic.of(DECISIONS, ENDPOINT))
    async with twin(planes) as one:
        publisher.publish(b"junk")
        event = BookingEvent("booked", "x-1", WorkerId(1))
        publisher.publish(REPLICA_MESSAGE.encode(ReplicaMessage("x", "other", 4, events=(event,))))
        publisher.publish(REPLICA_MESSAGE.encode(ReplicaMessage("x", "m", 8, events=(event,))))
        await planes.until(lambda: len(one._replicas) == 1)
        assert len(one._book) == 0


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def monotonic(self):
        return self.now_s

    def time(self):
        return self.now_s


def pair():
    """Two replicas' state without a bus: what each sends is kept."""
    made = []
    clock = Clock()
    for name in ("a", "b"):
        router = KvRouter(block_size=4, policy="kv", clock=clock)
        router.upsert_worker(WorkerId(1), CARD)
        router.upsert_worker(WorkerId(2), CARD)
        replicas = Replicas(name, "m", book=router._book, fleet=router._fleet, view=router._view, clock=clock)
        sent = []
        replicas.send = sent.append
        made.append((router, replicas, sent))
    return clock, made


def test_a_silent_peer_is_dropped():
    clock, [(one, _, _), (_, mine, _)] = pair()
    book = one._fleet.get(WorkerId(1))
    assert book is not None
    event = BookingEvent("booked", "a-1", WorkerId(1), prompt_tokens=40, uncached_tokens=40)
    mine.hear(7, ReplicaMessage("a", "m", 4, events=(event, BookingEvent("news", "a-2"))))
    assert mine._fleet.get(WorkerId(1)).prefill_tokens == 40
    clock.now_s = SILENT_S + 1
    mine.beat()
    assert (len(mine), mine._fleet.get(WorkerId(1)).prefill_tokens) == (0, 0)


class Exchange:
    """Runs a history at one replica; the other one hears of it, or of its loss."""

    def __init__(self):
        _, [(self.one, self.ours, self.sent), (self.two, self.theirs, self.back)] = pair()

    def book(self, reservation, number):
        if reservation not in self.one._book:
            candidate = self.one._fleet.get(WorkerId(number % 2 + 1))
            hashes = [number * 10 + position for position in range(number)]
            self.one._book.book(reservation, candidate, hashes, prompt_tokens=20, uncached_tokens=12, now_s=0.0)
            self.ours.booked(reservation)

    def first(self, reservation, number):
        self.ours.first_token(reservation)
        self.one._book.first_token(reservation, 0.0)

    def progress(self, reservation, number):
        held = self.one._book.get(reservation)
        if held is not None:
            before = held.output_blocks
            self.one._book.progress(reservation, number * 7, 0.0)
            self.ours.progress(reservation, number * 7, before)

    def end(self, reservation, number):
        if reservation in self.one._book:
            self.ours.ended(reservation)
            self.one._book.release(reservation, 0.0)

    def beat(self, *_):
        self.theirs.beat()
        self.ours.beat()

    def deliver(self, *, lost=False):
        while self.sent or self.back:
            for payload in self.sent:
                if lost:
                    self.theirs.lost(1)
                else:
                    self.theirs.hear(1, REPLICA_MESSAGE.decode(payload))
            self.sent.clear()
            self.theirs.answer()
            for payload in self.back:
                self.ours.hear(2, REPLICA_MESSAGE.decode(payload))
            self.back.clear()
            self.ours.answer()
            lost = False


ACTIONS = ("book", "first", "progress", "end", "beat")
STEPS = st.tuples(st.sampled_from(ACTIONS), st.integers(0, 5), st.booleans())


@settings(max_examples=100, deadline=None)
@given(st.lists(STEPS, max_size=30))
@example([("book", 3, False), ("first", 3, True)])
@example([("book", 3, False), ("progress", 3, True), ("end", 3, True), ("book", 3, True)])
def test_the_peer_ends_at_the_same_load_whatever_is_lost(history):
    exchange = Exchange()
    for action, number, lost in [*history, ("beat", 0, False)]:
        getattr(exchange, action)(ReservationId(f"a-{number}"), number)
        exchange.deliver(lost=lost)
    assert projected(exchange.two) == projected(exchange.one)
    assert all(load.prefill_tokens >= 0 and load.decode_blocks >= 0 for _, load in projected(exchange.two))
