"""What the no-op parts do beyond their contracts."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from dynamo_core.cards import ModelCard, ModelRuntimeConfig
from dynamo_core.component import ComponentContext
from dynamo_core.content import text_part
from dynamo_core.engine import EngineContext
from dynamo_core.errors import ConfigurationError, InvalidRequestError, NotFoundError, UnavailableError
from dynamo_core.ids import EndpointId, InstanceId, WorkerId
from dynamo_core.kv import BlockDescriptor
from dynamo_core.memory import MemoryDiscovery, MemoryEventBus, MemoryRequestPlane
from dynamo_core.noop import DictBlockStore, EchoEngine, LocalRequestContext, StaticScalingTarget, create_router
from dynamo_core.requests import GenerateRequest, GuidedDecoding, OutputOptions, RoutingHints, SamplingOptions
from dynamo_core.routing import RouterScope, RoutingPhase, RoutingRequest
from dynamo_core.telemetry import Metrics
from dynamo_core.testing import FakeClock
from dynamo_core.tokens import pack_tokens, unpack_tokens

ENDPOINT = EndpointId("ns", "backend", "generate")


def context_of(clock: FakeClock) -> ComponentContext:
    def spawn(coroutine: Coroutine[Any, Any, None], /, *, name: str) -> asyncio.Task[None]:
        return asyncio.create_task(coroutine, name=name)

    planes = (MemoryDiscovery(), MemoryRequestPlane(), MemoryEventBus())
    return ComponentContext("ns", *planes, Metrics(), clock, spawn)


async def test_echo_engine_reads_its_flags() -> None:
    engine = EchoEngine.from_args(["--model", "parrot", "--token-s", "0.5", "--context-length", "16"])
    clock = FakeClock()
    config = await engine.start(EngineContext(InstanceId(1), clock, Metrics()))
    assert (config.model, config.context_length) == ("parrot", 16)

    async def run() -> list[int]:
        request = GenerateRequest("r", "parrot", pack_tokens((1, 2, 3)))
        chunks = [chunk async for chunk in engine.generate(request, LocalRequestContext())]
        return [token for chunk in chunks for token in unpack_tokens(chunk.token_ids)]

    assert await clock.run(run()) == [1, 2, 3]
    assert clock.monotonic() == 2.0


@pytest.mark.parametrize(
    ("args", "word"),
    [(["--token-s", "-1"], "--token-s"), (["--context-length", "1"], "--context-length"), (["x"], "'x'")],
)
def test_echo_engine_refuses_bad_flags(args: list[str], word: str) -> None:
    with pytest.raises(ConfigurationError, match=word):
        EchoEngine.from_args(args)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"parts": (text_part("x"),)}, "parts"),
        ({"sampling": SamplingOptions(guided=GuidedDecoding(regex="a"))}, "sampling.guided"),
        ({"sampling": SamplingOptions(n=0)}, "sampling.n"),
        ({"sampling": SamplingOptions(logit_bias={1: 2.0})}, "sampling.logit_bias"),
        ({"output": OutputOptions(logprobs=0)}, "output.logprobs"),
    ],
)
async def test_echo_engine_refuses_what_it_cannot_honour(fields: dict[str, Any], param: str) -> None:
    request = GenerateRequest("r", "echo", pack_tokens((1,)), **fields)
    with pytest.raises(InvalidRequestError) as caught:
        await anext(EchoEngine().generate(request, LocalRequestContext()))
    assert caught.value.param == param


async def test_draining_echo_engine_refuses_as_migratable() -> None:
    engine = EchoEngine()
    await engine.drain()
    with pytest.raises(UnavailableError) as caught:
        await anext(engine.generate(GenerateRequest("r", "m", pack_tokens((1,))), LocalRequestContext()))
    assert caught.value.migratable


async def test_local_context_stops_once() -> None:
    calls: list[str] = []
    clock = FakeClock()
    context = LocalRequestContext("r", headers={"a": "b"}, deadline_s=5.0, clock=clock)
    context.on_stop(lambda: calls.append("early"))
    assert (context.request_id, context.headers, context.remaining_s()) == ("r", {"a": "b"}, 5.0)
    await clock.advance(9.0)
    assert context.remaining_s() == 0.0
    context.stop()
    context.stop()
    context.on_stop(lambda: calls.append("late"))
    await context.wait_stopped()
    assert calls == ["early", "late"]


async def test_router_takes_turns_over_a_changing_set() -> None:
    router = create_router(context_of(FakeClock()), RouterScope(ENDPOINT, ModelCard("m")))
    for instance in (1, 2, 3):
        router.upsert_worker(WorkerId(instance), ModelCard("m"))

    async def turn() -> int:
        return (await router.select(RoutingRequest("r"))).worker.instance_id

    assert [await turn() for _ in range(4)] == [1, 2, 3, 1]
    router.remove_worker(WorkerId(2))
    assert [await turn() for _ in range(3)] == [3, 1, 3]


async def test_asking_does_not_take_a_turn() -> None:
    router = create_router(context_of(FakeClock()), RouterScope(ENDPOINT, ModelCard("m")))
    for instance in (1, 2):
        router.upsert_worker(WorkerId(instance), ModelCard("m"))
    asked = [(await router.select(RoutingRequest("r", reserve=False))).worker for _ in range(3)]
    assert asked == [WorkerId(1)] * 3


async def test_idle_reservations_are_dropped_by_progress_not_age() -> None:
    clock = FakeClock()
    router = create_router(context_of(clock), RouterScope(ENDPOINT, ModelCard("m"), options={"idle_s": 10}))
    router.upsert_worker(WorkerId(1), ModelCard("m"))
    left, kept = [await router.select(RoutingRequest("r")) for _ in range(2)]
    assert left.reservation != kept.reservation
    for _ in range(4):
        await clock.advance(4.0)
        assert kept.reservation is not None
        router.progress(kept.reservation, 1)
    assert router.loads()[0].projected.active_requests == 1


async def test_inhibited_worker_comes_back_and_is_better_than_none() -> None:
    clock = FakeClock()
    router = create_router(context_of(clock), RouterScope(ENDPOINT, ModelCard("m"), options={"inhibit_s": 2.0}))
    for instance in (1, 2):
        router.upsert_worker(WorkerId(instance), ModelCard("m"))
    router.inhibit(WorkerId(1), "refused")
    router.inhibit(WorkerId(9), "unknown")
    only_1 = RoutingRequest("r", excluded=(WorkerId(2),))
    assert (await router.select(RoutingRequest("r"))).worker == WorkerId(2)
    assert (await router.select(only_1)).worker == WorkerId(1)
    await clock.advance(2.0)
    assert {(await router.select(RoutingRequest("r"))).worker for _ in range(2)} == {WorkerId(1), WorkerId(2)}


async def test_required_taints_and_prefill_pins() -> None:
    router = create_router(context_of(FakeClock()), RouterScope(ENDPOINT, ModelCard("m")))
    router.upsert_worker(WorkerId(1), ModelCard("m"))
    tainted = ModelCard("m", runtime_config=ModelRuntimeConfig(taints=("gpu=h100",)))
    router.upsert_worker(WorkerId(2, 1), tainted)
    hints = RoutingHints(required_taints=("gpu=h100",))
    assert (await router.select(RoutingRequest("r", hints=hints))).worker == WorkerId(2, 1)
    with pytest.raises(UnavailableError):
        await router.select(RoutingRequest("r", hints=RoutingHints(required_taints=("gpu=b200",))))
    pins = RoutingHints(instance_id=1, prefill_instance_id=2)
    prefill = RoutingRequest("r", hints=pins, phase=RoutingPhase.PREFILL)
    assert (await router.select(prefill)).worker == WorkerId(2, 1)
    assert (await router.select(RoutingRequest("r", hints=pins))).worker == WorkerId(1)
    assert (await router.select(RoutingRequest("r", hints=RoutingHints(dp_rank=1)))).worker == WorkerId(2, 1)


@pytest.mark.parametrize(
    ("scope", "word"),
    [
        (RouterScope(ENDPOINT, ModelCard("m"), policy="kv"), "'kv'"),
        (RouterScope(ENDPOINT, ModelCard("m"), options={"idle_s": 0}), "idle_s"),
        (RouterScope(ENDPOINT, ModelCard("m"), options={"idle_s": "x"}), "idle_s"),
    ],
)
async def test_router_refuses_bad_scopes(scope: RouterScope, word: str) -> None:
    with pytest.raises(ConfigurationError, match=word):
        create_router(context_of(FakeClock()), scope)


def test_store_evicts_by_priority_then_age() -> None:
    store = DictBlockStore(2)
    store.put([BlockDescriptor(1, priority=5), BlockDescriptor(2)], [b"1", b"2"])
    assert store.put([BlockDescriptor(3)], [b"3"]) == [2]
    assert store.put([BlockDescriptor(4)], [b"4"]) == [3]
    assert store.contains([1, 4]) == [True, True]
    with pytest.raises(ConfigurationError, match="capacity_blocks 0"):
        DictBlockStore(0)


def test_static_target_checks_its_first_counts() -> None:
    with pytest.raises(InvalidRequestError, match="-1 replicas of a"):
        StaticScalingTarget({"a": -1})


async def test_static_target_names_its_pools_and_limit() -> None:
    target = StaticScalingTarget({"b": 1, "a": 1}, max_replicas=2)
    with pytest.raises(NotFoundError, match="'c'; there are a, b"):
        await target.scale({"c": 1})
    with pytest.raises(InvalidRequestError, match=r"0\.\.2"):
        await target.scale({"a": 3})
