from __future__ import annotations

import asyncio
from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_core.cards import ModelCard
from dynamo_core.errors import (
    CapacityExhaustedError,
    ConfigurationError,
    DeadlineExceededError,
    InvalidRequestError,
    UnavailableError,
)
from dynamo_core.ids import WorkerId
from dynamo_core.load import QueuedLoad
from dynamo_core.requests import RoutingHints
from dynamo_core.routing import RequestOutcome, RoutingDecision, RoutingRequest
from dynamo_core.testing import FakeClock
from dynamo_core.tokens import pack_tokens
from dynamo_router import KvRouter, RouterSettings
from dynamo_router._queue import ClassOptions, FairQueue, Waiting

A, B = WorkerId(1), WorkerId(2)


def anyone(entry):
    return True


def drain(queue, can_go=anyone):
    found = []
    while (entry := queue.pop(can_go)) is not None:
        found.append(entry.item)
    return found


def one_class(order):
    return FairQueue({"default": ClassOptions(order=order)})


def test_orders_within_a_class():
    entries = [("a", 5, 0), ("b", 1, 0), ("c", 9, 3), ("d", 3, 0)]
    expected = {"fcfs": "cabd", "lcfs": "cdba", "wspt": "bcda"}
    for order, served in expected.items():
        queue = one_class(order)
        for name, cost, priority in entries:
            queue.push("", Waiting(name, cost=cost, priority=priority))
        assert "".join(drain(queue)) == served
        assert len(queue) == 0


def test_the_earliest_deadline_goes_first_and_none_last():
    queue = one_class("edf")
    for name, deadline, priority in [("a", 9.0, 0), ("b", None, 0), ("c", 3.0, 0), ("d", 5.0, 1), ("e", 3.0, 0)]:
        known = {} if deadline is None else {"deadline_s": deadline}
        queue.push("", Waiting(name, cost=1, priority=priority, **known))
    assert "".join(drain(queue)) == "dceab"


def test_vtc_serves_whoever_got_least_and_gives_no_credit_for_absence():
    queue = one_class("vtc")
    served = []

    def serve():
        entry = queue.pop(anyone)
        queue.charge(entry.tenant, entry.cost)
        served.append(entry.tenant)

    for _ in range(6):
        queue.push("", Waiting("x", cost=10, tenant="big"))
    for _ in range(4):
        serve()
    for _ in range(3):
        queue.push("", Waiting("x", cost=10, tenant="late"))
    for _ in range(5):
        serve()
    assert sorted(served[4:6]) == sorted(served[6:8]) == ["big", "late"]
    assert Counter(served) == {"big": 6, "late": 3}


def test_a_burst_is_served_while_the_deficit_lasts():
    queue = FairQueue({"default": ClassOptions(quantum_tokens=10), "other": ClassOptions(quantum_tokens=10)})
    for number in range(4):
        queue.push("", Waiting(number, cost=3))
        queue.push("other", Waiting(f"o{number}", cost=3))
    assert drain(queue)[:4] == [0, 1, 2, "o0"]


def test_large_heads_are_paid_for_at_once():
    queue = FairQueue({"default": ClassOptions(quantum_tokens=1000), "other": ClassOptions(quantum_tokens=2000)})
    first, second = queue._ring
    queue.push("", Waiting("a", cost=7000))
    queue.push("other", Waiting("b", cost=9000))
    assert queue.pop(anyone).item == "b"
    assert (first.deficit, second.deficit) == (5000, 0)
    queue.push("other", Waiting("c", cost=9000))
    assert drain(queue) == ["a", "c"]


def test_classes_share_tokens_as_their_quanta():
    queue = FairQueue({"premium": ClassOptions(quantum_tokens=512), "default": ClassOptions(quantum_tokens=128)})
    for _ in range(400):
        queue.push("premium", Waiting("premium", cost=512))
        queue.push("", Waiting("default", cost=512))
    counts = Counter(queue.pop(anyone).item for _ in range(320))
    assert 254 <= counts["premium"] <= 258


def test_a_blocked_lane_holds_up_nobody_else():
    queue = FairQueue()
    queue.push("", Waiting("pinned", cost=1, lane=1))
    queue.push("", Waiting("free", cost=1))
    assert drain(queue, lambda entry: entry.lane is None) == ["free"]
    assert drain(queue) == ["pinned"]


