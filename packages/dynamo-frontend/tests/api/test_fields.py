"""The field table is true: it lists every field, and each does what it says."""

import re
from pathlib import Path

import anthropic.types.message_create_params
import openai.types.chat.completion_create_params
import openai.types.completion_create_params
import openai.types.responses.response_create_params
import pytest

from dynamo_core.errors import InvalidRequestError
from dynamo_frontend._anthropic.fields import CountTokensRequest, MessagesRequest
from dynamo_frontend._embeddings.api import EmbeddingRequest
from dynamo_frontend._openai.fields import IGNORED_FIELDS, BodyDecoder, ChatRequest, CompletionRequest
from dynamo_frontend._rerank.api import RerankRequest
from dynamo_frontend._responses.fields import InputTokensRequest, ResponsesRequest
from dynamo_frontend._tokens.generate_api import TokenRequest
from dynamo_frontend._tokens.text_api import DetokenizeRequest, TokenizeRequest

TABLE = (Path(__file__).parents[2] / "FIELDS.md").read_text(encoding="utf-8")
ROWS = {
    path: dict(re.findall(r"^\| (\w+) \| (\w+) \|", section, re.MULTILINE))
    for path, section in re.findall(r"^## `(\S+)`\n(.*?)(?=^## |\Z)", TABLE, re.MULTILINE | re.DOTALL)
}
FORMS = {
    "/v1/chat/completions": (ChatRequest, openai.types.chat.completion_create_params.CompletionCreateParamsBase),
    "/v1/completions": (CompletionRequest, openai.types.completion_create_params.CompletionCreateParamsBase),
    "/v1/responses": (ResponsesRequest, openai.types.responses.response_create_params.ResponseCreateParamsBase),
    "/v1/messages": (MessagesRequest, anthropic.types.message_create_params.MessageCreateParamsBase),
    "/v1/messages/count_tokens": (CountTokensRequest, anthropic.types.MessageCountTokensParams),
    "/v1/responses/input_tokens": (InputTokensRequest, openai.types.responses.InputTokenCountParams),
    "/v1/embeddings": (EmbeddingRequest, openai.types.EmbeddingCreateParams),
    "/v1/rerank": (RerankRequest, None),
    "/tokenize": (TokenizeRequest, None),
    "/detokenize": (DetokenizeRequest, None),
    "/inference/v1/generate": (TokenRequest, None),
}
STOCK = [path for path, (_, stock) in FORMS.items() if stock is not None]
NESTED = re.findall(r"^\| `(\S+)` \| (\S+) \| (\w+) \|", TABLE, re.MULTILINE)
MESSAGES = [{"role": "user", "content": "Hello"}]
CALL = {"type": "function", "function": {"name": "f"}}
PLACES = {
    ("/v1/chat/completions", "messages[]"): (
        [
            openai.types.chat.ChatCompletionUserMessageParam,
            openai.types.chat.ChatCompletionAssistantMessageParam,
            openai.types.chat.ChatCompletionToolMessageParam,
            openai.types.chat.ChatCompletionSystemMessageParam,
            openai.types.chat.ChatCompletionDeveloperMessageParam,
        ],
        lambda given: {"messages": [{**MESSAGES[0], **given}]},
    ),
    ("/v1/chat/completions", "response_format"): (
        [openai.types.shared_params.ResponseFormatJSONSchema],
        lambda given: {"messages": MESSAGES, "response_format": {"type": "text", **given}},
    ),
    ("/v1/chat/completions", "stream_options"): (
        [openai.types.chat.ChatCompletionStreamOptionsParam],
        lambda given: {"messages": MESSAGES, "stream": True, "stream_options": given},
    ),
    ("/v1/chat/completions", "tools[].function"): (
        [openai.types.shared_params.FunctionDefinition],
        lambda given: {"messages": MESSAGES, "tools": [{"type": "function", "function": {"name": "f", **given}}]},
    ),
    ("/v1/responses", "reasoning"): (
        [openai.types.shared_params.Reasoning],
        lambda given: {"input": "Hello", "reasoning": given},
    ),
    ("/v1/responses", "text"): (
        [openai.types.responses.ResponseTextConfigParam],
        lambda given: {"input": "Hello", "text": given},
    ),
    ("/v1/responses", "tools[]"): (
        [openai.types.responses.FunctionToolParam],
        lambda given: {"input": "Hello", "tools": [{"type": "function", "name": "f", **given}]},
    ),
    ("/v1/messages", "thinking"): (
        [anthropic.types.ThinkingConfigEnabledParam, anthropic.types.ThinkingConfigAdaptiveParam],
        lambda given: {"messages": MESSAGES, "max_tokens": 5, "thinking": {"type": "enabled", **given}},
    ),
    ("/v1/messages", "tool_choice"): (
        [anthropic.types.ToolChoiceToolParam, anthropic.types.ToolChoiceAutoParam],
        lambda given: {"messages": MESSAGES, "max_tokens": 5, "tool_choice": {"type": "auto", **given}},
    ),
    ("/v1/messages", "tools[]"): (
        [anthropic.types.ToolParam],
        lambda given: {"messages": MESSAGES, "max_tokens": 5, "tools": [{"name": "f", "input_schema": {}, **given}]},
    ),
}
ROWS = {path: rows for path, rows in ROWS.items() if path.startswith("/")}
CASES = [(path, field, verdict) for path, rows in ROWS.items() for field, verdict in rows.items()]


