import pytest


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("per_chunk", [1, 3, 100])
async def test_reasoning_tokens_are_counted_however_they_were_batched(stack, stream, per_chunk):
    stack.script.per_chunk = per_chunk
    stack.say("<think>\nHmm, weather.\n</think>Sunny.")
    await stack.start()
    reply = await stack.chat(stream=stream, **({"stream_options": {"include_usage": True}} if stream else {}))
    usage = reply.events[-2]["usage"] if stream else reply.json["usage"]
    thought = len(stack.tokenizer.encode("<think>\nHmm, weather.\n</think>", add_special_tokens=False).ids)
    assert usage["completion_tokens_details"]["reasoning_tokens"] == thought
    assert usage["completion_tokens"] > thought


async def test_an_answer_without_reasoning_has_no_reasoning_tokens(stack):
    stack.say("Sunny.")
    await stack.start()
    reply = await stack.chat()
    assert reply.json["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


async def test_limits_are_shown_as_whole_numbers(stack):
    await stack.start()
    reply = await stack.chat(max_tokens=0)
    assert reply.json["error"]["message"] == "max_tokens is 0; it must be from 1 to 2147483648."
