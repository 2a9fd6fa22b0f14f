"""The handler of the embeddings API."""

from __future__ import annotations

import asyncio
import base64
from array import array
from collections.abc import Sequence
from typing import Any

import msgspec

from dynamo_core.enums import Modality, ModelType
from dynamo_core.errors import CancelledRequestError, DynamoError, InvalidRequestError
from dynamo_core.requests import GenerateRequest, OutputOptions
from dynamo_core.tokens import PackedTokens, token_count
from dynamo_frontend._catalog import ServedModel
from dynamo_frontend._embeddings.fetch import fetch_vector
from dynamo_frontend._generate_api import GenerateApi
from dynamo_frontend._http.request import HttpRequest
from dynamo_frontend._http.response import HttpResponse
from dynamo_frontend._openai.fields import BodyDecoder
from dynamo_frontend._openai.stream import JSON
from dynamo_frontend._plan import encode_prompts
from dynamo_frontend._request_id import request_id_of

MAX_INPUTS = 2048
_CONCURRENT_INPUTS = 64


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
        observation = self._generate.observe(model, "embeddings", stream=False)
        try:
            self._generate.admit(model)
            prompts = await encode_prompts(fields.input, model, param="input", limit=MAX_INPUTS)
            vectors = await self._vectors(prompts, model, request_id)
        except DynamoError as error:
            observation.end((), error)
            raise
        except BaseException:
            observation.end((), CancelledRequestError("The client left."))
            raise
        observation.end((), None)
        tokens = sum(token_count(prompt) for prompt in prompts)
        body = {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": _shown(vector, encoding)}
                for index, vector in enumerate(vectors)
            ],
            "model": fields.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        response.send(200, msgspec.json.encode(body), JSON, {"x-request-id": request_id})

    async def _vectors(
        self, prompts: Sequence[PackedTokens], model: ServedModel, request_id: str
    ) -> list[array[float]]:
        """Fetch all vectors; the first failure ends the others."""
        places = asyncio.Semaphore(_CONCURRENT_INPUTS)
        several = len(prompts) > 1

        async def one(index: int, prompt: PackedTokens) -> array[float]:
            item = GenerateRequest(
                request_id=f"{request_id}-{index}" if several else request_id,
                model=model.name,
                token_ids=_fitting(prompt, index, model),
                modality=Modality.EMBEDDING,
                output=OutputOptions(modality=Modality.EMBEDDING),
            )
            async with places:
                return await fetch_vector(model, item, self._generate.services)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(index, prompt)) for index, prompt in enumerate(prompts)]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]


def _fitting(prompt: PackedTokens, index: int, model: ServedModel) -> PackedTokens:
    count, context = token_count(prompt), model.card.context_length
    if not count or (context and count > context):
        raise InvalidRequestError(
            f"input[{index}] has {count} tokens; this model takes 1 to {context or 'any number'}.",
            reason="context_length_exceeded" if count else None,
            param="input",
        )
    return prompt


def _shown(vector: array[float], encoding: str) -> Any:
    return vector.tolist() if encoding == "float" else base64.b64encode(vector.tobytes()).decode()
