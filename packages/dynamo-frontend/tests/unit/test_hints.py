"""What requests and their headers say to the router."""

import pytest


async def ask(stack, headers=None, **fields):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0, **fields}
    return await stack.post("/v1/chat/completions", body, headers)


async def hints(stack, headers=None, **fields):
    reply = await ask(stack, headers, **fields)
    assert reply.status == 200, reply.body
    return stack.script.requests[-1].routing


@pytest.fixture
async def talking(stack):
    stack.say("fine")
    await stack.start()
    return stack


async def test_the_extension_reaches_the_router_and_the_engine(talking):
    given = {
        "backend_instance_id": 1,
        "dp_rank": 0,
        "prefill_worker_id": 7,
        "prefill_dp_rank": 3,
        "cache_salt": "s",
        "max_thinking_tokens": 9,
        "agent_hints": {"priority": 5, "osl": 100},
    }
    found = await hints(talking, nvext=given, priority=1, cache_salt="other")
    assert (found.instance_id, found.dp_rank) == (1, 0)
    assert (found.prefill_instance_id, found.prefill_dp_rank) == (7, 3)
    assert (found.cache_salt, found.priority, found.expected_output_tokens) == ("s", 5, 100)
    assert talking.script.requests[-1].stop.max_thinking_tokens == 9
    assert (await hints(talking, nvext={"decode_worker_id": 1})).instance_id == 1


async def test_headers_win_over_the_body(talking):
    headers = {
        "x-dynamo-worker-instance-id": "1",
        "x-dynamo-prefill-instance-id": "8",
        "x-dynamo-prefill-dp-rank": "2",
        "x-dynamo-request-priority": "-3",
        "x-tenant-id": "t",
        "x-dynamo-meta-policy-class": "batch",
    }
    nvext = {"backend_instance_id": 99, "prefill_worker_id": 7, "cache_salt": "s", "agent_hints": {"priority": 5}}
    found = await hints(talking, headers, nvext=nvext)
    assert (found.instance_id, found.prefill_instance_id, found.prefill_dp_rank) == (1, 8, 2)
    assert (found.priority, found.cache_salt, found.tenant, found.policy_class) == (-3, "t", "t", "batch")


@pytest.mark.parametrize(
    ("headers", "session"),
    [
        ({"x-dynamo-session-id": "a", "x-session-id": "b"}, "a"),
        ({"x-session-id": "b", "thread-id": "d"}, "b"),
        ({"x-claude-code-session-id": "c"}, "c"),
        ({"thread-id": "d"}, "d"),
        ({}, "key"),
    ],
)
async def test_whose_conversation_it_is(talking, headers, session):
    assert (await hints(talking, headers, prompt_cache_key="key")).session_id == session


@pytest.mark.parametrize(
    ("nvext", "param"),
    [
        ({"use_raw_prompt": True}, "nvext.use_raw_prompt"),
        ({"token_data": [1]}, "nvext.token_data"),
        ({"extra_fields": ["timing"]}, "nvext.extra_fields"),
        ({"nonsense": 1}, "nvext.nonsense"),
        ({"agent_hints": {"osl": 0}}, "nvext.agent_hints.osl"),
        ({"agent_hints": {"speculative_prefill": True}}, "nvext.agent_hints.speculative_prefill"),
        ({"dp_rank": -1}, "nvext.dp_rank"),
        ({"max_thinking_tokens": "many"}, "nvext.max_thinking_tokens"),
    ],
)
async def test_what_is_not_offered_is_named(talking, nvext, param):
    reply = await ask(talking, nvext=nvext)
    assert (reply.status, reply.json["error"]["param"]) == (400, param)


async def test_headers_that_are_no_numbers_are_named(talking):
    for name in ("x-dynamo-dp-rank", "x-dynamo-request-priority", "x-dynamo-prefill-dp-rank"):
        reply = await ask(talking, {name: "x"})
        assert (reply.status, reply.json["error"]["param"]) == (400, name)
