"""The responses API over the whole path."""

import json

import pytest

TEXT = "Tokyo is the capital."
TOOLS = [{"type": "function", "name": "get_weather", "parameters": {"type": "object"}}]
CALL = 'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


async def send(stack, path="/v1/responses", **fields):
    return await stack.post(path, {"model": "tiny", "input": "Hi", **fields})


def events(reply):
    found = []
    for block in reply.body.decode().strip().split("\n\n"):
        kind, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert kind == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def prompt(stack):
    return stack.tokenizer.decode(list(memoryview(stack.script.requests[-1].token_ids).cast("I")))


async def test_whole_response(stack):
    stack.say(f"<think>\nHm.</think>{TEXT}")
    await stack.start()
    body = (await send(stack, instructions="Be brief.", metadata={"a": "b"})).json
    assert (body["object"], body["status"], body["error"]) == ("response", "completed", None)
    assert [item["type"] for item in body["output"]] == ["reasoning", "message"]
    assert body["output"][0]["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert body["output"][1]["content"][0]["text"] == TEXT
    assert body["usage"]["input_tokens_details"] == {"cached_tokens": 7}
    assert (body["instructions"], body["metadata"]) == ("Be brief.", {"a": "b"})
    assert "Be brief." in prompt(stack)
    counted = (await send(stack, "/v1/responses/input_tokens", instructions="Be brief.")).json
    assert counted == {"object": "response.input_tokens", "input_tokens": body["usage"]["input_tokens"]}


async def test_stream_ends_with_the_whole_response(stack):
    stack.say(f"<think>\nHm.</think>{CALL}")
    await stack.start()
    whole = (await send(stack, tools=TOOLS)).json
    found = events(await send(stack, tools=TOOLS, stream=True))
    assert [event["type"] for event in found[:2]] == ["response.created", "response.in_progress"]
    assert found[-1]["type"] == "response.completed"
    last = found[-1]["response"]
    assert [item["type"] for item in last["output"]] == ["reasoning", "message", "function_call"]
    without_ids = [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in last["output"]]
    assert without_ids == [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in whole["output"]]
    text = "".join(event["delta"] for event in found if event["type"] == "response.output_text.delta")
    assert text == "Let me see."
    added = [event["item"]["id"] for event in found if event["type"] == "response.output_item.added"]
    done = [event["item"]["id"] for event in found if event["type"] == "response.output_item.done"]
    assert added == done == [item["id"] for item in last["output"]]


@pytest.mark.parametrize("stream", [False, True])
async def test_length_is_incomplete(stack, stream):
    stack.say(TEXT)
    await stack.start()
    reply = await send(stack, max_output_tokens=2, stream=stream)
    body = events(reply)[-1]["response"] if stream else reply.json
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


async def test_calls_and_their_outputs_go_back_to_the_model(stack):
    stack.say("It rains.")
    await stack.start()
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "summary": []},
        {"type": "function_call", "call_id": "c", "name": "get_weather", "arguments": '{"city": "Oslo"}'},
        {"type": "function_call_output", "call_id": "c", "output": "rain"},
    ]
    assert (await send(stack, input=items, tools=TOOLS)).json["output"][0]["content"][0]["text"] == "It rains."
    assert '"arguments": {"city": "Oslo"}' in prompt(stack)
    assert "<tool_response>\nrain\n</tool_response>" in prompt(stack)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"include": ["x"]}, "include"),
        ({"truncation": "auto"}, "truncation"),
        ({"previous_response_id": "r"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"text": {"format": {"type": "json_object"}}}, "response_format"),
        ({"max_output_tokens": 0}, "max_completion_tokens"),
    ],
)
async def test_what_is_not_offered_is_refused_by_name(stack, fields, param):
    await stack.start()
    reply = await send(stack, **fields)
    assert (reply.status, reply.json["error"]["param"]) == (400, param)


async def test_lost_stream_ends_as_failed(stack):
    stack.say(TEXT)
    await stack.start(migration_limit=0)
    stack.script.crash_after = 3
    last = events(await send(stack, stream=True))[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
