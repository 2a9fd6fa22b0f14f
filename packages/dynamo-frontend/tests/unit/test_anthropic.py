"""The messages API over the whole path."""

import json

import pytest

from dynamo_core.errors import CapacityExhaustedError

TEXT = "Tokyo is the capital. 日本"
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "YQ=="}}
TOOLS = [{"name": "get_weather", "input_schema": {"type": "object"}}]
CALL = 'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


async def send(stack, path="/v1/messages", **fields):
    body = {"model": "tiny", "max_tokens": 100, "messages": [{"role": "user", "content": "Hi"}], **fields}
    return await stack.post(path, {key: value for key, value in body.items() if value is not None})


def events(reply):
    found = []
    for block in reply.body.decode().strip().split("\n\n"):
        kind, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert kind == f"event: {found[-1]['type']}"
    return found


async def test_whole_message(stack):
    stack.say(f"<think>\nHm.</think>{TEXT}")
    await stack.start()
    reply = await send(stack, system="Be brief.")
    body = reply.json
    assert (body["type"], body["role"], body["stop_reason"], body["stop_sequence"]) == (
        "message",
        "assistant",
        "end_turn",
        None,
    )
    assert body["content"] == [
        {"type": "thinking", "thinking": "Hm.", "signature": ""},
        {"type": "text", "text": TEXT},
    ]
    usage = body["usage"]
    assert usage["cache_read_input_tokens"] == 7
    assert usage["output_tokens"] == len(stack.script.output)
    prompt = stack.tokenizer.decode(list(memoryview(stack.script.requests[0].token_ids).cast("I")))
    assert "Be brief." in prompt
    counted = await send(stack, "/v1/messages/count_tokens", system="Be brief.", max_tokens=None)
    assert counted.json == {"input_tokens": usage["input_tokens"] + 7}


async def test_stream_has_the_apis_event_order(stack):
    stack.say(f"<think>\nHm.</think>{CALL}")
    await stack.start()
    reply = await send(stack, stream=True, tools=TOOLS)
    kinds = [event["type"] for event in events(reply)]
    compact = [kind for index, kind in enumerate(kinds) if index == 0 or kind != kinds[index - 1]]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert compact == ["message_start", *block, *block, *block, "message_delta", "message_stop"]
    starts = [event["content_block"]["type"] for event in events(reply) if event["type"] == "content_block_start"]
    assert starts == ["thinking", "text", "tool_use"]
    indices = [event["index"] for event in events(reply) if event["type"] == "content_block_stop"]
    assert indices == [0, 1, 2]
    json_text = "".join(e["delta"].get("partial_json", "") for e in events(reply) if e["type"] == "content_block_delta")
    assert json.loads(json_text) == {"city": "Oslo"}
    end = events(reply)[-2]
    assert end["delta"]["stop_reason"] == "tool_use"
    assert end["usage"]["output_tokens"] == len(stack.script.output)


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_sequences_and_length(stack, stream):
    stack.say(TEXT)
    await stack.start()
    reply = await send(stack, stop_sequences=["capital"], stream=stream)
    end = events(reply)[-2]["delta"] if stream else reply.json
    assert (end["stop_reason"], end["stop_sequence"]) == ("stop_sequence", "capital")
    reply = await send(stack, max_tokens=2, stream=stream)
    end = events(reply)[-2]["delta"] if stream else reply.json
    assert end["stop_reason"] == "max_tokens"


async def test_tool_results_go_back_to_the_model(stack):
    stack.say("It rains.")
    await stack.start()
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Oslo"}}],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "rain"}]},
    ]
    reply = await send(stack, messages=messages, tools=TOOLS)
    assert reply.json["content"] == [{"type": "text", "text": "It rains."}]
    prompt = stack.tokenizer.decode(list(memoryview(stack.script.requests[0].token_ids).cast("I")))
    assert '"arguments": {"city": "Oslo"}' in prompt
    assert "<tool_response>\nrain\n</tool_response>" in prompt


@pytest.mark.parametrize(
    ("fields", "status", "kind"),
    [
        ({"max_tokens": None}, 400, "invalid_request_error"),
        ({"model": "other"}, 404, "not_found_error"),
        ({"nonsense": 1}, 400, "invalid_request_error"),
        ({"temperature": 3}, 400, "invalid_request_error"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, 415, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": ["text"]}]}, 400, "invalid_request_error"),
        ({"thinking": {"type": "enabled", "nonsense": 1}}, 400, "invalid_request_error"),
        ({"tool_choice": {"type": "any"}, "tools": TOOLS}, 400, "invalid_request_error"),
        ({"thinking": {"type": "perhaps"}}, 400, "invalid_request_error"),
        ({"tools": [{"name": "x", "type": "bash_20250124", "input_schema": {}}]}, 400, "invalid_request_error"),
    ],
)
async def test_errors_have_the_apis_shape(stack, fields, status, kind):
    await stack.start()
    reply = await send(stack, **fields)
    assert (reply.status, reply.json["type"], reply.json["error"]["type"]) == (status, "error", kind), reply.body


@pytest.mark.parametrize("stream", [False, True])
async def test_overload_is_an_overloaded_error(stack, stream):
    await stack.start()
    stack.script.fail_with = CapacityExhaustedError("busy", reason="capacity.pool_exhausted", retry_after_s=2)
    reply = await send(stack, stream=stream)
    assert (reply.status, reply.json["error"]["type"]) == (529, "overloaded_error")
    assert reply.headers["retry-after"] == "2"


async def test_lost_stream_ends_with_an_error_event(stack):
    stack.say(TEXT)
    await stack.start(migration_limit=0)
    stack.script.crash_after = 3
    reply = await send(stack, stream=True)
    assert events(reply)[-1]["type"] == "error"
