"""A request outlives its workers: whatever token the loss comes after, the client sees the fault-free answer."""

import asyncio

import msgspec
import pytest

from dynamo_core.enums import FinishReason
from dynamo_core.errors import UnavailableError
from dynamo_core.requests import GenerateChunk
from dynamo_core.tokens import pack_tokens

TEXT = "<think>\nGröße?\n</think>\nJa 日本. 🎌 stop here"
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
FORMS = {
    "plain": {},
    "stop": {"stop": ["stop"]},
    "logprobs": {"logprobs": True, "top_logprobs": 1},
    "length": {"max_tokens": 9},
    "two": {"n": 2, "logprobs": True},
    "tools": {"tools": TOOLS, "logprobs": True},
    "forced tools": {"tools": TOOLS, "tool_choice": "required"},
    "json schema": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}},
        "logprobs": True,
    },
}
TEXTS = {
    "tools": 'So.\n<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>',
    "forced tools": '[{"name": "f", "arguments": {"a": "é"}}, {"name": "f", "arguments": {}}]',
    "json schema": '{"a": ["é", 1]}',
}


def texts(events):
    found = {}
    for event in events:
        for choice in event["choices"] if isinstance(event, dict) else ():
            for field in ("content", "reasoning_content"):
                key = (choice["index"], field)
                found[key] = found.get(key, "") + (choice["delta"].get(field) or "")
            for call in choice["delta"].get("tool_calls", ()):
                key = (choice["index"], "call", call["index"])
                found[key] = found.get(key, "") + call["function"].get("name", "") + call["function"]["arguments"]
            if choice["logprobs"]:
                found.setdefault((choice["index"], "logprobs"), []).extend(choice["logprobs"]["content"])
            if choice["finish_reason"]:
                found[(choice["index"], "finish")] = choice["finish_reason"]
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stream", [False, True])
async def test_every_crash_point_gives_the_fault_free_answer(stack, form, stream):
    stack.say(TEXTS.get(form, TEXT))
    stack.card = msgspec.structs.replace(stack.card, capabilities=("guided_decoding", "logprobs"))
    await stack.start(workers=1)
    fields = {**FORMS[form], "stream": stream}
    if stream:
        fields["stream_options"] = {"include_usage": True}
    expected = await stack.chat(**fields)
    assert "tools" not in form or b'"tool_calls"' in expected.body
    for crash_after in range(1, len(stack.script.output) + 1):
        await stack.add_worker(100 + crash_after)
        stack.script.sent = 0
        stack.script.crash_after = crash_after
        reply = await stack.chat(**fields)
        assert reply.status == 200, reply.body
        crashed = stack.script.crash_after is None
        first, last = stack.script.requests[-2:]
        assert not last.attempt or last.sampling == first.sampling
        stack.script.crash_after = None
        if stream:
            assert texts(reply.events) == texts(expected.events), crash_after
            assert reply.events[-1] == "[DONE]"
            assert reply.events[-2]["usage"] == expected.events[-2]["usage"]
        else:
            assert without_call_ids(reply) == without_call_ids(expected), crash_after
            assert reply.json["usage"] == expected.json["usage"]
        if crashed:
            await leave(stack)


def without_call_ids(reply):
    """Choices without the calls' ids, which are made of the request's."""
    choices = reply.json["choices"]
    for call in [call for choice in choices for call in choice["message"].get("tool_calls", ())]:
        del call["id"]
    return choices


async def leave(stack):
    """Take the crashed worker out of discovery, as its lease would."""
    for worker in list(stack.workers):
        if worker.address not in stack.plane._network.endpoints:
            await worker.lease.revoke()
            stack.workers.remove(worker)


async def test_continuation_carries_the_accepted_tokens(stack):
    stack.say("one two three four five six")
    await stack.start(workers=2)
    stack.script.crash_after = 3
    reply = await stack.chat(max_tokens=50)
    assert reply.status == 200
    first, second = stack.script.requests
    assert second.attempt == 1
    assert second.token_ids == first.token_ids + pack_tokens(stack.script.output[:3])
    assert second.prompt_tokens == len(first.token_ids) // 4
    assert second.stop.max_tokens == first.stop.max_tokens == 50
    metrics = (await stack.get("/metrics")).body.decode()
    assert 'model_migration_total{migration_type="ongoing_request",model="tiny"} 1.0' in metrics


async def test_several_choices_are_drawn_again_from_the_same_seed(stack):
    stack.say("one two three four five six")
    await stack.start(workers=2)
    stack.script.crash_after = 3
    reply = await stack.chat(n=2, temperature=1.0)
    assert reply.status == 200
    first, second = stack.script.requests
    assert second.token_ids == first.token_ids
    assert second.sampling.seed == first.sampling.seed is not None


async def test_refused_request_goes_to_another_worker(stack):
    stack.say("fine")
    await stack.start(workers=2)
    stack.script.fail_with = UnavailableError("leaving", reason="backend.draining")
    reply = await stack.chat()
    assert reply.status == 200
    assert len(stack.script.requests) == 2


async def test_lost_worker_without_another_is_an_error_before_the_stream(stack):
    stack.say("one two three")
    await stack.start(workers=1)
    stack.script.fail_with = UnavailableError("crashed", reason="transport.disconnected")
    reply = await stack.chat(stream=True)
    assert reply.status == 503
    assert reply.json["error"]["code"] == "transport.disconnected"


