"""Vectors of many texts, some at a time."""

from __future__ import annotations

import asyncio
import contextlib
from array import array
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynamo_core.enums import Modality
from dynamo_core.errors import InvalidRequestError
from dynamo_core.requests import GenerateRequest, OutputOptions
from dynamo_core.tokens import PackedTokens, token_count
from dynamo_frontend._catalog import ServedModel
from dynamo_frontend._embeddings.fetch import fetch_vector
from dynamo_frontend._generate_api import GenerateApi
from dynamo_frontend._http.request import CallerLimits, HttpRequest
from dynamo_frontend._plan import encode_prompts

MAX_INPUTS = 2048
_CONCURRENT_INPUTS = 64


@dataclass(frozen=True, slots=True)
class Vector:
    """A vector and what it stands for."""

    prompt: PackedTokens
    values: array[float]


class VectorSource:
    """Fetches vectors from workers, and counts each request as one.

    Args:
        generate: Admits and observes requests.
    """

    def __init__(self, generate: GenerateApi) -> None:
        self._generate = generate

    async def fetch(
        self,
        given: Mapping[str, str | list[Any]],
        model: ServedModel,
        request: HttpRequest,
        request_id: str,
        *,
        endpoint: str,
    ) -> list[Vector]:
        """Return the vectors of all texts, in order. Cancelling kills the calls.

        Args:
            given: Texts or token ids by the name of the field they came in.
            model: What makes the vectors.
            request: The request, whose caller is charged for the tokens.
            request_id: Its id.
            endpoint: Name for metrics.

        Raises:
            InvalidRequestError: naming the field, if it is empty, too long, or of another form.
            RateLimitedError: if the caller's tokens do not suffice.
            DynamoError: what ended the last attempt of a text.
        """
        with self._generate.counted(model, endpoint):
            prompts = [
                _fitting(prompt, f"{param}[{index}]", model)
                for param, texts in given.items()
                for index, prompt in enumerate(await encode_prompts(texts, model, param=param, limit=MAX_INPUTS))
            ]
            limit_s = self._generate.limit_s(request)
            with _charged(request.caller, sum(map(token_count, prompts))):
                return await self._all(prompts, model, request_id, limit_s)

    async def _all(
        self, prompts: Sequence[PackedTokens], model: ServedModel, request_id: str, limit_s: float | None
    ) -> list[Vector]:
        """Fetch all vectors; the first failure ends the others."""
        places = asyncio.Semaphore(_CONCURRENT_INPUTS)
        several = len(prompts) > 1

        async def one(index: int, prompt: PackedTokens) -> Vector:
            item = GenerateRequest(
                request_id=f"{request_id}-{index}" if several else request_id,
                model=model.name,
                token_ids=prompt,
                modality=Modality.EMBEDDING,
                output=OutputOptions(modality=Modality.EMBEDDING),
                deadline_s=limit_s,
            )
            async with places:
                return Vector(prompt, await fetch_vector(model, item, self._generate.services))

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(index, prompt)) for index, prompt in enumerate(prompts)]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]


@contextlib.contextmanager
def _charged(caller: CallerLimits | None, tokens: int) -> Generator[None, None, None]:
    """Charge a caller for tokens, which cost nothing if the work in the block fails."""
    if caller is None or not caller.counts_tokens:
        yield
        return
    caller.reserve(tokens)
    used = 0
    try:
        yield
        used = tokens
    finally:
        caller.settle(tokens, used)


def _fitting(prompt: PackedTokens, where: str, model: ServedModel) -> PackedTokens:
    count, context = token_count(prompt), model.card.context_length
    if not count or (context and count > context):
        raise InvalidRequestError(
            f"{where} has {count} tokens; this model takes 1 to {context or 'any number'}.",
            reason="context_length_exceeded" if count else None,
            param=where.partition("[")[0],
        )
    return prompt
