"""A planner follows the load with real worker processes, and no request is lost on the way up or down."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

import openai
import pytest

from dynamo_integration_tests.stack import DynamoProcess, component_pids, wait_until

PAUSE_S = 0.25  # at most four requests a second

GRAPH = """\
services:
  worker:
    component: worker
    args: {{engine: mock, model: tinylm, speedup-ratio: 20}}
  frontend:
    component: frontend
    args: {{http-port: {port}, traffic-interval-s: 0.5}}
  planner:
    component: planner
    args:
      role: worker
      requests-per-replica-s: 8
      max-replicas: 2
      interval-s: 1
      scale-down-delay-s: 2
      stale-after-s: 10
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def load(base_url: str, clients: int, pause_s: float, until: Callable[[], bool]) -> int:
    """Send requests from some clients, each pausing between its own, until a condition holds; return how many."""
    done = 0

    async def ask(client: openai.AsyncOpenAI) -> None:
        nonlocal done
        while not await asyncio.to_thread(until):
            answer = await client.completions.create(model="tinylm", prompt=[5, 6, 7], max_tokens=4)
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 4
            done += 1
            await asyncio.sleep(pause_s)

    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=30) as client:
        await asyncio.gather(*(ask(client) for _ in range(clients)))
    return done


@pytest.mark.timeout(150)
def test_workers_go_up_and_down_with_the_load(tmp_path: Path) -> None:
    port = free_port()
    graph = tmp_path / "graph.yaml"
    graph.write_text(GRAPH.format(port=port))
    with DynamoProcess(["up", str(graph)]) as up:
        wait_until(lambda: serves(port), "model")

        def workers() -> int:
            return len(component_pids(up.pid, "worker"))

        assert workers() == 1
        url = f"http://127.0.0.1:{port}/v1"
        assert asyncio.run(load(url, 8, 0.0, until=lambda: workers() == 2)) > 0
        # One client that pauses is less than one replica's worth, and goes on while the others leave.
        assert asyncio.run(load(url, 1, PAUSE_S, until=lambda: workers() == 1)) > 0
        assert up.interrupt() == 0, up.output


def serves(port: int) -> bool:
    try:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            return [model.id for model in client.models.list()] == ["tinylm"]
    except openai.APIConnectionError:
        return False
