"""The REST form of the KServe protocol, and what both forms share."""

import json
import struct

import msgspec
import pytest

from dynamo_core.enums import ModelType
from dynamo_core.errors import InvalidRequestError
from dynamo_frontend._kserve.schema import Schema
from dynamo_frontend._kserve.tensors import pack_bytes, unpack_tensor

TEXT = "The capital of Japan is Tokyo."


def text_input(text="Hello", **fields):
    return {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": [text], **fields}


@pytest.fixture
async def served(stack):
    stack.say(TEXT)
    await stack.start(workers=2)
    return stack


async def infer(stack, *inputs, target="tiny", **fields):
    body = {"inputs": list(inputs) or [text_input()], "parameters": {"temperature": 0, "max_tokens": 100}, **fields}
    return await stack.post(f"/v2/models/{target}/infer", body)


def outputs(reply):
    return {item["name"]: item["data"] for item in reply.json["outputs"]}


async def test_server_and_model_show_themselves(served):
    assert (await served.get("/v2")).json["name"] == "dynamo"
    assert (await served.get("/v2/health/live")).json == {"live": True}
    assert (await served.get("/v2/health/ready")).json == {"ready": True}
    assert (await served.get("/v2/models/tiny/ready")).json == {"name": "tiny", "ready": True}
    shown = (await served.get("/v2/models/tiny/versions/1")).json
    assert shown["platform"] == "dynamo"
    assert shown["inputs"][0] == {"name": "text_input", "datatype": "BYTES", "shape": [1]}
    config = (await served.get("/v2/models/tiny/config")).json
    assert config["model_transaction_policy"] == {"decoupled": True}


async def test_nothing_is_ready_without_a_model(stack):
    await stack.start(workers=0)
    assert (await stack.get("/v2/health/ready")).status == 503
    missing = await stack.get("/v2/models/tiny")
    assert missing.status == 404
    assert "tiny" in missing.json["error"]


async def test_text_in_text_out(served):
    reply = await infer(served, id="mine")
    assert reply.json["id"] == "mine"
    assert reply.json["model_version"] == "1"
    assert outputs(reply) == {"text_output": [TEXT], "finish_reason": ["stop"]}
    several = await infer(served, target="tiny-alias/versions/1", parameters={"n": 2, "max_tokens": 3})
    assert outputs(several)["finish_reason"] == ["length", "length"]
    one = await infer(served, outputs=[{"name": "finish_reason"}])
    assert list(outputs(one)) == ["finish_reason"]


async def test_ids_in_text_out(served):
    ids = {"name": "input_ids", "datatype": "INT64", "shape": [1, 3], "data": [[5, 6, 7]]}
    assert outputs(await infer(served, ids))["text_output"] == [TEXT]
    assert served.script.requests[0].token_ids == struct.pack("<3I", 5, 6, 7)


async def test_binary_inputs_stand_behind_the_json(served):
    packed = pack_bytes([b"Hello"])
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(packed)}}
    head = json.dumps({"inputs": [tensor], "parameters": {"max_tokens": 50}}).encode()
    headers = {"inference-header-content-length": str(len(head))}
    reply = await served.post("/v2/models/tiny/infer", head + packed, headers)
    assert outputs(reply)["text_output"] == [TEXT]
    assert (await served.post("/v2/models/tiny/infer", head + packed + b"x", headers)).status == 400
    assert (
        await served.post("/v2/models/tiny/infer", head, {**headers, "inference-header-content-length": "x"})
    ).status == 400


