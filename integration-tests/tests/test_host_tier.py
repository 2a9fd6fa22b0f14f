"""Blocks that the device had to give up come back from the host tier, and the answer is the same."""

from __future__ import annotations

import openai

from dynamo_integration_tests.stack import DynamoProcess

# The device holds 48 blocks of 16 tokens: one long prompt pushes out another.
SMALL_DEVICE = ["--workers", "1", "--num-blocks", "48", "--max-model-len", "600", "--block-size", "16"]
SUBJECTS = ["rivers", "mountains", "oceans", "deserts", "forests", "islands"]
HOST_TIER = ["--kv-connector", "kvbm", "--kv-connector-options", '{"host_blocks": 512}']


def ask(client: openai.OpenAI, subject: str) -> tuple[str, int]:
    answer = client.chat.completions.create(
        model="tinylm",
        messages=[
            {"role": "system", "content": f"You know everything about {subject}. " * 22},
            {"role": "user", "content": "What is the capital of Japan?"},
        ],
        temperature=0,
        max_tokens=12,
    )
    assert answer.usage is not None
    details = answer.usage.prompt_tokens_details
    return answer.choices[0].message.content or "", (details.cached_tokens if details else 0) or 0


def rounds(arguments: list[str]) -> list[tuple[str, int]]:
    """Ask about several subjects in turn, twice, so that each finds its blocks pushed out by the others."""
    with DynamoProcess(["serve", "--http-port", "0", *SMALL_DEVICE, *arguments]) as serve:
        url = serve.wait_for_url()
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            answers = [ask(client, subject) for subject in 2 * SUBJECTS]
        assert serve.interrupt() == 0, serve.output
    return answers


def test_the_host_tier_gives_back_what_the_device_dropped() -> None:
    with_tier = rounds(HOST_TIER)
    without = rounds([])
    assert [text for text, _ in with_tier] == [text for text, _ in without]
    again, again_without = with_tier[len(SUBJECTS) :], without[len(SUBJECTS) :]
    assert all(cached >= 176 for _, cached in again)
    assert sum(cached for _, cached in again_without) < sum(cached for _, cached in again) / 2
