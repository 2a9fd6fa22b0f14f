"""What requests and their headers say to the router."""

import pytest

from dynamo_core.kv import BlockHints


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
        ({"agent_hints": {"next_turn_s": -1}}, "nvext.agent_hints.next_turn_s"),
        ({"agent_hints": {"retain_s": 1e9}}, "nvext.agent_hints.retain_s"),
        ({"agent_hints": {"session_final": True, "next_turn_s": 1}}, "nvext.agent_hints.session_final"),
        ({"dp_rank": -1}, "nvext.dp_rank"),
        ({"max_thinking_tokens": "many"}, "nvext.max_thinking_tokens"),
    ],
)
async def test_what_is_not_offered_is_named(talking, nvext, param):
    reply = await ask(talking, nvext=nvext)
    assert (reply.status, reply.json["error"]["param"]) == (400, param)


NUMBERS = (
    *("x-dynamo-dp-rank", "x-dynamo-request-priority", "x-dynamo-prefill-dp-rank"),
    *("x-dynamo-next-turn-s", "x-dynamo-retain-s", "x-dynamo-session-final", "x-dynamo-timeout-s"),
)


async def test_headers_that_are_no_numbers_are_named(talking):
    for name in NUMBERS:
        reply = await ask(talking, {name: "x"})
        assert (reply.status, reply.json["error"]["param"]) == (400, name)


@pytest.mark.parametrize(
    ("headers", "fields", "expected"),
    [
        ({}, {}, None),
        ({"x-dynamo-session-id": "a"}, {"prompt_cache_key": "b"}, None),
        ({"x-dynamo-session-final": "true"}, {}, BlockHints(session_ended=True)),
        ({"x-dynamo-session-final": "false"}, {"nvext": {"agent_hints": {"session_final": True}}}, None),
        ({}, {"nvext": {"agent_hints": {"session_final": True}}}, BlockHints(session_ended=True)),
        ({"x-dynamo-next-turn-s": "2.5"}, {}, BlockHints(next_turn_s=2.5)),
        ({"x-dynamo-next-turn-s": "0"}, {"nvext": {"agent_hints": {"next_turn_s": 9}}}, BlockHints(next_turn_s=0.0)),
        ({}, {"nvext": {"agent_hints": {"next_turn_s": 9, "retain_s": 60}}}, BlockHints(False, 9.0, 0, 60.0)),
        ({"x-dynamo-retain-s": "5"}, {"priority": 3}, BlockHints(priority=3, retain_s=5.0)),
        ({"x-tenant-id": "acme"}, {}, BlockHints(tenant="acme")),
    ],
)
async def test_what_is_known_of_the_future_of_its_blocks_reaches_the_worker(talking, headers, fields, expected):
    await hints(talking, headers, **fields)
    assert talking.script.requests[-1].block_hints == expected


@pytest.mark.parametrize(
    ("setting", "header", "expected"),
    [(None, None, None), (8.0, None, 8.0), (8.0, "3", 3.0), (8.0, "30", 8.0), (None, "30", 30.0)],
)
async def test_how_long_it_may_take_reaches_the_worker(stack, setting, header, expected):
    stack.say("fine")
    await stack.start(request_timeout_s=setting)
    await hints(stack, {} if header is None else {"x-dynamo-timeout-s": header})
    found = stack.script.requests[-1].deadline_s
    assert found == expected if expected is None else 0 < found <= expected


PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize(
    ("headers", "passed"),
    [
        ({"traceparent": PARENT}, {"traceparent": PARENT}),
        ({"traceparent": PARENT, "tracestate": "a=1"}, {"traceparent": PARENT, "tracestate": "a=1"}),
        ({"traceparent": PARENT, "tracestate": "a" * 600}, {"traceparent": PARENT}),
        ({"traceparent": "no trace", "tracestate": "a=1"}, {}),
        ({"tracestate": "a=1"}, {}),
    ],
)
async def test_the_callers_trace_reaches_the_worker(talking, headers, passed):
    await hints(talking, headers)
    assert talking.script.headers[-1] == passed
