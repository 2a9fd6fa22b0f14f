"""Chat completions over the whole path."""

import asyncio

import msgspec
import pytest

from dynamo_core.errors import BackendProtocolError, CapacityExhaustedError, UnavailableError

TEXT = "The capital of Japan is Tokyo. Größe 日本 🎌!"


def joined(reply, field="content"):
    return "".join(
        choice["delta"].get(field) or "" for event in reply.events[:-1] for choice in event.get("choices", [])
    )


async def test_whole_reply_has_text_usage_and_headers(stack):
    stack.say(TEXT)
    await stack.start()
    reply = await stack.chat("What is the capital of Japan?", max_tokens=200)
    assert reply.status == 200, reply.body
    body = reply.json
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": TEXT}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == len(stack.script.output)
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 7
    assert reply.headers["x-dynamo-worker-id"] == "1/0"
    assert reply.headers["x-dynamo-decision-id"]
    assert body["id"] == f"chatcmpl-{reply.headers['x-request-id']}"


async def test_prompt_is_the_rendered_template(stack):
    stack.say("ok")
    await stack.start()
    await stack.chat("Hi there")
    sent = stack.script.requests[0]
    text = stack.tokenizer.decode(list(memoryview(sent.token_ids).cast("I")), skip_special_tokens=False)
    assert text == "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"
    assert sent.eos_token_ids == (2, 0)
    assert sent.stop.max_tokens == 4096 - len(sent.token_ids) // 4


async def test_stream_gives_role_text_finish_usage_and_done(stack):
    stack.say(TEXT)
    await stack.start()
    reply = await stack.chat(stream=True, stream_options={"include_usage": True})
    events = reply.events
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert joined(reply) == TEXT
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"] == []
    assert events[-2]["usage"]["completion_tokens"] == len(stack.script.output)
    assert events[-3]["choices"][0]["finish_reason"] == "stop"
    assert all(event["usage"] is None for event in events[:-2])