async def test_lost_worker_without_another_is_an_error_event_in_the_stream(stack):
    stack.say("one two three")
    await stack.start(workers=1)
    stack.script.crash_after = 2
    reply = await stack.chat(stream=True)
    assert reply.status == 200
    assert reply.events[-1]["error"]["code"] == "transport.disconnected"
    assert "[DONE]" not in reply.events
    assert b"event: error\n" in reply.body


async def test_limit_zero_turns_migration_off(stack):
    stack.say("one two three")
    await stack.start(workers=2, migration_limit=0)
    stack.script.crash_after = 2
    reply = await stack.chat()
    assert reply.status == 503


def finish(reason=FinishReason.EOS, **fields):
    return GenerateChunk(finish_reason=reason, **fields)


@pytest.mark.parametrize(
    ("chunks", "code"),
    [
        ([], "backend.stream_incomplete"),
        ([finish()], "backend.empty_output"),
        ([GenerateChunk(pack_tokens([5]))], "backend.stream_incomplete"),
        ([GenerateChunk(pack_tokens([5]), first_index=2)], "backend.stream_incomplete"),
        ([GenerateChunk(pack_tokens([5])), GenerateChunk(pack_tokens([6, 7]))], "backend.protocol"),
        ([GenerateChunk(pack_tokens([5]), choice=3)], "backend.protocol"),
        ([finish(choice=3)], "backend.protocol"),
        ([GenerateChunk(pack_tokens([5])), finish(FinishReason.CANCELLED)], "backend.cancelled"),
        ([GenerateChunk(pack_tokens([5])), finish(FinishReason.ERROR)], "backend.protocol"),
        ([GenerateChunk(pack_tokens(range(5, 20)))], "backend.protocol"),
    ],
)
async def test_broken_streams_are_errors_never_empty_answers(stack, chunks, code):
    await stack.start(workers=1)
    stack.script.raw = lambda request: chunks
    reply = await stack.chat(max_tokens=10)
    assert reply.status == 502
    assert reply.json["error"]["code"] == code


async def test_model_that_ends_at_once_is_an_empty_answer(stack):
    await stack.start(workers=1)
    stack.script.raw = lambda request: [finish(stop_token_id=2)]
    reply = await stack.chat()
    assert reply.status == 200
    assert reply.json["choices"][0]["message"]["content"] == ""
    assert reply.json["choices"][0]["finish_reason"] == "stop"


async def test_duplicates_are_dropped(stack):
    stack.say("one two three")
    ids = stack.script.output
    await stack.start(workers=1)
    stack.script.raw = lambda request: [
        GenerateChunk(pack_tokens(ids[:2])),
        GenerateChunk(pack_tokens(ids[:2])),
        GenerateChunk(pack_tokens(ids[1:]), first_index=1, finish_reason=FinishReason.EOS, stop_token_id=2),
    ]
    reply = await stack.chat()
    assert reply.json["choices"][0]["message"]["content"] == "one two three"
    assert reply.json["usage"]["completion_tokens"] == len(ids)


async def test_client_that_leaves_during_a_continuation_frees_everything(stack, request_bytes):
    stack.say("one two three four")
    await stack.start(workers=2)
    arrived = asyncio.Event()

    async def hold(request):
        if request.attempt:
            arrived.set()
            await asyncio.Event().wait()

    stack.script.before = hold
    stack.script.crash_after = 2
    transport = stack.connect()
    body = b'{"model":"tiny","messages":[{"role":"user","content":"x"}]}'
    transport.protocol.data_received(request_bytes("POST", "/v1/chat/completions", body))
    async with asyncio.timeout(10):
        await arrived.wait()
    transport.abort()
    async with asyncio.timeout(10):
        while 'active_requests{model="tiny"} 0.0' not in (await stack.get("/metrics")).body.decode():
            await asyncio.sleep(0)


async def test_a_continuation_has_what_is_left_of_the_time(stack):
    stack.say("one two three four")
    await stack.start(workers=2, request_timeout_s=300.0)
    stack.script.crash_after = 2
    assert (await stack.chat()).status == 200
    first, second = stack.script.requests
    assert 0 < second.deadline_s < first.deadline_s <= 300.0


async def test_time_that_runs_out_is_an_error_and_stops_the_worker(stack):
    await stack.start(workers=2)

    async def hold(request):
        await asyncio.Event().wait()

    stack.script.before = hold
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
    reply = await stack.post("/v1/chat/completions", body, {"x-dynamo-timeout-s": "0.05"})
    assert (reply.status, reply.json["error"]["code"]) == (504, "request.deadline_exceeded")
    assert len(stack.script.requests) == 1, "another worker has no more time than this one"


async def test_no_worker_is_asked_once_the_time_is_over(stack):
    await stack.start(workers=2, request_timeout_s=0.02)
    router = stack.frontend._catalog.find("tiny").router
    select = router.select

    async def slowly(request):
        assert 0 < request.hints.deadline_s <= 0.02
        decision = await select(request)
        await asyncio.sleep(0.03)
        return decision

    router.select = slowly
    reply = await stack.chat()
    assert (reply.status, reply.json["error"]["code"]) == (504, "request.deadline_exceeded")
    assert not stack.script.requests
    assert not router._bookings
