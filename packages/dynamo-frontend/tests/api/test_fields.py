"""The field table is true: it lists every field, and each does what it says."""

import re
from pathlib import Path

import anthropic.types.message_create_params
import openai.types.chat.completion_create_params
import openai.types.completion_create_params
import openai.types.responses.response_create_params
import pytest

from dynamo_core.errors import InvalidRequestError
from dynamo_frontend._anthropic.fields import MessagesRequest
from dynamo_frontend._openai.fields import IGNORED_FIELDS, BodyDecoder, ChatRequest, CompletionRequest
from dynamo_frontend._responses.fields import ResponsesRequest

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
}
CASES = [(path, field, verdict) for path, rows in ROWS.items() for field, verdict in rows.items()]


@pytest.mark.parametrize("path", FORMS)
def test_table_lists_exactly_what_is_taken(path):
    taken = {field for field, verdict in ROWS[path].items() if verdict in ("supported", "ignored")}
    assert taken == set(FORMS[path][0].__struct_fields__)
    ignored = {field for field, verdict in ROWS[path].items() if verdict == "ignored"}
    assert ignored == taken & set(IGNORED_FIELDS)


@pytest.mark.parametrize("path", FORMS)
def test_every_field_of_the_stock_client_is_taken_or_refused_by_name(path):
    kind, stock = FORMS[path]
    for field in stock.__annotations__:
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


def assert_refused(kind, field):
    with pytest.raises(InvalidRequestError) as caught:
        BodyDecoder(kind).decode(b'{"%s": null}' % field.encode())
    assert caught.value.param == field
