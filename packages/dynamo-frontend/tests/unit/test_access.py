"""API keys and rate limits, alone and in front of the APIs."""

import stat
import struct

import anthropic
import msgspec
import openai
import pytest

from dynamo_core.content import tensor_part
from dynamo_core.enums import FinishReason, ModelType
from dynamo_core.errors import ConfigurationError, InternalError, RateLimitedError
from dynamo_core.requests import GenerateChunk, RoutingHints
from dynamo_core.telemetry import Metrics
from dynamo_core.testing import FakeClock
from dynamo_frontend._access.access import RELOAD_EVERY_S, Access, Caller
from dynamo_frontend._access.buckets import RateBucket
from dynamo_frontend._access.keys import KeyRing, KeyTable, edited_keys, new_key, read_keys
from dynamo_frontend._cli import main
from dynamo_frontend._metrics import AccessMetrics


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.json"


def add(path, **fields):
    text, record = new_key(**fields)
    with edited_keys(path) as keys:
        keys.append(record)
    return text


def bearer(text):
    return {"authorization": f"Bearer {text}"}


def body(**fields):
    return {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0, **fields}


def test_secrets_are_not_in_the_file(path):
    text = add(path, name="ann")
    secret = text.split("_", 2)[2]
    assert secret not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    ring = KeyRing(read_keys(path))
    assert ring.find(text).name == "ann"
    for wrong in ("", "dyn", text[:-1], text + "x", text.upper(), f"dyn_{'0' * 12}_{secret}", secret):
        assert ring.find(wrong) is None


def test_tenants_share_a_cache_salt_that_nobody_can_guess(path):
    for tenant in ("a", "a", "b", "", ""):
        add(path, tenant=tenant)
    ring = KeyRing(read_keys(path))
    salts = [ring.cache_salt(key) for key in ring.table.keys]
    assert salts[0] == salts[1]
    assert len(set(salts)) == 4
    assert KeyTable("other file").cache_salt(ring.table.keys[0]) != salts[0]


@pytest.mark.parametrize("content", ["", "[]", '{"salt": "x", "keys": [{"key_id": 1}]}', '{"salt": "x", "more": 1}'])
def test_damaged_files_are_named(path, content):
    path.write_text(content)
    with pytest.raises(ConfigurationError, match=r"keys\.json"):
        read_keys(path)


async def test_buckets_refill_evenly_and_remember_debts():
    clock = FakeClock()
    bucket = RateBucket(60, clock)
    assert bucket.take(50) == 0
    assert bucket.take(20) == pytest.approx(10)
    assert bucket.remaining == 10
    await clock.advance(10)
    assert bucket.take(20) == 0
    bucket.settle(20, 50)
    assert bucket.remaining == 0
    assert bucket.take(1) == pytest.approx(31)
    bucket.settle(50, 0)
    assert bucket.remaining == 20
    await clock.advance(3600)
    assert bucket.full_in_s == 0
    assert bucket.take(1000) == 0
    assert bucket.take(1) > 900


def test_each_process_grants_its_share(path):
    add(path, requests_per_minute=10)
    (key,) = read_keys(path).keys
    caller = Caller(key, "", FakeClock(), 0.5)
    for _ in range(5):
        caller.enter()
    with pytest.raises(RateLimitedError, match="10 requests a minute"):
        caller.enter()


async def test_keys_are_asked_for_and_tenants_kept_apart(stack, path):
    stack.say("fine")
    key, other = add(path, tenant="acme"), add(path)
    await stack.start(workers=0, api_keys_file=str(path))
    await stack.add_worker(1)
    await stack.ready()
    for headers in (None, bearer("nonsense"), {"authorization": f"Basic {key}"}):
        reply = await stack.post("/v1/chat/completions", body(), headers)
        assert (reply.status, reply.json["error"]["code"]) == (401, "invalid_api_key")
        assert reply.headers["www-authenticate"] == "Bearer"
    assert (await stack.get("/v1/models")).status == 401
    assert (await stack.get("/live")).status == 200
    headers = {**bearer(key), "x-tenant-id": "somebody else's"}
    assert (await stack.post("/v1/chat/completions", body(cache_salt="mine"), headers)).status == 200
    assert (await stack.post("/v1/chat/completions", body(), {"x-api-key": other})).status == 200
    first, second = [request.routing for request in stack.script.requests]
    assert first.cache_salt not in ("", "mine", second.cache_salt)
    assert first.tenant == first.cache_salt != RoutingHints().cache_salt
    metrics = (await stack.get("/metrics")).body.decode()
    assert 'access_denied_total{reason="invalid_api_key"} 4.0' in metrics


async def test_refusals_have_the_form_of_their_api(stack, path):
    add(path)
    await stack.start(workers=0, api_keys_file=str(path))
    reply = await stack.post("/v1/messages", {})
    assert reply.status == 401
    assert reply.json["error"]["type"] == "authentication_error"
    assert reply.json["type"] == "error"


