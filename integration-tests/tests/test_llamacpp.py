"""A GGUF file behind the whole stack: the frontend tokenises with what the file holds."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from dynamo_integration_tests.stack import DynamoProcess

WRITER = Path(__file__).parents[2] / "packages/dynamo-worker/tests/unit/llamacpp/gguf_model.py"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    spec = importlib.util.spec_from_file_location("gguf_model", WRITER)
    assert spec is not None
    assert spec.loader is not None
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    path = writer.write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf")
    engine = ["--engine", "llamacpp", "--model", str(path), "--max-model-len", "2048", "--num-threads", "1"]
    with DynamoProcess(["serve", "--http-port", "0", "--workers", "1", *engine]) as serve:
        url = serve.wait_for_url()
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as made:
            yield made
        assert serve.interrupt() == 0, serve.output


def test_a_conversation(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["small"]
    question = {"role": "user", "content": "What is the capital of Japan?"}
    stream = client.chat.completions.create(model="small", messages=[question], temperature=0, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert "Tokyo" in text
    assert "<|im_end|>" not in text
    answer = client.chat.completions.create(
        model="small", messages=[question], temperature=0, logprobs=True, top_logprobs=2
    )
    assert answer.choices[0].message.content == text
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert (answer.usage.prompt_tokens_details.cached_tokens or 0) > 8


def test_a_schema_binds(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    answer = client.chat.completions.create(
        model="small",
        messages=[{"role": "user", "content": "Give a number."}],
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
    )
    assert answer.choices[0].message.content in ('{"n":1}', '{"n":2}')