async def test_generate_whole_and_streamed(served):
    body = {"text_input": "Hello", "parameters": {"max_tokens": 50}, "id": "a"}
    whole = await served.post("/v2/models/tiny/generate", body)
    assert whole.json == {
        "id": "a",
        "model_name": "tiny",
        "model_version": "1",
        "text_output": TEXT,
        "finish_reason": "stop",
    }
    streamed = await served.post("/v2/models/tiny/generate_stream", body)
    assert "".join(event["text_output"] for event in streamed.events) == TEXT
    assert len(streamed.events) > 5
    assert streamed.events[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize("crash_after", [0, 1, 4])
async def test_a_lost_worker_does_not_show(served, crash_after):
    served.script.crash_after = crash_after
    body = {"text_input": "Hello", "parameters": {"max_tokens": 50}}
    streamed = await served.post("/v2/models/tiny/generate_stream", body)
    assert "".join(event["text_output"] for event in streamed.events) == TEXT


async def test_a_client_that_leaves_ends_the_generation(stack, request_bytes):
    stack.say(TEXT * 30)
    await stack.start()
    transport = stack.connect()
    body = json.dumps({"text_input": "Hello", "parameters": {"max_tokens": 4000}}).encode()
    transport.protocol.data_received(request_bytes("POST", "/v2/models/tiny/generate_stream", body))
    await transport.wait(lambda: b"data:" in transport._body)
    transport.abort()
    while not stack.script.stopped:
        await transport.wait(lambda: True)
        await stack.get("/live")
    shown = (await stack.get("/metrics")).body.decode()
    assert 'dynamo_frontend_active_requests{model="tiny"} 0.0' in shown


@pytest.mark.parametrize(
    ("inputs", "fields", "message"),
    [
        ([], {"inputs": []}, "text_input"),
        ([{"name": "x", "datatype": "BYTES", "shape": [1], "data": ["a"]}], {}, "no input 'x'"),
        ([text_input(datatype="INT32")], {}, "type 'INT32'"),
        ([text_input(shape=[2])], {}, "shape [2]"),
        ([text_input(shape=[2], data=["a", "b"])], {}, "shape [2]"),
        ([text_input(shape=[-1])], {}, "shape [-1]"),
        ([text_input(data=[5])], {}, "UTF-8"),
        ([text_input(data=None)], {}, "no data"),
        ([text_input(), text_input()], {}, "twice"),
        ([text_input()], {"parameters": {"temperature": 9}}, "temperature"),
        ([text_input()], {"parameters": {"nonsense": 1}}, "nonsense"),
        ([text_input()], {"parameters": {"model": "x"}}, "model"),
        ([text_input()], {"outputs": [{"name": "logits"}]}, "logits"),
        ([text_input()], {"nonsense": 1}, "nonsense"),
        ([text_input(), {"name": "streaming", "datatype": "BOOL", "shape": [1], "data": [True]}], {}, "streaming"),
        ([{"name": "input_ids", "datatype": "INT64", "shape": [1], "data": [1 << 40]}], {}, "token id"),
        ([{"name": "input_ids", "datatype": "INT64", "shape": [1], "data": ["x"]}], {}, "input_ids"),
    ],
)
async def test_bad_requests_say_what_is_wrong(served, inputs, fields, message):
    reply = await infer(served, *inputs, **fields)
    assert reply.status == 400, reply.body
    assert message in reply.json["error"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v2/models/other/infer", 404),
        ("POST", "/v2/models/tiny/versions/2/infer", 404),
        ("POST", "/v2/models/tiny", 404),
        ("POST", "/v2/models/tiny/ready", 404),
        ("GET", "/v2/models/tiny/infer", 400),
        ("GET", "/v2/models/other/ready", 404),
        ("DELETE", "/v2/models/tiny", 405),
    ],
)
async def test_wrong_targets(served, request_bytes, method, path, status):
    body = json.dumps({"inputs": [text_input()]}).encode() if method == "POST" else b""
    reply = await served.send(request_bytes(method, path, body))
    assert reply.status == status
    assert reply.json["error"]


def test_tensors_are_read_from_their_bytes():
    assert list(unpack_tensor("x", "INT32", struct.pack("<2i", 1, -2))) == [1, -2]
    assert unpack_tensor("x", "BYTES", pack_bytes([b"", b"ab"])) == [b"", b"ab"]
    for datatype, data in (("INT64", b"123"), ("BYTES", b"\5\0\0\0ab"), ("BYTES", b"\5\0"), ("FP8", b"")):
        with pytest.raises(InvalidRequestError):
            unpack_tensor("x", datatype, data)


def test_the_schema_is_that_of_the_published_clients():
    from tritonclient.grpc import service_pb2

    schema = Schema()
    published = service_pb2.DESCRIPTOR.message_types_by_name
    for method in schema.methods:
        for name in (method.request, method.response):
            assert_same(getattr(schema, name).DESCRIPTOR, published[name])


def assert_same(ours, theirs):
    assert ours.name == theirs.name
    for field in ours.fields:
        other = theirs.fields_by_number.get(field.number)
        if ours.name in ("ModelConfig", "ModelTensor"):
            continue
        assert other is not None, f"{ours.name}.{field.name}"
        assert (field.name, field.type, field.is_repeated) == (other.name, other.type, other.is_repeated)
        if field.message_type is not None and field.message_type.name != "ModelConfig":
            assert_same(field.message_type, other.message_type)


@pytest.mark.parametrize("path", ["", "/ready", "/config"])
async def test_models_without_completions_are_not_described_as_such(stack, path):
    stack.card = msgspec.structs.replace(stack.card, model_types=(ModelType.EMBEDDING,))
    await stack.start()
    reply = await stack.get(f"/v2/models/tiny{path}")
    assert reply.status == 400
    assert "embedding" in reply.json["error"]
