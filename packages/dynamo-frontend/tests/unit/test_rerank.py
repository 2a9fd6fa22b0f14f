"""The rerank API over the whole path."""

import math
import struct

import msgspec
import pytest

from dynamo_core.content import tensor_part
from dynamo_core.enums import FinishReason, ModelType
from dynamo_core.requests import GenerateChunk, Usage
from dynamo_core.tokens import token_count, unpack_tokens
from dynamo_frontend._rerank.api import MAX_DOCUMENTS

DOCUMENTS = ["The weather is fine.", "Tokyo is the capital of Japan.", "capital Japan"]
QUERY = "What is the capital of Japan?"


def bag(token_ids):
    """A vector of token counts."""
    found = [0.0] * 16
    for token in token_ids:
        found[token % 16] += 1
    return found


def embed(request):
    vector = bag(unpack_tokens(request.token_ids))
    part = tensor_part(struct.pack("<16f", *vector), shape=(16,), dtype="f32")
    count = token_count(request.token_ids)
    return [GenerateChunk(parts=(part,), finish_reason=FinishReason.STOP, usage=Usage(count))]


@pytest.fixture
async def reranker(stack):
    stack.card = msgspec.structs.replace(stack.card, model_types=(ModelType.EMBEDDING,), context_length=64)
    stack.script.raw = embed
    await stack.start(workers=2)
    return stack


async def rerank(stack, **fields):
    return await stack.post("/v1/rerank", {"model": "tiny", "query": QUERY, "documents": DOCUMENTS, **fields})


def cosine(tokenizer, one, other):
    a, b = (bag(tokenizer.encode(text).ids) for text in (one, other))
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


async def test_documents_are_ordered_by_cosine(reranker):
    reply = await rerank(reranker)
    expected = {index: cosine(reranker.tokenizer, QUERY, text) for index, text in enumerate(DOCUMENTS)}
    results = reply.json["results"]
    assert [item["index"] for item in results] == sorted(expected, key=expected.get, reverse=True)
    for item in results:
        assert item["relevance_score"] == pytest.approx(expected[item["index"]], abs=1e-6)
        assert item["document"] == {"text": DOCUMENTS[item["index"]]}
    tokens = sum(len(reranker.tokenizer.encode(text).ids) for text in (QUERY, *DOCUMENTS))
    assert reply.json["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert reply.json["id"] == f"rerank-{reply.headers['x-request-id']}"


async def test_the_best_alone_without_their_texts(reranker):
    reply = await rerank(reranker, top_n=1, return_documents=False, documents=[{"text": text} for text in DOCUMENTS])
    (best,) = reply.json["results"]
    assert set(best) == {"index", "relevance_score"}


async def test_equal_documents_keep_their_order(reranker):
    reply = await rerank(reranker, documents=["same"] * 20)
    assert [item["index"] for item in reply.json["results"]] == list(range(20))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"documents": []}, "documents"),
        ({"documents": ["x"] * (MAX_DOCUMENTS + 1)}, "documents"),
        ({"documents": [""]}, "documents"),
        ({"documents": [{"title": "x"}]}, "documents[0].title"),
        ({"query": ""}, "query"),
        ({"top_n": 0}, "top_n"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
async def test_bad_requests_name_the_field(reranker, fields, param):
    reply = await rerank(reranker, **fields)
    assert (reply.status, reply.json["error"]["param"]) == (400, param)


async def test_models_that_give_no_vectors_are_refused(stack):
    await stack.start()
    reply = await rerank(stack)
    assert (reply.status, reply.json["error"]["param"]) == (400, "model")
