"""A worker is killed while it streams: the client still gets the fault-free text, once."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from dynamo_integration_tests.stack import (
    DynamoProcess,
    component_pids,
    flag_value,
    instance_pids,
    kill_process,
    wait_until,
)

LONG: dict[str, Any] = {
    "model": "tinylm",
    "prompt": "In the beginning God created the heaven and the earth.",
    "temperature": 0,
    "max_tokens": 400,
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture
def serve() -> Iterator[DynamoProcess]:
    with DynamoProcess(["serve", "--http-port", "0"]) as process:
        process.wait_for_url()
        yield process


@contextlib.contextmanager
def connected(serve: DynamoProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{serve.wait_for_url()}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def worker_pids(serve: DynamoProcess) -> dict[str, int]:
    """Return the process of each worker by the instance id that headers show."""
    workers = component_pids(serve.pid, "worker")
    pids = instance_pids(flag_value(workers[0], "--discovery"))
    assert set(workers) <= set(pids.values())
    return pids


def migrations(serve: DynamoProcess) -> float:
    """Return how many continuations the frontend has counted."""
    text = httpx.get(f"{serve.wait_for_url()}/metrics").text
    pattern = r"^dynamo_frontend_model_migration_total{[^}]*} (\S+)$"
    return sum(float(value) for value in re.findall(pattern, text, re.MULTILINE))


@pytest.mark.parametrize("after_chunks", [1, 60])
def test_a_stream_is_exact_when_its_worker_dies(serve: DynamoProcess, after_chunks: int) -> None:
    with connected(serve) as client:
        pids = worker_pids(serve)
        expected = client.completions.create(**LONG)
        options = {"include_usage": True}
        raw = client.completions.with_raw_response.create(**LONG, stream=True, stream_options=options)
        pieces: list[str] = []
        usage = None
        for count, chunk in enumerate(raw.parse(), 1):
            pieces += [choice.text for choice in chunk.choices]
            usage = chunk.usage or usage
            if count == after_chunks:
                kill_process(pids[raw.headers["x-dynamo-worker-id"].split("/", maxsplit=1)[0]])
        assert "".join(pieces) == expected.choices[0].text
        assert usage is not None
        assert expected.usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens) == (
            expected.usage.prompt_tokens,
            expected.usage.completion_tokens,
        )
    # Without this, a worker that had finished before it was killed would pass too.
    assert migrations(serve) == 1


def test_the_supervisor_replaces_the_dead_worker(serve: DynamoProcess) -> None:
    [worker, other] = component_pids(serve.pid, "worker")
    discovery = flag_value(worker, "--discovery")
    kill_process(worker)
    serve.wait_for(r'"process":"worker-\d".*"status":-9')
    wait_until(lambda: len({*instance_pids(discovery).values()} - {worker}) == 2, "two live workers")
    assert other in component_pids(serve.pid, "worker")
    with connected(serve) as client:
        assert client.completions.create(**{**LONG, "max_tokens": 3}).choices[0].text