async def test_requests_of_a_minute_are_limited(stack, path):
    stack.say("fine")
    key = add(path, requests_per_minute=2)
    await stack.start(workers=0, api_keys_file=str(path))
    await stack.add_worker(1)
    await stack.ready()
    replies = [await stack.post("/v1/chat/completions", body(), bearer(key)) for _ in range(3)]
    assert [reply.status for reply in replies] == [200, 200, 429]
    assert [reply.headers["x-ratelimit-remaining-requests"] for reply in replies] == ["1", "0", "0"]
    assert replies[2].headers["x-ratelimit-limit-requests"] == "2"
    assert 1 <= int(replies[2].headers["retry-after"]) <= 30
    assert replies[2].json["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_are_reserved_and_then_settled(stack, path, stream):
    stack.say("one two three")
    key = add(path, tokens_per_minute=10_000)
    await stack.start(workers=0, api_keys_file=str(path))
    await stack.add_worker(1)
    await stack.ready()
    access = stack.frontend._access
    fields = body(max_tokens=4000, stream=stream)
    reply = await stack.post("/v1/chat/completions", fields, bearer(key))
    assert reply.status == 200
    # The headers of a stream leave while the tokens are set aside, those of a whole reply at its end.
    (caller,) = access._callers.values()
    used = len(stack.script.requests[0].token_ids) // 4 + len(stack.script.output)
    assert int(caller.headers()["x-ratelimit-remaining-tokens"]) in range(10_000 - used, 10_000 - used + 50)
    again = [await stack.post("/v1/chat/completions", fields, bearer(key)) for _ in range(3)]
    assert {reply.status for reply in again} == {200}


async def test_tokens_that_are_not_left_are_refused(stack, path):
    stack.say("fine")
    key = add(path, tokens_per_minute=300)
    await stack.start(workers=0, api_keys_file=str(path))
    await stack.add_worker(1)
    await stack.ready()
    assert (await stack.post("/v1/chat/completions", body(max_tokens=200), bearer(key))).status == 200
    access = stack.frontend._access
    (caller,) = access._callers.values()
    caller.reserve(280)
    reply = await stack.post("/v1/chat/completions", body(max_tokens=200), bearer(key))
    assert (reply.status, reply.json["error"]["code"]) == (429, "rate_limit_exceeded")


def ids_of(stack):
    return [len(request.token_ids) // 4 for request in stack.script.requests]


GENERATIONS = {
    "/v1/completions": {"prompt": ["one", "two three"], "n": 2, "max_tokens": 50},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 50},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 50},
    "/inference/v1/generate": {"token_ids": [5, 6], "sampling_params": {"max_tokens": 50}},
    "/v2/models/tiny/generate": {"text_input": "Hi", "parameters": {"max_tokens": 50}},
}


@pytest.mark.parametrize("api", GENERATIONS)
async def test_every_generation_is_charged_for_its_prompts_and_what_it_made(stack, path, api):
    stack.say("one two three")
    key = add(path, tokens_per_minute=10_000)
    await stack.start(workers=0, api_keys_file=str(path))
    await stack.add_worker(1)
    await stack.ready()
    named = {} if api.startswith("/v2") else {"model": "tiny"}
    reply = await stack.post(api, {**named, **GENERATIONS[api]}, bearer(key))
    assert reply.status == 200, reply.body
    (caller,) = stack.frontend._access._callers.values()
    made = len(stack.script.output) * sum(request.sampling.n for request in stack.script.requests)
    assert caller._tokens._level == pytest.approx(10_000 - sum(ids_of(stack)) - made, abs=40)
    caller.reserve(10_000 - 40)
    assert (await stack.post(api, {**named, **GENERATIONS[api]}, bearer(key))).status == 429


VECTORS = {
    "/v1/embeddings": {"input": ["one", "two three"]},
    "/v1/rerank": {"query": "one", "documents": ["two three", "four"]},
}


@pytest.mark.parametrize("api", VECTORS)
async def test_vectors_are_charged_for_their_texts_unless_they_fail(stack, path, api):
    part = tensor_part(struct.pack("<2f", 1, 0.5), shape=(2,), dtype="f32")
    stack.script.raw = lambda request: [GenerateChunk(parts=(part,), finish_reason=FinishReason.STOP)]
    stack.card = msgspec.structs.replace(stack.card, model_types=(ModelType.EMBEDDING,))
    key = add(path, tokens_per_minute=1000)
    await stack.start(workers=0, api_keys_file=str(path), migration_limit=0)
    await stack.add_worker(1)
    await stack.ready()
    reply = await stack.post(api, {"model": "tiny", **VECTORS[api]}, bearer(key))
    used = sum(ids_of(stack))
    assert reply.status == 200
    assert used == reply.json["usage"]["total_tokens"] > 0
    assert int(reply.headers["x-ratelimit-remaining-tokens"]) in range(1000 - used, 1000 - used + 9)
    (caller,) = stack.frontend._access._callers.values()
    stack.script.fail_with = InternalError("broken")
    before = caller._tokens.remaining
    assert (await stack.post(api, {"model": "tiny", **VECTORS[api]}, bearer(key))).status == 500
    assert caller._tokens.remaining >= before
    caller.reserve(caller._tokens.remaining)
    refused = await stack.post(api, {"model": "tiny", **VECTORS[api]}, bearer(key))
    assert (refused.status, refused.json["error"]["code"]) == (429, "rate_limit_exceeded")
    assert stack.frontend._admission.active == 0


