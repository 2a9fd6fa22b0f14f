"""One completion of llama.cpp's on a thread of its own, as a stream on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, cast

from dynamo_core.errors import CapacityExhaustedError, DynamoError, InternalError, InvalidRequestError
from dynamo_core.requests import TokenLogprob, TopLogprob

Complete = Callable[[dict[str, Any], Callable[[dict[str, Any]], bool]], object]


@dataclass(frozen=True)
class Step:
    """What one callback says.

    Attributes:
        logprobs: The new tokens with their log-probabilities.
        finish: llama.cpp's word for the end, if this is the end.
        cached_tokens: Prompt tokens that came from the cache, where the callback says so.
    """

    logprobs: tuple[TokenLogprob, ...] = ()
    finish: str | None = None
    cached_tokens: int | None = None


async def stream(complete: Complete, body: dict[str, Any], executor: Executor) -> AsyncGenerator[Step, None]:
    """Yield the steps of a completion. Leaving the iterator ends the completion with the step that is being computed.

    Args:
        complete: Runs a completion on the calling thread; its callback ends it by returning True.
        body: The completion.
        executor: Threads, one for each completion that may run at once.

    Raises:
        InvalidRequestError: if llama.cpp refuses it.
        CapacityExhaustedError: if llama.cpp is full.
        InternalError: if llama.cpp fails.
    """
    loop = asyncio.get_running_loop()
    steps: asyncio.Queue[dict[str, Any] | BaseException | None] = asyncio.Queue()
    left = False

    def on_chunk(chunk: dict[str, Any]) -> bool:
        if not left:
            loop.call_soon_threadsafe(steps.put_nowait, chunk)
        return left

    def run() -> None:
        end: BaseException | None = None
        try:
            if not left:
                complete(body, on_chunk)
        except BaseException as error:  # noqa: BLE001 - raised where the stream is read
            end = error
        if not left:
            loop.call_soon_threadsafe(steps.put_nowait, end)

    executor.submit(run)
    try:
        while (item := await steps.get()) is not None:
            if isinstance(item, BaseException):
                raise InternalError("llama.cpp failed on this request.", diagnostic=repr(item)) from item
            yield parse(item)
    finally:
        left = True


def parse(chunk: Mapping[str, Any]) -> Step:
    """Read one chunk.

    Raises:
        InvalidRequestError: if it says that the request is wrong.
        CapacityExhaustedError: if it says that llama.cpp is full.
        InternalError: if it says anything else.
    """
    if "error" in chunk:
        raise _error(chunk["error"])
    progress = chunk.get("prompt_progress")
    cached = int(progress["cache"]) if progress else None
    (choice,) = chunk["choices"]
    entries = cast("list[Mapping[str, Any]]", (choice.get("logprobs") or {}).get("content") or [])
    return Step(tuple(map(_logprob, entries)), choice.get("finish_reason"), cached)


def _logprob(entry: Mapping[str, Any]) -> TokenLogprob:
    top = tuple(TopLogprob(int(item["id"]), float(item["logprob"])) for item in entry["top_logprobs"])
    return TokenLogprob(int(entry["id"]), float(entry["logprob"]), top)


def _error(error: Mapping[str, Any]) -> DynamoError:
    message, code = str(error.get("message", error)), error.get("code")
    if code == 400 or error.get("type") in ("invalid_request_error", "exceed_context_size_error"):
        return InvalidRequestError(f"llama.cpp refuses the request: {message}")
    if code == 503 or "context size" in message.lower():  # requests that run have used up the cache between them
        return CapacityExhaustedError(f"llama.cpp is full: {message}", reason="capacity.worker_overloaded")
    return InternalError("llama.cpp failed on this request.", reason="backend.unknown", diagnostic=message)