def test_those_that_leave_are_not_served():
    queue = FairQueue()
    entries = [Waiting(number, cost=1) for number in range(5)]
    for entry in entries:
        queue.push("", entry)
    queue.discard(entries[2])
    queue.discard(entries[2])
    assert len(queue) == 4
    assert drain(queue) == [0, 1, 3, 4]
    queue.discard(entries[0])
    assert len(queue) == 0


def test_refuses_what_does_not_fit():
    queue = FairQueue({"default": ClassOptions(max_requests=1)})
    queue.push("", Waiting(1, cost=1))
    with pytest.raises(CapacityExhaustedError) as caught:
        queue.push("", Waiting(2, cost=1))
    assert caught.value.reason == "capacity.queue_full"
    with pytest.raises(InvalidRequestError, match="gold"):
        queue.push("gold", Waiting(2, cost=1))
    for bad in ({"x": {"quantum_tokens": 0}}, {"x": {"colour": 1}}):
        with pytest.raises(ConfigurationError, match="queue_classes"):
            KvRouter(block_size=4, settings=RouterSettings(max_queued_requests=1, queue_classes=bad))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 120)), min_size=1, max_size=60),
)
def test_shares_are_fair_to_within_a_quantum_and_a_request(quanta, requests):
    names = [f"c{number}" for number in range(len(quanta))]
    options = {name: ClassOptions(quantum_tokens=q) for name, q in zip(names, quanta, strict=True)}
    queue = FairQueue({"default": ClassOptions(quantum_tokens=1), **options})
    left, served, largest = Counter(), Counter(), 1
    for number, cost in requests:
        name = names[number % len(names)]
        queue.push(name, Waiting((name, cost), cost=cost))
        left[name] += 1
        largest = max(largest, cost)
    order = []
    while all(left[name] for name in names):
        name, cost = queue.pop(anyone).item
        order.append(name)
        served[name] += cost
        left[name] -= 1
        rounds = [served[n] / options[n].quantum_tokens for n in names]
        slack = [largest / options[n].quantum_tokens + 1 for n in names]
        assert max(rounds) - min(rounds) <= sum(sorted(slack)[-2:]) + 1
    assert len(order) + len(drain(queue)) == len(requests)


def busy_router(*workers, **options):
    options.setdefault("max_queued_requests", 10)
    router = KvRouter(
        block_size=4, clock=FakeClock(), settings=RouterSettings(busy_prefill_tokens=30, **options), policy="kv"
    )
    for worker in workers:
        router.upsert_worker(worker, ModelCard("m", kv_block_size=4))
    return router


def ask(name="r", length=40, **hints):
    start = sum(name.encode()) * 1000
    return RoutingRequest(name, token_ids=pack_tokens(range(start, start + length)), hints=RoutingHints(**hints))


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def test_requests_wait_for_room_in_turn():
    router = busy_router(A)
    first = await router.select(ask("first"))
    waiting = [asyncio.create_task(router.select(ask(name))) for name in ("second", "third")]
    await settle()
    assert router.queued() == QueuedLoad(2, 80, 80)
    await router._clock.advance(3)
    router.first_token(first.reservation)
    await settle()
    assert [task.done() for task in waiting] == [True, False]
    second = waiting[0].result()
    assert second.queued_s == 3
    router.complete(second.reservation, RequestOutcome(second.decision_id))
    assert (await waiting[1]).request_id == "third"
    assert router.queued().requests == 0


async def test_a_new_worker_takes_those_that_wait():
    router = busy_router(A)
    await router.select(ask("first"))
    task = asyncio.create_task(router.select(ask("second")))
    await settle()
    router.upsert_worker(B, ModelCard("m", kv_block_size=4))
    assert (await task).worker == B


async def test_newcomers_do_not_overtake():
    router = busy_router(A, B)
    first = await router.select(ask("first"))
    await router.select(ask("other"))
    large = asyncio.create_task(router.select(ask("large", priority=0)))
    await settle()
    small = asyncio.create_task(router.select(ask("small", length=4)))
    await settle()
    router.first_token(first.reservation)
    await settle()
    assert large.done()
    assert not small.done()
    small.cancel()
    await asyncio.gather(small, return_exceptions=True)
    assert router.queued().requests == 0


