"""A prefill, a decode and an aggregated worker as processes over TCP, files and ZMQ: the same tokens, real KV bytes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import openai
import pytest

from dynamo_core import plugins
from dynamo_core.clock import SystemClock
from dynamo_core.discovery import INSTANCES_PREFIX, Instance
from dynamo_core.ids import EndpointId
from dynamo_core.planes import RequestPlane
from dynamo_core.requests import GenerateChunk, GenerateRequest, PrefillResult, SamplingOptions, StopConditions
from dynamo_core.streams import open_stream
from dynamo_core.tokens import pack_tokens, unpack_tokens
from dynamo_core.wire import GENERATE_CHUNK, GENERATE_REQUEST, INSTANCE
from dynamo_integration_tests.stack import DynamoProcess, wait_until

PROMPT = [100 + 7 * i % 900 for i in range(700)]
BLOCKS_TOKENS = 688
DECODE = ("--role", "decode", "--remote-prefill-threshold-tokens", "64")


@pytest.fixture(scope="module", params=["shared-memory", "tcp", "bootstrap"])
def workers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of discovery; the workers move KV through shared memory or over TCP, after the prompt or meanwhile."""
    folder = tmp_path_factory.mktemp("discovery")
    memory = ("--no-kv-shared-memory",) if request.param == "tcp" else ()
    form = ("--kv-handoff", "bootstrap") if request.param == "bootstrap" else ()
    with contextlib.ExitStack() as stack:
        for flags in (("--role", "prefill", *memory), (*DECODE, *memory, *form), ("--worker-component", "alone")):
            stack.enter_context(start_worker(folder, *flags)).wait_for("worker ready")
        yield folder


def start_worker(folder: Path, *flags: str) -> DynamoProcess:
    planes = ["--discovery", f"file://{folder}", "--request-plane", "tcp://127.0.0.1:0"]
    return DynamoProcess(["worker", *planes, "--event-bus", "zmq://127.0.0.1:0", "--engine", "reference", *flags])


@contextlib.asynccontextmanager
async def connected(folder: Path) -> AsyncIterator[tuple[RequestPlane, dict[str, Instance]]]:
    """The request plane, and each generate endpoint's instance by component."""
    clock = SystemClock()
    plane = plugins.load("request_planes", "tcp")("tcp://127.0.0.1:0", clock=clock, options={})
    discovery = plugins.load("discoveries", "file")(f"file://{folder}", clock=clock, options={})
    await plane.start()
    await discovery.start()
    try:
        found = [INSTANCE.decode(record.value) for record in await discovery.list(INSTANCES_PREFIX)]
        yield plane, {item.endpoint.component: item for item in found if item.endpoint.endpoint == "generate"}
    finally:
        await discovery.close()
        await plane.close()


async def ask(plane: RequestPlane, instance: Instance, request: GenerateRequest) -> list[GenerateChunk]:
    endpoint = EndpointId("dynamo", instance.endpoint.component, "generate")
    stream = await open_stream(plane, instance.address, endpoint, GENERATE_REQUEST.encode(request))
    async with asyncio.timeout(30), stream:
        return [GENERATE_CHUNK.decode(item) async for item in stream]


def request(name: str, *, first: int = 0, handoff: PrefillResult | None = None) -> GenerateRequest:
    return GenerateRequest(
        name,
        "tinylm",
        pack_tokens([(token + first) % 1000 + 3 for token in PROMPT]),
        sampling=SamplingOptions(temperature=0.8, seed=5),
        stop=StopConditions(max_tokens=40, ignore_eos=True),
        handoff=handoff,
    )


def tokens(chunks: list[GenerateChunk]) -> list[int]:
    return [token for chunk in chunks for token in unpack_tokens(chunk.token_ids)]


def cached(chunks: list[GenerateChunk]) -> int:
    assert chunks[-1].usage is not None
    return chunks[-1].usage.cached_tokens


async def test_the_decode_worker_asks_a_prefill_worker(workers: Path) -> None:
    async with connected(workers) as (plane, instances):
        for first in (1, 2):
            expected = await ask(plane, instances["alone"], request(f"alone{first}", first=first))
            answer = await ask(plane, instances["backend"], request(f"split{first}", first=first))
            assert tokens(answer) == tokens(expected)
            assert cached(answer) == BLOCKS_TOKENS


async def test_the_caller_makes_both_hops(workers: Path) -> None:
    async with connected(workers) as (plane, instances):
        expected = await ask(plane, instances["alone"], request("alone", first=3))
        [prefilled] = await ask(plane, instances["prefill"], request("hop", first=3))
        assert prefilled.handoff is not None
        answer = await ask(plane, instances["backend"], request("hop", first=3, handoff=prefilled.handoff))
        assert tokens(answer) == tokens(expected)
        assert cached(answer) == BLOCKS_TOKENS


async def test_a_killed_prefill_worker_costs_only_its_computation(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        # One after the other: the decode worker knows the prefill worker from its first look into discovery.
        prefill = stack.enter_context(start_worker(tmp_path, "--role", "prefill"))
        prefill.wait_for("worker ready")
        stack.enter_context(start_worker(tmp_path, *DECODE)).wait_for("worker ready")
        async with connected(tmp_path) as (plane, instances):
            whole = await ask(plane, instances["backend"], request("before"))
            assert cached(whole) == BLOCKS_TOKENS
            prefill.kill()
            answer = await ask(plane, instances["backend"], request("after", first=9))
            assert len(tokens(answer)) == 40
            assert cached(answer) == 0


def test_a_client_sees_no_difference(tmp_path: Path) -> None:
    split, alone = tmp_path / "split", tmp_path / "alone"
    with contextlib.ExitStack() as stack:
        for folder, flags in ((split, ("--role", "prefill")), (split, DECODE), (alone, ())):
            stack.enter_context(start_worker(folder, *flags)).wait_for("worker ready")
        fronts = [stack.enter_context(start_frontend(folder)) for folder in (split, alone)]
        answers = [complete(front.wait_for_url()) for front in fronts]
    assert answers[0].choices[0].text == answers[1].choices[0].text
    cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in answers]
    assert cached == [BLOCKS_TOKENS, 0]


def start_frontend(folder: Path) -> DynamoProcess:
    planes = ["--discovery", f"file://{folder}", "--request-plane", "tcp://127.0.0.1:0"]
    return DynamoProcess(["frontend", *planes, "--event-bus", "zmq://127.0.0.1:0", "--http-port", "0"])


def complete(url: str) -> openai.types.Completion:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=30) as client:
        wait_until(lambda: bool(client.models.list().data), f"model at {url}")
        return client.completions.create(
            model="tinylm", prompt=PROMPT, max_tokens=40, temperature=0.8, seed=5, extra_body={"ignore_eos": True}
        )
