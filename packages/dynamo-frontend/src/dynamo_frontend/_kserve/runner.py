"""Runs a completion for callers that read its pieces one by one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from dynamo_core.enums import ModelType
from dynamo_core.errors import DynamoError
from dynamo_core.requests import TokenLogprob, Usage
from dynamo_frontend._catalog import ServedModel
from dynamo_frontend._generate_api import GenerateApi, ReplyForm
from dynamo_frontend._http.request import HttpRequest
from dynamo_frontend._http.response import HttpResponse
from dynamo_frontend._kserve.inference import InferCall, check_version
from dynamo_frontend._plan import plan_completion
from dynamo_frontend._writer import SilentWriter

_PIECES_AHEAD = 64


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of every choice, and the reasons of those that ended; empty strings for the others."""

    texts: list[str]
    reasons: list[str]
    last: bool = False


class _Link:
    """Connection of a response that nobody writes bytes to: it says whether the reader is there and keeps up."""

    def __init__(self) -> None:
        self.closed = False
        self.paused = False

    def write(self, data: bytes) -> None:
        """Never called."""

    def write_body(self, data: bytes, *, chunked: bool) -> None:
        """Never called."""

    def write_last_chunk(self) -> None:
        """Never called."""

    def response_done(self, response: HttpResponse) -> None:
        """Never called."""

    def abort(self) -> None:
        """Never called."""


class PieceStream(SilentWriter):
    """A running completion: written by its reply, read by one reader, who must close it.

    Args:
        choices: How many.
        whole: Give one piece, at the end.
    """

    def __init__(self, choices: int, *, whole: bool) -> None:
        self._link = _Link()
        self.response = HttpResponse(self._link, head_only=True, chunked=False, keep_alive=True)
        self._whole = whole
        self._texts = [""] * choices
        self._reasons = [""] * choices
        self._fresh = False
        self._pieces: deque[Piece] = deque()
        self._error: DynamoError | None = None
        self._over = False
        self._news = asyncio.Event()

    @property
    def writable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] - a fixed value in the base
        """Whether the reader keeps up."""
        return not self._link.paused

    def text(self, choice: int, text: str, logprobs: Sequence[TokenLogprob]) -> None:
        """Add text."""
        self._texts[choice] += text
        self._fresh = True

    def finish(self, choice: int, reason: str, stop: str | None) -> None:
        """Note the end of a choice."""
        self._reasons[choice] = reason
        self._fresh = True

    def flush(self) -> None:
        """Give what has been written to the reader."""
        if self._fresh and not self._whole:
            self._push(last=False)

    def done(self, usage: Usage) -> None:
        """Give the rest."""
        self._push(last=True)
        self._over = True

    def failed(self, error: DynamoError) -> None:
        """End with an error."""
        self._error = error
        self._over = True
        self._news.set()

    def close(self) -> None:
        """The reader has all it wants: end what still runs. Idempotent."""
        self._link.closed = True
        if not self._over:
            self._over = True
            self.response.notify_disconnect()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Iterate over the pieces.

        Raises:
            DynamoError: what ended the completion, after its last piece.
        """
        while True:
            while self._pieces:
                piece = self._pieces.popleft()
                if self._link.paused and len(self._pieces) < _PIECES_AHEAD // 2:
                    self._link.paused = False
                    self.response.notify_drain()
                yield piece
            if self._error is not None:
                raise self._error
            if self._over:
                return
            self._news.clear()
            await self._news.wait()

    def _push(self, *, last: bool) -> None:
        self._pieces.append(Piece(self._texts, self._reasons, last))
        self._texts = [""] * len(self._texts)
        self._reasons = [""] * len(self._reasons)
        self._fresh = False
        self._link.paused = len(self._pieces) >= _PIECES_AHEAD
        self._news.set()


class CompletionRunner:
    """Runs inference calls through the pipeline of text completions.

    Args:
        generate: The pipeline.
    """

    def __init__(self, generate: GenerateApi) -> None:
        self._generate = generate

    def model(self, name: str, version: str = "") -> ServedModel:
        """Return a ready model that answers completions.

        Raises:
            InvalidRequestError: if it answers other APIs only.
            NotFoundError, UnavailableError: as ``Catalog.find``, or for another version.
        """
        check_version(name, version)
        return self._generate.find_model(name, ModelType.COMPLETIONS)

    def ready(self) -> bool:
        """Whether any model can answer."""
        return bool(self._generate.services.catalog.models())

    async def start(self, call: InferCall, request: HttpRequest, *, stream: bool) -> PieceStream:
        """Start a call under a request's headers and limits. Cancelling it ends the completion.

        Raises:
            DynamoError: if it is wrong, not admitted, or cannot be started.
        """
        fields = call.completion(stream=stream)
        model = self._generate.find(fields, ModelType.COMPLETIONS)
        pieces = PieceStream(fields.n or 1, whole=not stream)
        form = ReplyForm("kserve", "", lambda response, plan, head, usage: pieces)
        try:
            await self._generate.serve(fields, model, plan_completion, request, pieces.response, form)
        except BaseException:
            pieces.close()
            raise
        return pieces