async def test_a_stream_is_its_keys_alone(stack, path):
    stack.say("fine words")
    mine, colleague = add(path, tenant="acme"), add(path, tenant="acme")
    await stack.start(workers=0, api_keys_file=str(path))
    await stack.add_worker(1)
    await stack.ready()
    for api, kind in (("/v1/chat/completions", "invalid_request_error"), ("/v1/messages", "not_found_error")):
        given = body(stream=True, max_tokens=50)
        whole = await stack.post(api, given, {**bearer(mine), "x-dynamo-stream-resume": "true"})
        event_id = whole.body.partition(b"\n")[0].removeprefix(b"id: ").decode()
        other = await stack.post(api, given, {**bearer(colleague), "last-event-id": event_id})
        assert (other.status, other.json["error"]["type"]) == (404, kind)
        again = await stack.post(api, given, {**bearer(mine), "last-event-id": event_id})
        assert again.status == 200
        assert whole.body.endswith(again.body)


async def test_file_is_read_again_when_it_changes(path):
    clock = FakeClock()
    key = add(path, requests_per_minute=5)
    access = Access(path, clock, AccessMetrics(Metrics()))
    access.load()
    request = Request(bearer(key))
    access.admit(request)
    path.write_text("damaged")
    await access.reload()
    access.admit(Request(bearer(key)))
    path.unlink()
    second = add(path)
    await access.reload()
    access.admit(Request(bearer(second)))
    with pytest.raises(Exception, match="no valid API key"):
        access.admit(Request(bearer(key)))
    assert RELOAD_EVERY_S <= 5


async def test_unchanged_keys_keep_what_they_used(path):
    key = add(path, requests_per_minute=1)
    access = Access(path, FakeClock(), AccessMetrics(Metrics()))
    access.load()
    access.admit(Request(bearer(key)))
    add(path)
    await access.reload()
    with pytest.raises(RateLimitedError):
        access.admit(Request(bearer(key)))


class Request:
    caller = None

    def __init__(self, headers):
        self.headers = dict(headers)


def test_command_makes_lists_and_revokes(path, capsys):
    file = ["--file", str(path)]
    assert main(["keys", "new", "--name", "ann", "--tenant", "acme", "--tokens-per-minute", "9", *file]) == 0
    text = capsys.readouterr().out.strip()
    ring = KeyRing(read_keys(path))
    assert ring.find(text).tokens_per_minute == 9
    key_id = ring.find(text).key_id
    assert main(["keys", "list", *file]) == 0
    listing = capsys.readouterr().out
    assert key_id in listing
    assert text not in listing
    assert main(["keys", "revoke", key_id, *file]) == 0
    assert KeyRing(read_keys(path)).find(text) is None
    assert main(["keys", "revoke", "nobody", *file]) == 2
    assert main(["keys", "new", "--requests-per-minute", "-1", *file]) == 2
    assert main(["keys", "list", "--file", str(path) + "x"]) == 2


async def test_stock_clients_send_their_key(stack, path):
    stack.say("fine")
    key = add(path)
    await stack.start(workers=0, api_keys_file=str(path))
    await stack.add_worker(1)
    await stack.ready()
    messages = body()["messages"]
    async with openai.AsyncOpenAI(base_url=f"{stack.frontend.url}/v1", api_key=key, max_retries=0) as client:
        reply = await client.chat.completions.create(model="tiny", messages=messages)
        assert reply.choices[0].message.content == "fine"
    async with anthropic.AsyncAnthropic(base_url=stack.frontend.url, api_key=key, max_retries=0) as client:
        reply = await client.messages.create(model="tiny", max_tokens=9, messages=messages)
        assert reply.content[0].text == "fine"
    async with openai.AsyncOpenAI(base_url=f"{stack.frontend.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            await client.chat.completions.create(model="tiny", messages=messages)


def test_file_form_is_kept():
    text = '{"salt":"s","keys":[{"key_id":"a","digest":"d","tokens_per_minute":5,"revoked":true}],"version":1}'
    assert msgspec.json.decode(text, type=KeyTable).keys[0].tokens_per_minute == 5
