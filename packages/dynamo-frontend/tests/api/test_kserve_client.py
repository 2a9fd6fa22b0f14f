"""The stock Triton client over gRPC."""

import asyncio
import queue

import grpc
import numpy as np
import pytest
import tritonclient.grpc as blocking
import tritonclient.grpc.aio as triton
import trustme
from tritonclient.utils import InferenceServerException

from dynamo_core.errors import ConfigurationError
from dynamo_frontend._access.keys import edited_keys, new_key
from dynamo_frontend._kserve.grpc_server import KserveGrpcServer
from dynamo_frontend._kserve.schema import Schema

TEXT = "The capital of Japan is Tokyo."


@pytest.fixture
async def client(stack):
    stack.say(TEXT)
    await stack.start(workers=2, kserve_grpc_port=0)
    found = triton.InferenceServerClient(f"127.0.0.1:{stack.frontend.kserve.port}")
    yield found
    await found.close()


def tensor(name, datatype, values, dtype):
    found = triton.InferInput(name, [len(values)], datatype)
    found.set_data_from_numpy(np.array(values, dtype=dtype))
    return found


def text(value=b"Hello"):
    return tensor("text_input", "BYTES", [value], np.object_)


def streaming(value=True):
    return tensor("streaming", "BOOL", [value], np.bool_)


async def collect(client, *requests):
    """Texts and errors by request id."""

    async def send():
        for request in requests:
            yield request

    texts, errors = {}, {}
    async for result, error in client.stream_infer(send()):
        if error is not None:
            errors[len(errors)] = error.message()
            continue
        key = result.get_response().id
        texts[key] = texts.get(key, "") + result.as_numpy("text_output")[0].decode()
    return texts, errors


async def test_health_and_metadata(client):
    assert await client.is_server_live()
    assert await client.is_server_ready()
    assert await client.is_model_ready("tiny")
    assert not await client.is_model_ready("other")
    assert (await client.get_server_metadata()).name == "dynamo"
    shown = await client.get_model_metadata("tiny")
    assert [item.name for item in shown.outputs] == ["text_output", "finish_reason"]
    config = (await client.get_model_config("tiny")).config
    assert config.model_transaction_policy.decoupled
    assert config.input[0].data_type == 13, "TYPE_STRING"


async def test_infer(client):
    result = await client.infer("tiny", [text()], request_id="mine", parameters={"max_tokens": 50, "temperature": 0})
    assert result.as_numpy("text_output").tolist() == [TEXT.encode()]
    assert result.as_numpy("finish_reason").tolist() == [b"stop"]
    assert result.get_response().id == "mine"
    ids = tensor("input_ids", "INT64", [5, 6, 7], np.int64)
    several = await client.infer("tiny", [ids], parameters={"max_tokens": 2, "n": 2})
    assert several.as_numpy("finish_reason").tolist() == [b"length", b"length"]


async def test_infer_with_typed_contents(client, stack):
    schema = Schema()
    request = schema.ModelInferRequest(model_name="tiny")
    request.parameters["max_tokens"].int64_param = 50
    given = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    given.contents.bytes_contents.append(b"Hello")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{stack.frontend.kserve.port}") as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=schema.ModelInferRequest.SerializeToString,
            response_deserializer=schema.ModelInferResponse.FromString,
        )
        answer = await call(request)
    assert list(answer.outputs[0].contents.bytes_contents) == [TEXT.encode()]


async def test_stream_with_several_requests(client):
    common = {"model_name": "tiny", "parameters": {"max_tokens": 50}}
    requests = [{**common, "inputs": [text(), streaming()], "request_id": str(index)} for index in range(4)]
    assert await collect(client, *requests) == ({str(index): TEXT for index in range(4)}, {})


async def test_the_blocking_client_hears_which_response_is_the_last(client, stack):
    def run():
        responses = queue.SimpleQueue()
        address = f"127.0.0.1:{stack.frontend.kserve.port}"
        with blocking.InferenceServerClient(address) as found:
            found.start_stream(lambda result, error: responses.put((result, error)))
            found.async_stream_infer(
                "tiny",
                [tensor("text_input", "BYTES", [b"Hello"], np.object_), tensor("streaming", "BOOL", [True], np.bool_)],
                parameters={"max_tokens": 50},
                enable_empty_final_response=True,
            )
            pieces = []
            while True:
                result, error = responses.get(timeout=20)
                assert error is None
                pieces.append(result.as_numpy("text_output")[0].decode())
                if result.get_response().parameters["triton_final_response"].bool_param:
                    return "".join(pieces)

    assert await asyncio.to_thread(run) == TEXT


async def test_an_error_ends_its_request_and_not_the_stream(client):
    good = {"model_name": "tiny", "inputs": [text(), streaming()], "parameters": {"max_tokens": 50}}
    bad = {**good, "model_name": "other"}
    texts, errors = await collect(client, bad, {**good, "request_id": "b"})
    assert texts == {"b": TEXT}
    assert "other" in errors[0]


