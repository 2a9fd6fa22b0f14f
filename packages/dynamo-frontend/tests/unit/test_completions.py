"""Text completions over the whole path."""

import pytest

TEXT = "one two three, four!"


def joined(reply, index=0):
    return "".join(
        choice["text"] for event in reply.events[:-1] for choice in event["choices"] if choice["index"] == index
    )


async def test_whole_and_streamed_agree(stack):
    stack.say(TEXT)
    await stack.start()
    whole = await stack.complete()
    assert whole.json["object"] == "text_completion"
    assert whole.json["choices"][0]["text"] == TEXT
    assert whole.json["id"].startswith("cmpl-")
    stream = await stack.complete(stream=True, stream_options={"include_usage": True})
    assert joined(stream) == TEXT
    assert stream.events[-2]["usage"] == whole.json["usage"]


@pytest.mark.parametrize("stream", [False, True])
async def test_prompt_forms(stack, stream):
    stack.say(TEXT)
    await stack.start()
    ids = stack.tokenizer.encode("Hello", add_special_tokens=False).ids
    for prompt, count in (("Hello", 1), (["Hello", "Bye"], 2), (ids, 1), ([ids, ids, ids], 3)):
        reply = await stack.complete(prompt, stream=stream, n=2)
        assert reply.status == 200, reply.body
        if stream:
            assert [joined(reply, index) for index in range(count * 2)] == [TEXT] * count * 2
        else:
            assert [choice["index"] for choice in reply.json["choices"]] == list(range(count * 2))
            assert {choice["text"] for choice in reply.json["choices"]} == {TEXT}
            assert reply.json["usage"]["prompt_tokens"] == len(ids) * count or count == 2
    assert list(memoryview(stack.script.requests[0].token_ids).cast("I")) == ids


@pytest.mark.parametrize("stream", [False, True])
async def test_echo(stack, stream):
    stack.say(TEXT)
    await stack.start()
    reply = await stack.complete("Say: ", echo=True, stream=stream)
    assert (joined(reply) if stream else reply.json["choices"][0]["text"]) == "Say: " + TEXT


async def test_logprobs_have_parallel_arrays(stack):
    stack.say(TEXT)
    await stack.start()
    shown = (await stack.complete(logprobs=1)).json["choices"][0]["logprobs"]
    assert "".join(shown["tokens"]) == TEXT
    assert len(shown["token_logprobs"]) == len(shown["top_logprobs"]) == len(shown["text_offset"])
    assert [TEXT[o : o + len(t)] for o, t in zip(shown["text_offset"], shown["tokens"], strict=True)] == shown["tokens"]
    stream = await stack.complete(logprobs=1, stream=True)
    tokens = [t for e in stream.events[:-1] for t in (e["choices"][0]["logprobs"] or {"tokens": []})["tokens"]]
    assert tokens == shown["tokens"]


async def test_max_tokens_defaults_to_sixteen(stack):
    stack.say(TEXT * 10)
    await stack.start()
    reply = await stack.complete(max_tokens=None)
    assert reply.json["usage"]["completion_tokens"] == 16
    assert reply.json["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": ["x"] * 129}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"logprobs": 21}, "logprobs"),
        ({"min_tokens": 101}, "min_tokens"),
    ],
)
async def test_bad_fields_are_named(stack, fields, param):
    await stack.start()
    reply = await stack.complete(**{"prompt": "x", **fields})
    assert (reply.status, reply.json["error"]["param"]) == (400, param), reply.body
