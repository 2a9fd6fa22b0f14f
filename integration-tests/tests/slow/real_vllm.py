"""Two workers with real vLLM as processes over TCP, files and ZMQ: requests go where their prefix is.

``dyn slow vllm`` runs this file with the interpreter of vLLM's environment.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynamo_integration_tests.stack import DynamoProcess, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

MODEL = str(resources.files("dynamo_worker") / "models" / "tinylm")
BLOCK_SIZE = 32
START_LIMIT_S = 900.0
ARGUMENTS = {
    "enforce_eager": True,
    "dtype": "float32",
    "block_size": BLOCK_SIZE,
    "num_gpu_blocks_override": 96,
    "max_model_len": 1024,
    "max_num_seqs": 8,
}
PREFIXES = [[3 + (7 * index + 131 * group) % 900 for index in range(320)] for group in range(6)]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """URL of a frontend over two workers, and the folder of its router's receipts."""
    folder, receipts = tmp_path_factory.mktemp("discovery"), tmp_path_factory.mktemp("receipts")
    planes = ["--discovery", f"file://{folder}", "--request-plane", "tcp://127.0.0.1:0"]
    planes += ["--event-bus", "zmq://127.0.0.1:0"]
    engine = ["--engine", "vllm", "--model", MODEL, "--vllm-args", json.dumps(ARGUMENTS)]
    recording = ["--router-options", json.dumps({"receipts": "on", "receipts_dir": str(receipts)})]
    with contextlib.ExitStack() as processes:
        for _ in range(2):
            worker = processes.enter_context(DynamoProcess(["worker", *planes, *engine]))
            worker.wait_for("worker ready", START_LIMIT_S)
        frontend = processes.enter_context(DynamoProcess(["frontend", *planes, "--http-port", "0", *recording]))
        yield frontend.wait_for_url(), receipts


def complete(url: str, prompt: list[int], max_tokens: int = 4) -> tuple[str, str, int]:
    """Ask; return the worker, the decision, and how many prompt tokens vLLM says it had."""
    body: dict[str, Any] = {"model": "tinylm", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    body["ignore_eos"] = True
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    details = answer.json()["usage"].get("prompt_tokens_details") or {}
    return answer.headers["x-dynamo-worker-id"], answer.headers["x-dynamo-decision-id"], details.get("cached_tokens", 0)


def decisions(folder: Path) -> dict[str, dict[str, Any]]:
    lines = [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    found = [json.loads(line) for line in lines]
    return {item["decision"]["decision_id"]: item["decision"] for item in found}


def test_prefixes_stay_with_their_holder(stack: tuple[str, Path]) -> None:
    url, receipts = stack
    wait_until(lambda: bool(httpx.get(f"{url}/v1/models").json()["data"]), "the model")
    with ThreadPoolExecutor(len(PREFIXES)) as clients:  # at once, so that load spreads them
        first = list(clients.map(lambda prefix: complete(url, prefix, 60), PREFIXES))
    holders = {group: worker for group, (worker, _, _) in enumerate(first)}
    assert len(set(holders.values())) == 2, "load spreads unknown prefixes over both workers"
    asked: list[tuple[int, str, str, int]] = []
    for turn in range(3):
        for group, prefix in enumerate(PREFIXES):
            suffix = [5 + 11 * (turn + 1) + group] * (20 + 9 * turn)
            asked.append((group, *complete(url, prefix + suffix)))
    assert [worker for _, worker, _, _ in asked] == [holders[group] for group, _, _, _ in asked]
    assert all(cached >= len(PREFIXES[0]) for _, _, _, cached in asked)
    wait_until(lambda: len(decisions(receipts)) >= len(asked) + len(PREFIXES), "the receipts")
    predicted = decisions(receipts)
    for _, _, decision, cached in asked:
        assert abs(predicted[decision].get("cached_tokens", 0) - cached) <= BLOCK_SIZE
