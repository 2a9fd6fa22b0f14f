"""The handler of the embeddings API."""

from __future__ import annotations

import base64
from array import array
from typing import Any

import msgspec

from dynamo_core.enums import ModelType
from dynamo_core.errors import InvalidRequestError
from dynamo_core.tokens import token_count
from dynamo_frontend._embeddings.vectors import VectorSource
from dynamo_frontend._generate_api import GenerateApi, caller_headers
from dynamo_frontend._http.request import HttpRequest
from dynamo_frontend._http.response import HttpResponse
from dynamo_frontend._openai.fields import BodyDecoder
from dynamo_frontend._openai.stream import JSON
from dynamo_frontend._request_id import request_id_of


class EmbeddingRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of ``/v1/embeddings``."""

    model: str
    input: str | list[Any]
    encoding_format: str | None = None
    dimensions: int | None = None
    user: str | None = None


_DECODER = BodyDecoder(EmbeddingRequest)


class EmbeddingsApi:
    """Answers embeddings.

    Args:
        generate: Finds models, admits and observes requests.
    """

    def __init__(self, generate: GenerateApi) -> None:
        self._generate = generate
        self._source = VectorSource(generate)

    async def embeddings(self, request: HttpRequest, response: HttpResponse) -> None:
        """``POST /v1/embeddings``."""
        fields: EmbeddingRequest = _DECODER.decode(request.body)
        encoding = fields.encoding_format or "float"
        if encoding not in ("float", "base64"):
            raise InvalidRequestError(
                f"encoding_format is {encoding!r}; use 'float' or 'base64'.", param="encoding_format"
            )
        model = self._generate.find_model(fields.model, ModelType.EMBEDDING)
        if fields.dimensions is not None:
            raise InvalidRequestError(
                f"The model '{model.name}' gives vectors of one size; leave dimensions out.", param="dimensions"
            )
        request_id = request_id_of(request)
        vectors = await self._source.fetch({"input": fields.input}, model, request, request_id, endpoint="embeddings")
        tokens = sum(token_count(vector.prompt) for vector in vectors)
        body = {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": _shown(vector.values, encoding)}
                for index, vector in enumerate(vectors)
            ],
            "model": fields.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        response.send(200, msgspec.json.encode(body), JSON, caller_headers(request, request_id))


def _shown(vector: array[float], encoding: str) -> Any:
    return vector.tolist() if encoding == "float" else base64.b64encode(vector.tobytes()).decode()
