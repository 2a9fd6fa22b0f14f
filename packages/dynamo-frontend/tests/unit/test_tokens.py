"""Tokenize, detokenize, and generation in token ids."""

import asyncio

import msgspec
import pytest

from dynamo_core.enums import WorkerType

TEXT = "The capital of Japan is Tokyo."
IDS = [5, 6, 7]


def events(reply):
    return [event for event in reply.events if event != "[DONE]"]


@pytest.fixture
async def served(stack):
    stack.say(TEXT)
    await stack.start(workers=2)
    return stack


async def generate(stack, **fields):
    body = {"model": "tiny", "token_ids": IDS, "sampling_params": {"temperature": 0, "max_tokens": 100}, **fields}
    return await stack.post("/inference/v1/generate", body)


async def test_text_becomes_ids_and_ids_text(served):
    reply = await served.post("/tokenize", {"model": "tiny", "prompt": TEXT, "return_token_strs": True})
    expected = served.tokenizer.encode(TEXT, add_special_tokens=True)
    assert reply.json == {
        "count": len(expected.ids),
        "max_model_len": 4096,
        "tokens": expected.ids,
        "token_strs": expected.tokens,
    }
    back = await served.post("/detokenize", {"model": "tiny", "tokens": expected.ids})
    assert back.json == {"prompt": TEXT}
    assert served.script.requests == []


async def test_a_conversation_is_tokenised_as_a_chat_would_be(served):
    messages = [{"role": "user", "content": "Hello"}]
    reply = await served.post("/tokenize", {"model": "tiny-alias", "messages": messages})
    await served.chat("Hello")
    assert served.script.requests[0].token_ids == b"".join(
        token.to_bytes(4, "little") for token in reply.json["tokens"]
    )
    assert reply.json["token_strs"] is None
    shorter = await served.post("/tokenize", {"model": "tiny", "messages": messages, "add_generation_prompt": False})
    assert shorter.json["count"] < reply.json["count"]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": []}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "tools": []}, 400, "tools"),
        ("/tokenize", {"prompt": "x", "nonsense": 1}, 400, "nonsense"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"model": "other", "prompt": "x"}, 404, "model"),
        ("/detokenize", {"tokens": [1 << 31]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": "x"}, 400, "tokens"),
        ("/inference/v1/generate", {"token_ids": []}, 400, "token_ids"),
        ("/inference/v1/generate", {"token_ids": [1 << 31]}, 400, "token_ids"),
        ("/inference/v1/generate", {"token_ids": [5] * 5000}, 400, "token_ids"),
        ("/inference/v1/generate", {"token_ids": IDS, "request_id": "a b"}, 400, "request_id"),
        ("/inference/v1/generate", {"token_ids": IDS, "sampling_params": {"stop": "x"}}, 400, "sampling_params.stop"),
        ("/inference/v1/generate", {"token_ids": IDS, "sampling_params": {"top_p": 2}}, 400, "top_p"),
    ],
)
async def test_bad_requests_name_the_field(served, path, body, status, param):
    reply = await served.post(path, {"model": "tiny", **body})
    assert reply.status == status, reply.body
    assert reply.json["error"]["param"] == param


async def test_tokens_in_tokens_out(served):
    reply = await generate(served, request_id="mine", sampling_params={"temperature": 0, "logprobs": 1})
    (choice,) = reply.json["choices"]
    assert choice["token_ids"] == served.script.output[:16]
    assert choice["finish_reason"] == "length" if len(served.script.output) >= 16 else "stop"
    assert len(choice["logprobs"]["content"]) == len(choice["token_ids"])
    assert reply.json["request_id"] == reply.headers["x-request-id"] == "mine"
    usage = reply.json["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, len(choice["token_ids"]))


@pytest.mark.parametrize("crash_after", [None, 0, 1, 3, 7])
@pytest.mark.parametrize("stream", [False, True])
async def test_ids_are_those_of_a_run_without_faults(served, stream, crash_after):
    served.script.crash_after = crash_after
    reply = await generate(served, stream=stream, stream_options={"include_usage": True} if stream else None)
    assert reply.status == 200
    if stream:
        found = events(reply)
        ids = [token for event in found for choice in event["choices"] for token in choice["token_ids"]]
        usage = found[-1]["usage"]
        assert found[-2]["choices"][0]["finish_reason"] == "stop"
        assert reply.body.endswith(b"data: [DONE]\n\n")
    else:
        ids, usage = reply.json["choices"][0]["token_ids"], reply.json["usage"]
    assert ids == served.script.output
    assert usage["completion_tokens"] == len(ids)


async def test_choices_have_their_own_ids(served):
    reply = await generate(served, sampling_params={"n": 2, "max_tokens": 50})
    assert [choice["index"] for choice in reply.json["choices"]] == [0, 1]
    assert all(choice["token_ids"] == served.script.output for choice in reply.json["choices"])


async def test_a_constraint_needs_an_engine_that_can(served):
    reply = await generate(served, sampling_params={"structured_outputs": {"regex": "a"}})
    assert (reply.status, reply.json["error"]["param"]) == (400, "guided_regex")


async def test_readiness_of_one_model(served):
    reply = await served.get("/v1/models/tiny/ready")
    assert reply.json == {"id": "tiny", "object": "model.readiness", "ready": True, "workers": 2}
    assert (await served.get("/v1/models/other/ready")).status == 404


async def test_a_model_without_all_its_roles_is_not_ready(stack):
    needs = {"worker_type": WorkerType.DECODE, "needs": ((WorkerType.PREFILL, WorkerType.DECODE),)}
    await stack.start(workers=0)
    await stack.add_worker(1, msgspec.structs.replace(stack.card, **needs))
    async with asyncio.timeout(20):
        while (reply := await stack.get("/v1/models/tiny/ready")).status == 404:
            await asyncio.sleep(0)
    assert reply.status == 503
    assert reply.json["error"]["code"] == "backend.unavailable"
