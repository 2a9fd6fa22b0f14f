"""The handler of the rerank API, in the form that Cohere, Jina and vLLM share."""

from __future__ import annotations

import asyncio
import math
from array import array
from collections.abc import Sequence
from operator import mul
from typing import Any, cast

import msgspec

from dynamo_core.enums import ModelType
from dynamo_core.errors import BackendProtocolError, InvalidRequestError
from dynamo_core.tokens import token_count
from dynamo_frontend._embeddings.vectors import VectorSource
from dynamo_frontend._generate_api import GenerateApi, caller_headers
from dynamo_frontend._http.request import HttpRequest
from dynamo_frontend._http.response import HttpResponse
from dynamo_frontend._openai.fields import BodyDecoder
from dynamo_frontend._openai.stream import JSON
from dynamo_frontend._request_id import request_id_of

MAX_DOCUMENTS = 1000
_SCORES_PER_TURN = 8


class RerankDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A document as an object."""

    text: str


class RerankRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of ``/v1/rerank``."""

    model: str
    query: str
    documents: list[str | RerankDocument]
    top_n: int | None = None
    return_documents: bool | None = None
    user: str | None = None


_DECODER = BodyDecoder(RerankRequest)


class RerankApi:
    """Orders documents by the cosine of their vectors with the query's, from a model that answers embeddings.

    Args:
        generate: Finds models, admits and observes requests.
    """

    def __init__(self, generate: GenerateApi) -> None:
        self._generate = generate
        self._source = VectorSource(generate)

    async def rerank(self, request: HttpRequest, response: HttpResponse) -> None:
        """``POST /v1/rerank``."""
        fields = cast("RerankRequest", _DECODER.decode(request.body))
        _check(fields)
        model = self._generate.find_model(fields.model, ModelType.EMBEDDING)
        texts = [item if isinstance(item, str) else item.text for item in fields.documents]
        request_id = request_id_of(request)
        query, *documents = await self._source.fetch(
            {"query": [fields.query], "documents": texts}, model, request, request_id, endpoint="rerank"
        )
        scores = await _scores(query.values, [document.values for document in documents])
        order = sorted(range(len(texts)), key=lambda index: -scores[index])[: fields.top_n]
        tokens = sum(token_count(vector.prompt) for vector in (query, *documents))
        shown = fields.return_documents is not False
        body: dict[str, Any] = {
            "id": f"rerank-{request_id}",
            "object": "list",
            "model": fields.model,
            "results": [
                {
                    "index": index,
                    "relevance_score": scores[index],
                    **({"document": {"text": texts[index]}} if shown else {}),
                }
                for index in order
            ],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        response.send(200, msgspec.json.encode(body), JSON, caller_headers(request, request_id))


def _check(fields: RerankRequest) -> None:
    count = len(fields.documents)
    if not 1 <= count <= MAX_DOCUMENTS:
        raise InvalidRequestError(f"documents has {count} entries; send 1 to {MAX_DOCUMENTS}.", param="documents")
    if fields.top_n is not None and fields.top_n < 1:
        raise InvalidRequestError(f"top_n is {fields.top_n}; it must be at least 1.", param="top_n")


async def _scores(query: array[float], documents: Sequence[array[float]]) -> list[float]:
    found: list[float] = []
    length = math.hypot(*query)
    for index, document in enumerate(documents):
        if index % _SCORES_PER_TURN == _SCORES_PER_TURN - 1:
            # Thousands of products take longer than other streams should wait.
            await asyncio.sleep(0)
        found.append(_cosine(query, length, document))
    return found


def _cosine(query: array[float], length: float, document: array[float]) -> float:
    if len(query) != len(document):
        raise BackendProtocolError(
            f"The workers sent vectors of {len(query)} and {len(document)} numbers.", reason="backend.protocol"
        )
    product = length * math.hypot(*document)
    score = math.fsum(map(mul, query, document)) / product if product else 0.0
    return max(-1.0, min(1.0, score))
