"""A stock ``vllm serve`` with a worker beside it: registered, its KV events relayed, its tokens streamed.

``dyn slow vllm`` runs this file with the interpreter of vLLM's environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from dynamo_core import plugins
from dynamo_core.clock import SystemClock
from dynamo_core.engine import Engine, EngineConfig, EngineContext
from dynamo_core.enums import ModelInput, Tier
from dynamo_core.ids import InstanceId
from dynamo_core.kv import BlockDescriptor
from dynamo_core.noop import LocalRequestContext
from dynamo_core.requests import GenerateChunk, GenerateRequest, SamplingOptions, StopConditions
from dynamo_core.telemetry import Metrics
from dynamo_core.testing import EngineConformance
from dynamo_core.tokens import BlockHasher, pack_tokens, unpack_hashes, unpack_tokens
from dynamo_integration_tests.stack import DynamoProcess, kill_process, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

MODEL = str(resources.files("dynamo_worker") / "models" / "tinylm")
BLOCK_SIZE = 32
START_LIMIT_S = 900.0
PROMPT = [3 + 7 * index % 900 for index in range(100)]
OpenAIHttpEngine: Any = plugins.load("engines", "openai-http")


@dataclass(frozen=True)
class Server:
    """A stock server and where its KV events come from."""

    url: str
    events: str
    replay: str

    @property
    def flags(self) -> list[str]:
        """Options of the worker's engine."""
        return [
            "--url",
            self.url,
            "--kv-events-endpoint",
            self.events,
            "--kv-events-replay-endpoint",
            self.replay,
            "--load-interval-s",
            "0.2",
        ]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("vllm-serve")
    made = Server(f"http://127.0.0.1:{_free_port()}", f"ipc://{folder}/events", f"ipc://{folder}/replay")
    events = {"enable_kv_cache_events": True, "publisher": "zmq"}
    events |= {"endpoint": made.events, "replay_endpoint": made.replay}
    # What `vllm serve` runs; the command itself asks for a distribution of that name, which a CPU build is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", MODEL]
    command += ["--served-model-name", "tinylm"]
    command += ["--host", "127.0.0.1", "--port", made.url.rpartition(":")[2], "--dtype", "float32", "--enforce-eager"]
    command += ["--block-size", str(BLOCK_SIZE), "--num-gpu-blocks-override", "96", "--max-model-len", "1024"]
    command += ["--max-num-seqs", "8", "--enable-prompt-tokens-details", "--kv-events-config", json.dumps(events)]
    log = folder / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        wait_until(lambda: _is_up(made, process, log), "vllm serve", START_LIMIT_S)
        yield made
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            kill_process(process.pid)
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_up(server: Server, process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{server.url}/health").status_code == 200
    return False


class TestSidecarOnVllmServe(EngineConformance):
    factory = OpenAIHttpEngine
    patience_s = 240.0

    @pytest.fixture(autouse=True)
    def _server(self, server: Server) -> None:
        self._flags = ["--url", server.url, "--eos-token-ids", "[2]"]

    def make_engine(self) -> Engine:
        return OpenAIHttpEngine.from_args(self._flags)

    # Greedy continuations pass; a sampled one draws anew.
    @pytest.mark.xfail(reason="vLLM's seeded generator counts draws, not positions", strict=False)
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize("accepted", [1, 3, 7])
    async def test_continuation_gives_the_rest(self, accepted: int, temperature: float) -> None:
        await super().test_continuation_gives_the_rest(accepted, temperature)


class Reports:
    """A sink of KV events."""

    def __init__(self) -> None:
        self.blocks: dict[int, BlockDescriptor] = {}

    def stored(self, blocks: Sequence[BlockDescriptor], *, tier: Tier = Tier.DEVICE, lora: str = "") -> None:
        self.blocks |= {block.position: block for block in blocks}

    def removed(self, sequence_hashes: Sequence[int], *, tier: Tier = Tier.DEVICE) -> None:
        gone = set(sequence_hashes)
        self.blocks = {at: block for at, block in self.blocks.items() if block.sequence_hash not in gone}

    def cleared(self) -> None:
        self.blocks.clear()


@pytest.fixture
async def sidecar(server: Server) -> AsyncIterator[tuple[Any, EngineConfig]]:
    engine = OpenAIHttpEngine.from_args(server.flags)
    config = await engine.start(EngineContext(InstanceId(7), SystemClock(), Metrics()))
    yield engine, config
    await engine.cleanup()


async def ask(engine: Any, name: str, prompt: Sequence[int]) -> list[GenerateChunk]:
    stop = StopConditions(max_tokens=8, ignore_eos=True)
    item = GenerateRequest(name, "tinylm", pack_tokens(prompt), sampling=SamplingOptions(temperature=0.0), stop=stop)
    return [chunk async for chunk in engine.generate(item, LocalRequestContext(name))]


async def test_tokens_and_events_of_a_stock_server(sidecar: tuple[Any, EngineConfig]) -> None:
    engine, config = sidecar
    assert (config.model_input, config.kv_block_size, config.context_length) == (ModelInput.TOKENS, BLOCK_SIZE, 1024)
    assert config.runtime_config.total_kv_blocks == 96
    reports = Reports()
    engine.set_kv_event_sink(reports)
    first = await ask(engine, "first", PROMPT)
    again = await ask(engine, "again", PROMPT)
    outputs = [[token for chunk in chunks for token in unpack_tokens(chunk.token_ids)] for chunks in (first, again)]
    assert outputs[0] == outputs[1]
    assert len(first) > 1, "it streams"
    local = unpack_hashes(BlockHasher(BLOCK_SIZE).hash_tokens(pack_tokens(PROMPT)).local)
    async with asyncio.timeout(60):
        while len(reports.blocks) < len(local):
            await asyncio.sleep(0.05)
    assert [reports.blocks[index].local_hash for index in range(3)] == list(local)


def test_the_whole_stack_beside_a_stock_server(server: Server, tmp_path: Path) -> None:
    receipts = tmp_path / "receipts"
    planes = ["--discovery", f"file://{tmp_path / 'discovery'}", "--request-plane", "tcp://127.0.0.1:0"]
    planes += ["--event-bus", "zmq://127.0.0.1:0"]
    recording = ["--router-options", json.dumps({"receipts": "on", "receipts_dir": str(receipts)})]
    with contextlib.ExitStack() as processes:
        worker = processes.enter_context(DynamoProcess(["worker", *planes, "--engine", "openai-http", *server.flags]))
        worker.wait_for("worker ready")
        frontend = processes.enter_context(DynamoProcess(["frontend", *planes, "--http-port", "0", *recording]))
        url = frontend.wait_for_url()
        wait_until(lambda: bool(httpx.get(f"{url}/v1/models").json()["data"]), "the model")
        _converse(url)
        prefix = [5 + 11 * index % 900 for index in range(320)]
        _complete(url, prefix)
        for turn in range(3):
            decision, cached = _complete(url, [*prefix, *([7 + turn] * (20 + 9 * turn))])
            assert cached >= len(prefix)
            wait_until(lambda decision=decision: decision in _predictions(receipts), "the receipt")
            assert abs(_predictions(receipts)[decision] - cached) <= BLOCK_SIZE
        assert worker.interrupt() == 0, worker.output
    assert httpx.get(f"{server.url}/health").status_code == 200, "the server outlives the worker"


def _converse(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    question: Any = {"role": "user", "content": "What is the capital of Japan?"}
    stream = client.chat.completions.create(model="tinylm", messages=[question], temperature=0, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "Tokyo" in "".join(pieces)
    assert len(pieces) > 2


def _complete(url: str, prompt: list[int]) -> tuple[str, int]:
    body = {"model": "tinylm", "prompt": prompt, "max_tokens": 4, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    details = answer.json()["usage"].get("prompt_tokens_details") or {}
    return answer.headers["x-dynamo-decision-id"], details.get("cached_tokens", 0)


def _predictions(folder: Path) -> dict[str, int]:
    lines = [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    found = [json.loads(line)["decision"] for line in lines if line.endswith("}")]
    return {item["decision_id"]: item.get("cached_tokens", 0) for item in found}