async def test_lost_worker_in_a_stream(client, stack):
    stack.script.crash_after = 3
    request = {
        "model_name": "tiny",
        "inputs": [text(), streaming()],
        "request_id": "a",
        "parameters": {"max_tokens": 50},
    }
    assert (await collect(client, request))[0] == {"a": TEXT}


@pytest.mark.parametrize(
    ("inputs", "model", "fields", "status"),
    [
        ([text(b"\xff")], "tiny", {}, "INVALID_ARGUMENT"),
        ([text()], "other", {}, "NOT_FOUND"),
        ([text()], "tiny", {"model_version": "7"}, "NOT_FOUND"),
        ([text()], "tiny", {"parameters": {"temperature": 9.0}}, "INVALID_ARGUMENT"),
        ([text(), streaming()], "tiny", {}, "INVALID_ARGUMENT"),
        ([tensor("x", "INT32", [1], np.int32)], "tiny", {}, "INVALID_ARGUMENT"),
        ([tensor("input_ids", "FP32", [1.0], np.float32)], "tiny", {}, "INVALID_ARGUMENT"),
    ],
)
async def test_errors_have_their_status(client, inputs, model, fields, status):
    with pytest.raises(InferenceServerException) as caught:
        await client.infer(model, inputs, **fields)
    assert status in caught.value.status()


async def test_a_client_that_leaves_ends_the_generation(client, stack):
    asked, left = asyncio.Event(), asyncio.Event()

    async def think(request):
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()

    stack.script.before = think

    async def send():
        yield {"model_name": "tiny", "inputs": [text(), streaming()], "parameters": {"max_tokens": 4000}}

    stream = client.stream_infer(send())
    answer = asyncio.ensure_future(anext(aiter(stream)))
    async with asyncio.timeout(20):
        await asked.wait()
        stream.cancel()
        await left.wait()
    with pytest.raises((InferenceServerException, asyncio.CancelledError)):
        await answer


async def test_a_port_in_use_is_named(client, stack):
    other = KserveGrpcServer(stack.frontend._runner)
    with pytest.raises(ConfigurationError, match="--kserve-grpc-port"):
        await other.start("127.0.0.1", stack.frontend.kserve.port, body_bytes=1 << 20)


async def test_keys_are_asked_for_here_too(stack, tmp_path):
    path = tmp_path / "keys.json"
    secret, record = new_key(name="a", tenant="t", requests_per_minute=3)
    with edited_keys(path) as keys:
        keys.append(record)
    stack.say(TEXT)
    await stack.start(workers=0, kserve_grpc_port=0, api_keys_file=str(path))
    await stack.add_worker(1)
    await stack.ready()
    async with triton.InferenceServerClient(f"127.0.0.1:{stack.frontend.kserve.port}") as found:
        assert await found.is_server_live()
        assert await found.is_model_ready("tiny")
        with pytest.raises(InferenceServerException) as caught:
            await found.infer("tiny", [text()])
        assert "UNAUTHENTICATED" in caught.value.status()
        headers = {"authorization": f"Bearer {secret}"}
        result = await found.infer("tiny", [text()], headers=headers, parameters={"max_tokens": 50})
        assert result.as_numpy("text_output").tolist() == [TEXT.encode()]
        salt = stack.script.requests[-1].routing.cache_salt
        assert salt, "tenants are kept apart"
        with pytest.raises(InferenceServerException) as caught:
            for _ in range(4):
                await found.infer("tiny", [text()], headers=headers)
        assert "RESOURCE_EXHAUSTED" in caught.value.status()


async def test_certificates_of_the_http_server_serve_here_too(stack, tmp_path):
    authority, clients = trustme.CA(), trustme.CA()
    certificate, client = authority.issue_cert("127.0.0.1", "localhost"), clients.issue_cert("me@example.org")
    cert, key, ca = (tmp_path / name for name in ("cert.pem", "key.pem", "ca.pem"))
    certificate.private_key_pem.write_to_path(key)
    cert.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    clients.cert_pem.write_to_path(ca)
    stack.say(TEXT)
    files = {"tls_cert_path": str(cert), "tls_key_path": str(key), "tls_client_ca_cert_path": str(ca)}
    await stack.start(workers=0, kserve_grpc_port=0, **files)
    address = f"localhost:{stack.frontend.kserve.port}"
    method = "/inference.GRPCInferenceService/ServerLive"
    mine = client.private_key_pem.bytes(), client.cert_chain_pems[0].bytes()

    async def live(credentials):
        channel = grpc.aio.secure_channel(address, credentials) if credentials else grpc.aio.insecure_channel(address)
        async with channel:
            return await channel.unary_unary(method)(b"", timeout=20)

    trusted = authority.cert_pem.bytes()
    assert await live(grpc.ssl_channel_credentials(trusted, *mine)) == b"\x08\x01"
    for wrong in (
        None,
        grpc.ssl_channel_credentials(trusted),
        grpc.ssl_channel_credentials(clients.cert_pem.bytes(), *mine),
    ):
        with pytest.raises(grpc.aio.AioRpcError):
            await live(wrong)
