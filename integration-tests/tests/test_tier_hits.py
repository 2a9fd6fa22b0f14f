"""The router's receipts show blocks below the device: in the host tier, on disk, and what is left of both by a kill."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from dynamo_integration_tests.stack import DynamoProcess, wait_until

# The device holds 48 blocks of 16 tokens: one long prompt pushes out another.
SMALL_DEVICE = ["--num-blocks", "48", "--max-model-len", "600", "--block-size", "16"]
SUBJECTS = ["rivers", "mountains", "oceans", "deserts"]
BLOCK_TOKENS = 16
MIN_TIER_BLOCKS = 6
pytestmark = pytest.mark.timeout(180)  # several processes start one after the other


def frontend(folder: Path) -> DynamoProcess:
    options = json.dumps({"receipts": "on", "receipts_dir": str(folder / "receipts")})
    return DynamoProcess(["frontend", *planes(folder), "--http-port", "0", "--router-options", options])


def worker(folder: Path, **options: object) -> DynamoProcess:
    tier = ["--kv-connector", "kvbm", "--kv-connector-options", json.dumps(options)]
    return DynamoProcess(["worker", *planes(folder), "--engine", "reference", *SMALL_DEVICE, *tier])


def planes(folder: Path) -> list[str]:
    return ["--discovery", f"file://{folder}", "--request-plane", "tcp://127.0.0.1:0"]


@contextlib.contextmanager
def connected(frontend: DynamoProcess) -> Iterator[openai.OpenAI]:
    url = frontend.wait_for_url()
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        wait_until(lambda: bool(client.models.list().data), f"model at {url}")
        yield client


def ask(client: openai.OpenAI, subject: str) -> tuple[str, int, str]:
    """Return the answer, its cached prompt tokens, and the id of its receipt."""
    raw = client.chat.completions.with_raw_response.create(
        model="tinylm",
        messages=[{"role": "user", "content": f"You know everything about {subject}. " * 22}],
        temperature=0,
        max_tokens=8,
    )
    answer = raw.parse()
    assert answer.usage is not None
    details = answer.usage.prompt_tokens_details
    cached = (details.cached_tokens if details else 0) or 0
    return answer.choices[0].message.content or "", cached, raw.headers["x-dynamo-decision-id"]


def tier_blocks(folder: Path, decision_id: str) -> dict[str, int]:
    """Return what a receipt says of the blocks that the chosen worker holds, waiting for it to be written."""
    found: list[dict[str, Any]] = []

    def written() -> bool:
        files = (folder / "receipts").glob("*.jsonl")
        lines = [line for path in files for line in path.read_text().splitlines() if decision_id in line]
        found[:] = [json.loads(line)["decision"] for line in lines if line.endswith("}")]
        return bool(found)

    wait_until(written, f"receipt {decision_id}")
    return found[0].get("tier_blocks", {})


def require_hits(folder: Path, tier: str, answers: list[tuple[str, int, str]]) -> None:
    """Require that each receipt shows what the answer then took from the cache, most of it in the tier."""
    for _, cached, decision in answers:
        held = tier_blocks(folder, decision)
        assert held.get(tier, 0) >= MIN_TIER_BLOCKS
        # The last token is always computed, and with it the block it is in.
        assert sum(held.values()) * BLOCK_TOKENS >= cached >= (held[tier] - 1) * BLOCK_TOKENS


def test_a_receipt_shows_blocks_of_the_host_tier(tmp_path: Path) -> None:
    with frontend(tmp_path) as process, worker(tmp_path, host_blocks=512), connected(process) as client:
        first = [ask(client, subject) for subject in SUBJECTS]
        again = [ask(client, subject) for subject in SUBJECTS]
        assert [text for text, _, _ in again] == [text for text, _, _ in first]
        require_hits(tmp_path, "host_pinned", again)
        assert tier_blocks(tmp_path, first[0][2]) == {}


def test_a_worker_killed_comes_back_warm_and_the_router_is_told(tmp_path: Path) -> None:
    disk = {"disk_dir": str(tmp_path / "disk"), "disk_blocks": 512, "model": "tinylm@1"}
    options = {"host_blocks": 512, "offload": "register", "disk_offload": "register", **disk}
    with frontend(tmp_path) as process, worker(tmp_path, **options) as old, connected(process) as client:
        first = [ask(client, subject) for subject in SUBJECTS]
        old.kill()
        wait_until(lambda: not client.models.list().data, "end of the dead worker's lease")
        with worker(tmp_path, **options):
            wait_until(lambda: bool(client.models.list().data), "new worker")
            again = [ask(client, subject) for subject in SUBJECTS]
        assert [text for text, _, _ in again] == [text for text, _, _ in first]
        require_hits(tmp_path, "disk", again)


def test_the_host_tier_of_a_killed_worker_is_credited_to_nobody(tmp_path: Path) -> None:
    options = {"host_blocks": 512, "offload": "register"}
    with frontend(tmp_path) as process, worker(tmp_path, **options) as old, connected(process) as client:
        first = [ask(client, subject) for subject in SUBJECTS]
        require_hits(tmp_path, "host_pinned", [ask(client, subject) for subject in SUBJECTS])
        old.kill()
        wait_until(lambda: not client.models.list().data, "end of the dead worker's lease")
        with worker(tmp_path, **options):
            wait_until(lambda: bool(client.models.list().data), "new worker")
            again = [ask(client, subject) for subject in SUBJECTS]
        assert [text for text, _, _ in again] == [text for text, _, _ in first]
        assert [(cached, tier_blocks(tmp_path, decision)) for _, cached, decision in again] == [(0, {})] * len(SUBJECTS)


def test_a_worker_killed_finds_its_host_tier_again_in_shared_memory(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="dynamo-test-") as memory:
        options = {"host_blocks": 512, "host_dir": f"{memory}/kv", "model": "tinylm@1", "offload": "register"}
        with frontend(tmp_path) as process, worker(tmp_path, **options) as old, connected(process) as client:
            first = [ask(client, subject) for subject in SUBJECTS]
            old.kill()
            wait_until(lambda: not client.models.list().data, "end of the dead worker's lease")
            with worker(tmp_path, **options):
                wait_until(lambda: bool(client.models.list().data), "new worker")
                again = [ask(client, subject) for subject in SUBJECTS]
            assert [text for text, _, _ in again] == [text for text, _, _ in first]
            require_hits(tmp_path, "host_pinned", again)
