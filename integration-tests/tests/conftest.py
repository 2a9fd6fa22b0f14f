from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from dynamo_integration_tests.stack import DynamoProcess


@pytest.fixture(scope="session")
def serve_url() -> Iterator[str]:
    """A `dynamo serve` for the whole session: frontend and two workers as processes of their own."""
    with DynamoProcess(["serve", "--http-port", "0"]) as serve:
        yield serve.wait_for_url()
        assert serve.interrupt() == 0, serve.output


@pytest.fixture
def client(serve_url: str) -> Iterator[openai.OpenAI]:
    """The stock client, without retries, so that nothing hides a failure."""
    with openai.OpenAI(base_url=f"{serve_url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client
