"""Measures a live endpoint that speaks OpenAI's completions API."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import aiohttp
import msgspec

from dynamo_core.clock import Clock
from dynamo_core.errors import BackendProtocolError, DeadlineExceededError, DynamoError, UnavailableError
from dynamo_planner._profiler.sweep import Measurement, SweepPlan

FIRST_TOKEN_ID, LAST_TOKEN_ID = 10, 250
"""Ids that every vocabulary holds and none of the usual ones uses as a special token."""

MAX_ERROR_CHARS = 300


@dataclass(frozen=True)
class _Answer:
    ttft_s: float
    total_s: float
    tokens: int

    @property
    def itl_s(self) -> float:
        return (self.total_s - self.ttft_s) / max(self.tokens - 1, 1)


class EndpointProbe:
    """Sends streaming completions and times their tokens.

    Args:
        url: Base address, with or without ``/v1``.
        model: Model name.
        plan: The sweep.
        clock: Time.
        api_key: Bearer token; none if empty.
        timeout_s: Limit of one request.
    """

    def __init__(
        self, url: str, model: str, plan: SweepPlan, *, clock: Clock, api_key: str = "", timeout_s: float = 300.0
    ) -> None:
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1/completions"
        self._model = model
        self._plan = plan
        self._clock = clock
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout_s = timeout_s
        self._random = random.Random(plan.seed)
        self._session: aiohttp.ClientSession | None = None
        self._warm = False

    async def __aenter__(self) -> Self:
        """Open the connections."""
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
            connector=aiohttp.TCPConnector(limit=0),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def measure(self, isl: int, concurrency: int) -> Measurement:
        """Send that many requests at once and time them. Cancellation abandons them.

        One request that is not timed goes before the first, for an engine's first request is like no other.

        Raises:
            UnavailableError: if the endpoint cannot be reached or refuses.
            DeadlineExceededError: if a request takes longer than the limit.
            BackendProtocolError: if what comes back is no stream of completions, or ends early.
        """
        if not self._warm:
            await self._answered(isl)
            self._warm = True
        begun = self._clock.monotonic()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._answered(isl)) for _ in range(concurrency)]
        took_s = max(self._clock.monotonic() - begun, 1e-9)
        answers = [task.result() for task in tasks]
        return Measurement(
            isl,
            concurrency,
            ttft_ms=1000 * sum(answer.ttft_s for answer in answers) / concurrency,
            itl_ms=1000 * sum(answer.itl_s for answer in answers) / concurrency,
            output_tokens_s=sum(answer.tokens for answer in answers) / took_s,
        )

    async def _answered(self, isl: int) -> _Answer:
        # Prompts differ, or a prefix cache would answer in place of the engine.
        prompt = [self._random.randint(FIRST_TOKEN_ID, LAST_TOKEN_ID) for _ in range(isl)]
        begun = self._clock.monotonic()
        first_s: float | None = None
        tokens = chunks = 0
        async for event in self._events(prompt):
            if event.get("choices"):
                chunks += 1
                first_s = self._clock.monotonic() - begun if first_s is None else first_s
            usage = event.get("usage")
            tokens = int(usage["completion_tokens"]) if usage else tokens
        if first_s is None:
            raise BackendProtocolError(f"{self._url} ended a stream of {isl} prompt tokens without a token")
        return _Answer(first_s, self._clock.monotonic() - begun, tokens or chunks)

    async def _events(self, prompt: list[int]) -> AsyncIterator[dict[str, Any]]:
        assert self._session is not None
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": self._plan.osl,
            "min_tokens": self._plan.osl,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            async with self._session.post(self._url, json=body) as response:
                if response.status != 200:
                    text = (await response.text())[:MAX_ERROR_CHARS]
                    raise UnavailableError(f"{self._url} answered {response.status}: {text}")
                async for line in response.content:
                    data = line.strip().removeprefix(b"data:").strip()
                    if line.startswith(b"data:") and data != b"[DONE]":
                        yield self._decoded(data)
        except TimeoutError as error:
            raise DeadlineExceededError(
                f"{self._url} took more than {self._timeout_s:g} s for {len(prompt)} prompt tokens; raise --timeout-s"
            ) from error
        except aiohttp.ClientError as error:
            raise UnavailableError(f"{self._url} cannot be reached: {error}") from error

    def _decoded(self, data: bytes) -> dict[str, Any]:
        try:
            event = msgspec.json.decode(data, type=dict[str, Any])
        except msgspec.MsgspecError as error:
            raise BackendProtocolError(f"{self._url} sent an event that is no JSON object: {error}") from error
        if "error" in event:
            raise UnavailableError(f"{self._url} failed: {event['error']}")
        return event


def first_error(group: BaseExceptionGroup[BaseException]) -> DynamoError | None:
    """Return the first error of the tree in a group of failed requests."""
    found = group.subgroup(DynamoError)
    while found is not None:
        inner = found.exceptions[0]
        if isinstance(inner, DynamoError):
            return inner
        assert isinstance(inner, BaseExceptionGroup)
        found = inner
    return None
