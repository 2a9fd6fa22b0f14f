"""Stock clients over a real socket."""

import asyncio
import json
import shutil
import socket

import anthropic
import openai
import pytest

TEXT = "The capital of Japan is Tokyo."
MESSAGES = [{"role": "user", "content": "What is the capital of Japan?"}]


@pytest.fixture
async def client(stack):
    stack.say(TEXT)
    await stack.start(workers=2)
    async with openai.AsyncOpenAI(base_url=f"{stack.frontend.url}/v1", api_key="none", max_retries=0) as found:
        yield found


async def test_openai_models(client):
    assert [model.id async for model in client.models.list()] == ["tiny", "tiny-alias"]
    assert (await client.models.retrieve("tiny")).id == "tiny"


async def test_openai_chat(client, stack):
    reply = await client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, logprobs=True)
    assert reply.choices[0].message.content == TEXT
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert "".join(entry.token for entry in reply.choices[0].logprobs.content) == TEXT
    stream = await client.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, stop=["Tokyo"]
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "The capital of Japan is "
    assert chunks[-1].usage.prompt_tokens > 0


async def test_openai_completions(client):
    reply = await client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=50, logprobs=1)
    assert [choice.text for choice in reply.choices] == [TEXT, TEXT]
    stream = await client.completions.create(model="tiny", prompt="a", max_tokens=50, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == TEXT


async def test_openai_tools(client, stack):
    stack.say('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>')
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
    reply = await client.chat.completions.create(model="tiny", messages=MESSAGES, tools=tools)
    call = reply.choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    again = [
        *MESSAGES,
        reply.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
    ]
    stack.say("It rains.")
    reply = await client.chat.completions.create(model="tiny", messages=again, tools=tools)
    assert reply.choices[0].message.content == "It rains."


async def test_openai_errors(client, stack):
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="other", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=9)
    assert bad.value.param == "temperature"


async def test_openai_sees_an_error_in_the_stream(client, stack):
    for worker in stack.workers[1:]:
        await worker.lease.revoke()
    stack.script.crash_after = 3
    stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="lost"):
        async for _ in stream:
            pass


async def test_curl(client, stack):
    curl = shutil.which("curl")
    assert curl is not None, "the test needs curl"
    body = json.dumps({"model": "tiny", "messages": MESSAGES, "stream": True})
    process = await asyncio.create_subprocess_exec(
        *[curl, "-sS", "-N", "--max-time", "20", f"{stack.frontend.url}/v1/chat/completions"],
        *["-H", "content-type: application/json", "-H", "expect: 100-continue", "-d", body],
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert out.endswith(b"data: [DONE]\n\n"), err


async def test_socket_is_bound_to_the_address_asked_for_only(client, stack):
    (bound,) = stack.frontend.server._server.sockets
    assert bound.family is socket.AF_INET
    assert bound.getsockname()[0] == "127.0.0.1"


async def test_anthropic_messages(client, stack):
    async with anthropic.AsyncAnthropic(base_url=stack.frontend.url, api_key="none", max_retries=0) as found:
        message = await found.messages.create(model="tiny", max_tokens=50, messages=MESSAGES)
        assert message.content[0].text == TEXT
        async with found.messages.stream(model="tiny", max_tokens=50, messages=MESSAGES) as stream:
            assert "".join([text async for text in stream.text_stream]) == TEXT
            final = await stream.get_final_message()
        assert final.stop_reason == "end_turn"
        counted = await found.messages.count_tokens(model="tiny", messages=MESSAGES)
        assert counted.input_tokens > 5
        with pytest.raises(anthropic.NotFoundError):
            await found.messages.create(model="other", max_tokens=5, messages=MESSAGES)


async def test_openai_responses(client):
    reply = await client.responses.create(model="tiny", input="Hi")
    assert reply.output_text == TEXT
    async with client.responses.stream(model="tiny", input="Hi") as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert final.output_text == TEXT
    assert kinds[-1] == "response.completed"