async def test_impossible_requests_do_not_wait():
    router = busy_router(A)
    await router.select(ask("first"))
    task = asyncio.create_task(router.select(ask("second")))
    await settle()
    with pytest.raises(InvalidRequestError):
        await router.select(ask("third", instance_id=77))
    router.remove_worker(A)
    with pytest.raises(UnavailableError):
        await task


async def test_leaving_at_the_last_moment_frees_the_booking():
    router = busy_router(A)
    first = await router.select(ask("first"))
    task = asyncio.create_task(router.select(ask("second")))
    await settle()
    router.first_token(first.reservation)
    assert router.loads()[0].projected.active_requests == 2
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert router.loads()[0].projected.active_requests == 1
    assert router.loads()[0].projected.prefill_tokens == 0


async def test_a_full_queue_refuses():
    router = busy_router(A, max_queued_requests=1)
    await router.select(ask("first"))
    task = asyncio.create_task(router.select(ask("second")))
    await settle()
    with pytest.raises(CapacityExhaustedError) as caught:
        await router.select(ask("third"))
    assert caught.value.reason == "capacity.queue_full"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_deadlines_order_the_queue_and_end_the_wait():
    router = busy_router(A, queue_classes={"default": {"order": "edf"}})
    first = await router.select(ask("first"))
    tasks = {
        name: asyncio.create_task(router.select(ask(name), deadline_s=deadline))
        for name, deadline in (("patient", None), ("soon", 2.0), ("later", 10.0))
    }
    await settle()
    await router._clock.advance(2)
    router.expire()
    with pytest.raises(DeadlineExceededError, match=r"waited 2.000 s"):
        await tasks["soon"]
    assert router.queued().requests == 2
    router.complete(first.reservation, RequestOutcome(first.decision_id))
    later = await tasks["later"]
    assert not tasks["patient"].done()
    router.complete(later.reservation, RequestOutcome(later.decision_id))
    assert (await tasks["patient"]).request_id == "patient"


async def test_a_deadline_among_the_hints_orders_the_queue():
    router = busy_router(A, queue_classes={"default": {"order": "edf"}})
    held = await router.select(ask("first"))
    tasks: list[asyncio.Task[RoutingDecision]] = []
    for name, deadline in (("patient", None), ("later", 9.0), ("soon", 3.0)):
        hurried = msgspec.structs.replace(ask(name), hints=RoutingHints(deadline_s=deadline))
        tasks.append(asyncio.create_task(router.select(hurried)))
    await settle()
    served: list[str] = []
    for _ in tasks:
        router.complete(held.reservation, RequestOutcome(held.decision_id))
        await settle()
        held = next(task.result() for task in tasks if task.done() and task.result().request_id not in served)
        served.append(held.request_id)
    assert served == ["soon", "later", "patient"]


async def test_a_deadline_that_is_no_number_is_refused():
    router = busy_router(A)
    await router.select(ask("first"))
    hurried = msgspec.structs.replace(ask("second"), hints=RoutingHints(deadline_s=float("nan")))
    with pytest.raises(InvalidRequestError, match="deadline_s is nan"):
        await router.select(hurried)
    assert router.queued().requests == 0


async def test_load_is_shed_after_the_longest_wait():
    router = busy_router(A, max_queued_s=5.0)
    await router.select(ask("first"))
    early = asyncio.create_task(router.select(ask("early")))
    await settle()
    await router._clock.advance(3)
    late = asyncio.create_task(router.select(ask("late"), deadline_s=60.0))
    await settle()
    await router._clock.advance(2)
    router.expire()
    with pytest.raises(CapacityExhaustedError, match="raise max_queued_s") as caught:
        await early
    assert (caught.value.reason, caught.value.retry_after_s) == ("capacity.queue_full", 1.0)
    assert router.queued().requests == 1
    await router._clock.advance(3)
    router.expire()
    with pytest.raises(CapacityExhaustedError):
        await late


async def test_a_burst_with_one_cold_prefix_is_computed_once():
    router = KvRouter(block_size=4, clock=FakeClock(), policy="ttft")
    for number in range(1, 5):
        router.upsert_worker(WorkerId(number), ModelCard("m", kv_block_size=4))
    prefix = list(range(8000))
    decisions = [
        await router.select(RoutingRequest(str(n), token_ids=pack_tokens([*prefix, 90_000 + n] + [n] * 40)))
        for n in range(8)
    ]
    assert len({decision.worker for decision in decisions}) == 1
    assert [decision.cached_tokens for decision in decisions] == [0] + [8000] * 7