async def test_length_and_several_choices(stack):
    stack.say(TEXT)
    await stack.start()
    reply = await stack.chat(max_tokens=3, n=2)
    choices = reply.json["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    assert {choice["finish_reason"] for choice in choices} == {"length"}
    assert reply.json["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize("per_chunk", [1, 3, 100])
@pytest.mark.parametrize("stream", [False, True])
async def test_stop_string_across_tokens(stack, per_chunk, stream):
    stack.say(TEXT)
    stack.script.per_chunk = per_chunk
    await stack.start()
    reply = await stack.chat(stop=["an is T", "xyz"], stream=stream, stream_options=None)
    expected = TEXT[: TEXT.index("an is T")]
    if stream:
        assert joined(reply) == expected
        assert reply.events[-2]["choices"][0]["finish_reason"] == "stop"
    else:
        assert reply.json["choices"][0]["message"]["content"] == expected
        consumed = reply.json["usage"]["completion_tokens"]
        assert "an is T" in stack.tokenizer.decode(stack.script.output[:consumed])
        assert "an is T" not in stack.tokenizer.decode(stack.script.output[: consumed - 1])


async def test_stop_string_cancels_the_worker(stack):
    stack.say(TEXT * 20)
    await stack.start()
    await stack.chat(stop="capital")
    async with asyncio.timeout(10):
        while not stack.script.stopped:
            await asyncio.sleep(0)


async def test_logprobs(stack):
    stack.say("Hello wörld")
    await stack.start()
    whole = await stack.chat(logprobs=True, top_logprobs=2)
    content = whole.json["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == "Hello wörld"
    assert len(content[0]["top_logprobs"]) == 2
    stream = await stack.chat(logprobs=True, top_logprobs=2, stream=True)
    streamed = [
        entry
        for event in stream.events[:-1]
        for choice in event["choices"]
        for entry in (choice["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == content


async def test_missing_logprobs_are_an_error(stack):
    stack.say("Hello")
    await stack.start(migration_limit=0)
    original = stack.workers[0]._chunk

    def without(*args):
        import msgspec

        return msgspec.structs.replace(original(*args), logprobs=())

    stack.workers[0]._chunk = without
    reply = await stack.chat(logprobs=True)
    assert reply.status == 502
    assert reply.json["error"]["code"] == "backend.protocol"


TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
CALL = 'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def streamed_calls(reply):
    found = []
    for choice in [choice for event in reply.events[:-1] for choice in event["choices"]]:
        for call in choice["delta"].get("tool_calls", []):
            if "id" in call:
                found.append(call)
            else:
                found[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return found


@pytest.mark.parametrize("stream", [False, True])
async def test_reasoning_and_tool_call(stack, stream):
    stack.say("<think>\nHmm, weather.\n</think>\n" + CALL)
    await stack.start()
    reply = await stack.chat(tools=TOOLS, stream=stream)
    if stream:
        assert joined(reply) == "Let me see."
        assert joined(reply, "reasoning_content") == "Hmm, weather.\n"
        calls = streamed_calls(reply)
        assert reply.events[-2]["choices"][0]["finish_reason"] == "tool_calls"
    else:
        message = reply.json["choices"][0]["message"]
        assert message["content"] == "Let me see."
        assert message["reasoning_content"] == "Hmm, weather.\n"
        calls = message["tool_calls"]
        assert reply.json["choices"][0]["finish_reason"] == "tool_calls"
    assert calls[0]["function"] == {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
    prompt = stack.tokenizer.decode(list(memoryview(stack.script.requests[0].token_ids).cast("I")))
    assert '"name": "get_weather"' in prompt


async def test_parallel_tool_calls_false_ends_after_the_first(stack):
    stack.say(CALL + CALL)
    await stack.start()
    reply = await stack.chat(tools=TOOLS, parallel_tool_calls=False)
    assert len(reply.json["choices"][0]["message"]["tool_calls"]) == 1
    assert reply.json["choices"][0]["finish_reason"] == "tool_calls"


async def test_tool_choice_none_hides_tools_and_keeps_text(stack):
    stack.say(CALL)
    await stack.start()
    reply = await stack.chat(tools=TOOLS, tool_choice="none")
    assert reply.json["choices"][0]["message"]["content"] == CALL
    prompt = stack.tokenizer.decode(list(memoryview(stack.script.requests[0].token_ids).cast("I")))
    assert "get_weather" not in prompt


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"temperature": 2.5}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"n": 0}, 400, "n"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 5000}, 400, "messages"),
        ({"stop": ["a"] * 5}, 400, "stop"),
        ({"stop": ""}, 400, "stop"),
        ({"top_logprobs": 3}, 400, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
        ({"nonsense": 1}, 400, "nonsense"),
        ({"audio": {}}, 400, "audio"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 415, "messages[0].content[0]"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"guided_regex": "a+"}, 400, "guided_regex"),
        ({"tools": TOOLS, "tool_choice": "required"}, 400, "tool_choice"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
        ({"store": True}, 400, "store"),
        ({"continue_final_message": True, "add_generation_prompt": True}, 400, "continue_final_message"),
        ({"chat_template_kwargs": {"messages": []}}, 400, "chat_template_kwargs"),
        ({"model": "other"}, 404, "model"),
    ],
)
async def test_bad_fields_are_named(stack, fields, status, param):
    stack.say("ok")
    await stack.start()
    reply = await stack.chat(**fields)
    error = reply.json["error"]
    assert (reply.status, error["param"]) == (status, param), error
    assert set(error) == {"message", "type", "param", "code"}
    assert stack.script.requests == []


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b"\xff", b'{"model": "tiny"}', b"[" * 5000, b'{"model":"\xed\xa0\x80"}']
)
async def test_bad_bodies_are_400(stack, body):
    await stack.start()
    reply = await stack.post("/v1/chat/completions", body)
    assert reply.status == 400
    assert reply.json["error"]["type"] == "invalid_request_error"


async def test_context_overflow_is_refused_before_the_stream(stack):
    await stack.start()
    reply = await stack.chat("word " * 6000, stream=True)
    assert reply.status == 400
    assert reply.json["error"]["code"] == "context_length_exceeded"


async def test_sampled_requests_get_a_seed_and_greedy_ones_do_not(stack):
    stack.say("ok")
    await stack.start()
    await stack.chat(temperature=1.0)
    await stack.chat(temperature=0)
    assert stack.script.requests[0].sampling.seed is not None
    assert stack.script.requests[1].sampling.seed is None


async def test_request_id_is_honoured_only_if_plain(stack):
    stack.say("ok")
    await stack.start()
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
    good = await stack.post("/v1/chat/completions", body, {"x-request-id": "abc-1"})
    assert good.headers["x-request-id"] == "abc-1"
    bad = await stack.post("/v1/chat/completions", body, {"x-request-id": 'a"b c'})
    assert bad.headers["x-request-id"] != 'a"b c'


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (CapacityExhaustedError("busy", reason="capacity.pool_exhausted", retry_after_s=2.4), 529),
        (UnavailableError("gone", reason="backend.unavailable"), 503),
        (BackendProtocolError("odd"), 502),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_worker_errors_have_their_status(stack, error, status, stream):
    await stack.start()
    stack.script.fail_with = error
    reply = await stack.chat(stream=stream)
    assert reply.status == status
    assert reply.json["error"]["code"] == error.reason
    assert reply.headers.get("retry-after") == ("3" if error.retry_after_s else None)


async def test_disconnect_cancels_the_worker(stack, request_bytes):
    stack.say(TEXT * 100)
    await stack.start()
    transport = stack.connect()
    body = b'{"model":"tiny","stream":true,"messages":[{"role":"user","content":"x"}]}'
    transport.protocol.data_received(request_bytes("POST", "/v1/chat/completions", body))
    await transport.wait(lambda: b"data:" in transport.written)
    transport.abort()
    async with asyncio.timeout(10):
        while not stack.script.stopped:
            await asyncio.sleep(0)
    metrics = (await stack.get("/metrics")).body.decode()
    assert 'error_type="cancelled"' in metrics
    assert 'dynamo_frontend_active_requests{model="tiny"} 0.0' in metrics


async def test_slow_client_holds_the_worker_back(stack, request_bytes):
    stack.say("word " * 2000)
    await stack.start()
    transport = stack.connect()
    transport.protocol.pause_writing()
    body = b'{"model":"tiny","stream":true,"messages":[{"role":"user","content":"x"}]}'
    transport.protocol.data_received(request_bytes("POST", "/v1/chat/completions", body))
    async with asyncio.timeout(10):
        while stack.script.sent < 256:
            await asyncio.sleep(0)
    for _ in range(50):
        await asyncio.sleep(0)
    assert stack.script.sent == 256
    transport.protocol.resume_writing()
    await transport.wait(lambda: bool(transport.replies))
    assert stack.script.sent == len(stack.script.output)


async def test_alias_serves_under_its_own_name(stack):
    stack.say("ok")
    await stack.start()
    reply = await stack.chat(model="tiny-alias")
    assert reply.json["model"] == "tiny-alias"


async def test_continue_final_message(stack):
    stack.say("rest")
    await stack.start()
    messages = [{"role": "user", "content": "Say"}, {"role": "assistant", "content": "The begin"}]
    reply = await stack.chat(messages=messages, continue_final_message=True, add_generation_prompt=False)
    assert reply.status == 200
    prompt = stack.tokenizer.decode(
        list(memoryview(stack.script.requests[0].token_ids).cast("I")), skip_special_tokens=False
    )
    assert prompt.endswith("<|im_start|>assistant\nThe begin")


@pytest.fixture
def guided(stack):
    stack.card = msgspec.structs.replace(stack.card, capabilities=("guided_decoding",))
    return stack


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "output"),
    [
        ("required", '[{"name": "get_weather", "arguments": {"city": "Oslo"}}]'),
        ({"type": "function", "function": {"name": "get_weather"}}, '{"city": "Oslo"}'),
    ],
)
async def test_forced_tool_choice_constrains_the_output(guided, choice, output, stream):
    guided.say(output)
    await guided.start()
    reply = await guided.chat(tools=TOOLS, tool_choice=choice, stream=stream)
    if stream:
        calls = streamed_calls(reply)
        assert joined(reply) == ""
    else:
        calls = reply.json["choices"][0]["message"]["tool_calls"]
    assert calls[0]["function"] == {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
    schema = guided.script.requests[0].sampling.guided.json
    assert schema["type"] == ("array" if choice == "required" else "object")


@pytest.mark.parametrize(
    ("fields", "schema"),
    [
        ({"response_format": {"type": "json_object"}}, {"type": "object"}),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "array"}}}}, {"type": "array"}),
        ({"guided_json": {"type": "string"}}, {"type": "string"}),
        ({"response_format": {"type": "text"}}, None),
    ],
)
async def test_response_format_reaches_the_engine(guided, fields, schema):
    guided.say("{}")
    await guided.start()
    assert (await guided.chat(**fields)).status == 200
    found = guided.script.requests[0].sampling.guided
    assert (found.json if found else None) == schema


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "perhaps"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "required", "guided_regex": "a"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
    ],
)
async def test_contradicting_constraints_are_named(guided, fields, param):
    await guided.start()
    reply = await guided.chat(**fields)
    assert (reply.status, reply.json["error"]["param"]) == (400, param)
