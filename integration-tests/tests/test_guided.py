"""Constrained output through the whole stack, asked for with the stock client, also when the worker dies under it."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from jsonschema import validate

from dynamo_integration_tests.stack import (
    DynamoProcess,
    component_pids,
    flag_value,
    instance_pids,
    kill_process,
)

BOOK = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 60, "maxLength": 80},
        "chapters": {"type": "array", "items": {"type": "integer"}, "minItems": 30, "maxItems": 40},
        "testament": {"enum": ["old", "new"]},
    },
    "required": ["title", "chapters", "testament"],
    "additionalProperties": False,
}
MESSAGES: list[Any] = [{"role": "user", "content": "Describe a book."}]
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string", "maxLength": 20}, "days": {"type": "integer"}},
                "required": ["place", "days"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("weather", "tides")
]
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "book", "schema": BOOK}}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_schema_shapes_the_answer(client: openai.OpenAI, temperature: float) -> None:
    answer = client.chat.completions.create(
        model="tinylm", messages=MESSAGES, response_format=FORMAT, temperature=temperature, seed=5, max_tokens=900
    )
    assert answer.choices[0].finish_reason == "stop"
    validate(json.loads(answer.choices[0].message.content or ""), BOOK)


def test_json_object_gives_an_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tinylm", messages=MESSAGES, response_format={"type": "json_object"}, temperature=0, max_tokens=600
    )
    text = answer.choices[0].message.content or ""
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)
    else:  # an object has no size of its own: the model may write until its budget ends
        assert text.startswith("{")


def test_required_gives_calls_with_valid_arguments(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tinylm", messages=MESSAGES, tools=TOOLS, tool_choice="required", temperature=0, max_tokens=600
    )
    calls = answer.choices[0].message.tool_calls or []
    assert calls
    for call in calls:
        assert call.type == "function"
        assert call.function.name in ("weather", "tides")
        validate(json.loads(call.function.arguments), TOOLS[0]["function"]["parameters"])


def test_a_named_tool_is_called(client: openai.OpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "tides"}}
    answer = client.chat.completions.create(
        model="tinylm", messages=MESSAGES, tools=TOOLS, tool_choice=named, temperature=1, seed=2, max_tokens=200
    )
    [call] = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "tides"
    validate(json.loads(call.function.arguments), TOOLS[1]["function"]["parameters"])


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("guided_choice", ["yes", "no"], r"yes|no"),
        ("guided_regex", "[0-9]{3}-[0-9]{4}", r"[0-9]{3}-[0-9]{4}"),
        ("guided_grammar", 'root ::= ("ab" | "cd") "."', r"(ab|cd)\."),
    ],
)
def test_other_constraints_reach_the_engine(client: openai.OpenAI, field: str, value: Any, allowed: str) -> None:
    answer = client.completions.create(
        model="tinylm", prompt="Say", temperature=1, seed=4, max_tokens=200, extra_body={field: value}
    )
    assert answer.choices[0].finish_reason == "stop"
    assert re.fullmatch(allowed, answer.choices[0].text)


def test_a_wrong_schema_is_the_client_s_fault(client: openai.OpenAI) -> None:
    wrong: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="nonsense"):
            client.chat.completions.create(model="tinylm", messages=MESSAGES, response_format=wrong, stream=stream)


@pytest.fixture
def serve() -> Iterator[DynamoProcess]:
    with DynamoProcess(["serve", "--http-port", "0"]) as process:
        process.wait_for_url()
        yield process


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_document_survives_its_worker(serve: DynamoProcess, temperature: float) -> None:
    pids = instance_pids(flag_value(component_pids(serve.pid, "worker")[0], "--discovery"))
    request: dict[str, Any] = {
        "model": "tinylm",
        "messages": MESSAGES,
        "response_format": FORMAT,
        "temperature": temperature,
        "seed": 11,
        "max_tokens": 900,
    }
    with contextlib.closing(
        openai.OpenAI(base_url=f"{serve.wait_for_url()}/v1", api_key="none", max_retries=0, timeout=60)
    ) as client:
        expected = client.chat.completions.create(**request).choices[0].message.content
        raw = client.chat.completions.with_raw_response.create(**request, stream=True)
        pieces: list[str] = []
        for count, chunk in enumerate(raw.parse(), 1):
            pieces += [choice.delta.content or "" for choice in chunk.choices]
            if count == 30:
                kill_process(pids[raw.headers["x-dynamo-worker-id"].split("/", maxsplit=1)[0]])
    assert "".join(pieces) == expected
    validate(json.loads("".join(pieces)), BOOK)
    # Without this, a worker that had finished before it was killed would pass too.
    metrics = httpx.get(f"{serve.wait_for_url()}/metrics").text
    assert re.findall(r"^dynamo_frontend_model_migration_total{[^}]*} (\S+)$", metrics, re.MULTILINE) == ["1.0"]
