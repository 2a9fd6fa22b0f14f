"""Whatever a body holds, the answer is typed, in the API's own form, and the server lives."""

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
TENSOR = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["Hello"]}
BODIES = {
    "/v1/chat/completions": {"messages": MESSAGES, "tools": TOOLS, "stop": ["x"], "logit_bias": {"5": 1}, "n": 1},
    "/v1/completions": {"prompt": ["Hello", "there"], "max_tokens": 5, "echo": True, "stream": True},
    "/v1/responses": {"input": [{"role": "user", "content": "Hello"}], "text": {"format": {"type": "text"}}},
    "/v1/responses/input_tokens": {"input": "Hello", "reasoning": {"effort": "low"}},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 5, "system": [{"type": "text", "text": "s"}], "stream": True},
    "/v1/messages/count_tokens": {"messages": MESSAGES, "thinking": {"type": "enabled"}},
    "/v1/embeddings": {"input": ["Hello", "there"]},
    "/v1/rerank": {"query": "Hello", "documents": ["a", {"text": "b"}], "top_n": 1},
    "/tokenize": {"messages": MESSAGES, "tools": TOOLS},
    "/detokenize": {"tokens": [5, 6]},
    "/inference/v1/generate": {"token_ids": [5, 6], "sampling_params": {"temperature": 0, "max_tokens": 3}},
    "/v2/models/tiny/infer": {"inputs": [TENSOR], "parameters": {"max_tokens": 3}, "outputs": []},
    "/v2/models/tiny/generate_stream": {"text_input": "Hello", "parameters": {"max_tokens": 3}},
}
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 70), 1 << 70),
    st.floats(),
    st.text(st.characters(codec=None), max_size=5),
    st.sampled_from(["\ud800", "\0", "\u2028", "\N{GRINNING FACE}", "é" * 3, "", " ", "$ref", "data:,"]),
    st.lists(st.integers(-1, 9), max_size=3),
    st.dictionaries(st.sampled_from(["type", "text", "name", "\ud800"]), st.text(max_size=3), max_size=2),
)
NOT_JSON = st.one_of(
    st.binary(max_size=60),
    st.sampled_from(
        [
            b"",
            b"{",
            b"[" * 100_000,
            b'{"a":' * 50_000,
            b'"\xff"',
            b'{"model":"\xed\xa0\x80"}',
            b"NaN",
            b"\xef\xbb\xbf{}",
        ]
    ),
)


def places(value, path=()):
    """Paths of everything inside a value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def put(body, path, value):
    for key in path[:-1]:
        body = body[key]
    body[path[-1]] = value


def assert_typed(path, reply):
    if reply.status == 200:
        return
    assert 400 <= reply.status < 500, reply.body
    error = reply.json["error"]
    if path.startswith("/v2"):
        assert isinstance(error, str)
    elif path.startswith("/v1/messages"):
        assert reply.json["type"] == "error"
        assert set(error) == {"type", "message"}
    else:
        assert set(error) == {"message", "type", "param", "code"}
    assert json.dumps(reply.json, ensure_ascii=False).encode()


@pytest.mark.parametrize("path", BODIES)
async def test_bodies_with_one_odd_value(stack, path):
    stack.say("fine")
    await stack.start()
    examples = []

    # Examples are drawn first: the loop of this test runs what they are sent to.
    @settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def draw(data):
        body = copy.deepcopy({"model": "tiny", **BODIES[path]})
        where = data.draw(st.sampled_from(list(places(body))))
        value = data.draw(ODD)
        if where:
            put(body, where, value)
        else:
            body = value
        # Lone surrogates go out escaped, and once in a while as the bytes that no UTF-8 has.
        text = json.dumps(body, ensure_ascii=data.draw(st.booleans()))
        examples.append(text.encode("utf-8", "surrogatepass"))

    draw()
    for body in examples:
        assert_typed(path, await stack.post(path, body))
    assert (await stack.chat()).status == 200


@pytest.mark.parametrize("path", BODIES)
async def test_bodies_that_are_no_json(stack, path):
    await stack.start()
    examples = []

    @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(body=NOT_JSON)
    def draw(body):
        examples.append(body)

    draw()
    for body in examples:
        reply = await stack.post(path, body)
        assert reply.status == 400, body[:60]
        assert_typed(path, reply)


@pytest.mark.parametrize(
    "headers",
    [
        {"x-request-id": "a b\x00"},
        {"x-request-id": "x" * 500},
        {"x-tenant-id": "\xff\xfe"},
        {"last-event-id": "\xff"},
        {"last-event-id": "1" * 2000},
        {"content-type": "text/plain; charset=utf-7"},
        {"content-type": "multipart/form-data"},
        {"accept": "image/png"},
        {"traceparent": "00-zz"},
        {"x-dynamo-request-priority": "high"},
        {"x-dynamo-worker-instance-id": "zz"},
        {"x-dynamo-dp-rank": "1e9"},
        {"expect": "nonsense"},
        {"authorization": "Bearer " + "x" * 3000},
    ],
)
async def test_odd_headers(stack, headers):
    stack.say("fine")
    await stack.start()
    for path in ("/v1/chat/completions", "/v1/messages"):
        raw = json.dumps({"model": "tiny", **BODIES[path]}).encode()
        lines = {"host": "test", "content-length": str(len(raw)), **headers}
        head = f"POST {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items()) + "\r\n"
        reply = await stack.send(head.encode("latin-1") + raw)
        if reply.status != 400 or "valid HTTP" not in reply.body.decode():
            assert_typed(path, reply)
    assert (await stack.chat()).status == 200


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(cuts=st.lists(st.integers(1, 60), max_size=8), chunks=st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_a_body_may_come_in_any_chunks(cuts, chunks):
    """The chunks of the encoding and the pieces of the socket are both of no account."""
    from dynamo_frontend._http.limits import HttpLimits
    from dynamo_frontend._http.protocol import HttpProtocol

    body = json.dumps({"model": "tiny", "text": "é\N{GRINNING FACE}" * 10}, ensure_ascii=False).encode()
    framed, place = b"", 0
    for size in [*chunks, len(body)]:
        piece = body[place : place + size]
        if piece:
            framed += b"%x;ext=1\r\n%b\r\n" % (len(piece), piece)
            place += len(piece)
    raw = b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n" + framed + b"0\r\ntrailer: x\r\n\r\n"
    seen = []

    class App:
        def handle(self, request, response):
            seen.append(request.body)

        def refuse(self, status, message, response):
            raise AssertionError(message)

    class Server:
        limits = HttpLimits()
        closing = False

        def now(self):
            return 0.0

    protocol = HttpProtocol(App(), Server(), None)
    for size in [*cuts, len(raw)]:
        if raw:
            protocol.data_received(raw[:size])
            raw = raw[size:]
    assert seen == [body]
