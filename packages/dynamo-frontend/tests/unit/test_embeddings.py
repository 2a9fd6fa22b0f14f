"""The embeddings API over the whole path."""

import base64
import struct

import msgspec
import pytest

from dynamo_core.content import tensor_part, text_part
from dynamo_core.enums import FinishReason, Modality, ModelType
from dynamo_core.errors import UnavailableError
from dynamo_core.requests import GenerateChunk, Usage
from dynamo_core.tokens import token_count


def vector(request):
    """A vector that tells which prompt it stands for."""
    count = token_count(request.token_ids)
    data = struct.pack("<2f", count, 0.5)
    part = tensor_part(data, shape=(2,), dtype="f32")
    return [GenerateChunk(parts=(part,), finish_reason=FinishReason.STOP, usage=Usage(count))]


@pytest.fixture
async def embedder(stack):
    stack.card = msgspec.structs.replace(stack.card, model_types=(ModelType.EMBEDDING,), context_length=64)
    stack.script.raw = vector
    await stack.start(workers=2)
    return stack


async def send(stack, given, **fields):
    return await stack.post("/v1/embeddings", {"model": "tiny", "input": given, **fields})


async def test_each_input_gets_its_vector(embedder):
    texts = ["Hello", "Hello there, how are you?", "Bye"]
    counts = [len(embedder.tokenizer.encode(text).ids) for text in texts]
    body = (await send(embedder, texts)).json
    assert [item["embedding"] for item in body["data"]] == [[float(count), 0.5] for count in counts]
    assert [item["index"] for item in body["data"]] == [0, 1, 2]
    assert body["usage"] == {"prompt_tokens": sum(counts), "total_tokens": sum(counts)}
    assert embedder.script.requests[0].modality is Modality.EMBEDDING
    one = (await send(embedder, [1, 2, 3])).json
    assert one["data"][0]["embedding"][0] == 3.0


async def test_base64_is_little_endian_f32(embedder):
    body = (await send(embedder, "Hello", encoding_format="base64")).json
    assert struct.unpack("<2f", base64.b64decode(body["data"][0]["embedding"]))[1] == 0.5


async def test_lost_worker_is_replaced(embedder):
    embedder.script.fail_with = UnavailableError("gone", reason="transport.disconnected")
    assert (await send(embedder, "Hello")).status == 200
    assert len(embedder.script.requests) == 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"given": []}, "input"),
        ({"given": ""}, "input"),
        ({"given": "word " * 100}, "input"),
        ({"given": ["x"] * 2049}, "input"),
        ({"given": [[99999]]}, "input"),
        ({"given": "x", "encoding_format": "int8"}, "encoding_format"),
        ({"given": "x", "dimensions": 5}, "dimensions"),
        ({"given": "x", "nonsense": 5}, "nonsense"),
    ],
)
async def test_bad_fields_are_named(embedder, fields, param):
    reply = await send(embedder, **fields)
    assert (reply.status, reply.json["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    "parts", [(), (text_part("x"),), (tensor_part(b"\0" * 8, shape=(2,), dtype="i32"),)], ids=["none", "text", "ints"]
)
async def test_output_that_is_no_vector_is_an_error(embedder, parts):
    embedder.script.raw = lambda request: [GenerateChunk(parts=parts, finish_reason=FinishReason.STOP)]
    reply = await send(embedder, "Hello")
    assert (reply.status, reply.json["error"]["code"]) == (502, "backend.protocol")


async def test_models_answer_only_their_own_apis(embedder):
    reply = await embedder.chat()
    assert (reply.status, reply.json["error"]["param"]) == (400, "model")