@pytest.mark.parametrize("path", FORMS)
def test_table_lists_exactly_what_is_taken(path):
    taken = {field for field, verdict in ROWS[path].items() if verdict in ("supported", "ignored")}
    assert taken == set(FORMS[path][0].__struct_fields__)
    ignored = {field for field, verdict in ROWS[path].items() if verdict == "ignored"}
    assert ignored == taken & set(IGNORED_FIELDS)


@pytest.mark.parametrize("path", STOCK)
def test_every_field_of_the_stock_client_is_taken_or_refused_by_name(path):
    kind, stock = FORMS[path]
    for field in stock.__annotations__:
        assert field in ROWS[path], f"the table does not list {field}"
        if field not in kind.__struct_fields__:
            assert_refused(kind, field)


@pytest.mark.parametrize(("path", "field", "verdict"), [case for case in CASES if case[2] == "refused"])
def test_refused_fields_are_named(path, field, verdict):
    assert_refused(FORMS[path][0], field)


@pytest.mark.parametrize("field", sorted({field for _, field, verdict in CASES if verdict == "ignored"}))
async def test_ignored_fields_change_nothing(stack, field):
    stack.say("fine")
    await stack.start()
    plain = await stack.chat()
    value = {"a": "b"} if field == "metadata" else "x"
    given = await stack.chat(**{field: value})
    assert given.json["choices"] == plain.json["choices"]
    first, second = stack.script.requests
    assert (first.sampling, first.stop, first.routing) == (second.sampling, second.stop, second.routing)


@pytest.mark.parametrize(("path", "place"), PLACES)
def test_every_nested_field_of_the_stock_client_is_listed(path, place):
    listed = {
        field.removeprefix(f"{place}.") for row, field, _ in NESTED if row == path and field.startswith(f"{place}.")
    }
    stock = {field for kind in PLACES[path, place][0] for field in kind.__annotations__}
    assert stock <= listed, f"the table does not list {sorted(stock - listed)}"


async def test_nested_fields_are_refused_by_name_where_the_table_says_so(stack):
    stack.say("fine")
    await stack.start()
    for path, dotted, verdict in NESTED:
        place, _, field = dotted.rpartition(".")
        reply = await stack.post(path, {"model": "tiny", **PLACES[path, place][1]({field: "x"})})
        message = str(reply.json["error"]) if reply.status != 200 else ""
        refused = reply.status == 400 and field in message and "Unknown field" in message
        assert refused == (verdict == "refused" and field != "summary"), f"{path} {dotted}: {message}"


def assert_refused(kind, field):
    with pytest.raises(InvalidRequestError) as caught:
        BodyDecoder(kind).decode(b'{"%s": null}' % field.encode())
    assert caught.value.param == field
