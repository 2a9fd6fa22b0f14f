"""A frontend with the KV router before one prefill and one decode worker: short work stays, long prompts go away."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import openai
import pytest

from dynamo_integration_tests.stack import DynamoProcess, wait_until

BLOCK = 16
THRESHOLD = 64
LONG = [100 + 7 * i % 900 for i in range(700)]
LONG_BLOCKS_TOKENS = len(LONG) // BLOCK * BLOCK


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("discovery")
    planes = ["--discovery", f"file://{folder}", "--request-plane", "tcp://127.0.0.1:0"]
    planes += ["--event-bus", "zmq://127.0.0.1:0"]
    roles = (["prefill"], ["decode", "--remote-prefill-threshold-tokens", str(THRESHOLD)])
    with contextlib.ExitStack() as stack:
        for role in roles:
            worker = DynamoProcess(["worker", *planes, "--engine", "reference", "--role", *role])
            stack.enter_context(worker).wait_for("worker ready")
        frontend = DynamoProcess(["frontend", *planes, "--http-port", "0", "--router", "kv"])
        url = stack.enter_context(frontend).wait_for_url()
        found = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)
        stack.enter_context(found)
        wait_until(lambda: bool(found.models.list().data), f"model at {url}")
        yield found


def cached_tokens(client: openai.OpenAI, prompt: list[int]) -> int:
    """Send a prompt; return how many of its tokens the worker that answers did not compute itself."""
    answer = client.completions.create(model="tinylm", prompt=prompt, max_tokens=4, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4
    details = answer.usage.prompt_tokens_details
    return 0 if details is None else details.cached_tokens or 0


def test_short_prompts_stay_and_long_ones_go(client: openai.OpenAI) -> None:
    short = [900 - 3 * i % 700 for i in range(THRESHOLD - 1)]
    # Both are new to every worker: what the decode worker has not computed has come from the prefill worker.
    assert cached_tokens(client, short) == 0
    assert cached_tokens(client, LONG) == LONG_BLOCKS_TOKENS


def test_what_is_left_to_compute_counts_not_the_length(client: openai.OpenAI) -> None:
    cached_tokens(client, LONG)
    little, much = [*LONG, *range(200, 230)], [*LONG, *range(300, 500)]
    # From elsewhere would come whole blocks of the tail too.
    assert cached_tokens(client, little) == LONG_BLOCKS_TOKENS
    assert cached_tokens(client, much) == len(much) // BLOCK * BLOCK
