"""Checks what an engine says before anybody else sees it: one bad engine must not confuse a whole fleet."""

from __future__ import annotations

import msgspec

from dynamo_core.enums import FinishReason
from dynamo_core.errors import BackendProtocolError
from dynamo_core.requests import GenerateChunk, GenerateRequest, Usage
from dynamo_core.tokens import TOKEN_BYTES, token_count, unpack_tokens

# Ids at or above this are negative numbers that were packed without a check.
_MAX_TOKEN_ID = 1 << 31


class ChunkGuard:
    """State of one request's output: where each choice stands, and whether it may still speak.

    Args:
        request: The request that the chunks answer.
        vocab_size: Ids from here on do not exist; 0 if the engine does not say.
    """

    def __init__(self, request: GenerateRequest, *, vocab_size: int = 0) -> None:
        choices = max(1, request.sampling.n)
        self._attempt = request.attempt
        self._prompt_tokens = request.prompt_tokens or token_count(request.token_ids)
        self._next = [request.accepted_tokens] * choices
        self._accepted = request.accepted_tokens * choices
        self._open = choices
        self._finished = [False] * choices
        self._id_limit = vocab_size or _MAX_TOKEN_ID
        self._max_tokens = request.stop.max_tokens
        self.usage: Usage | None = None

    @property
    def complete(self) -> bool:
        """Whether every choice has ended."""
        return self._open == 0

    @property
    def generated(self) -> int:
        """Tokens over all choices and attempts."""
        return sum(self._next)

    @property
    def new_tokens(self) -> int:
        """Tokens over all choices in this attempt."""
        return self.generated - self._accepted

    def check(self, chunk: GenerateChunk) -> GenerateChunk:
        """Return the chunk as it may go out: with the attempt stamped on it and usage on the very last.

        Raises:
            BackendProtocolError: naming what is wrong with it.
        """
        choice = chunk.choice
        if type(choice) is not int or not 0 <= choice < len(self._next):
            raise _broken(f"choice {choice!r} is not one of the {len(self._next)} asked for")
        if self._finished[choice]:
            raise _broken(f"choice {choice} went on after its finish reason")
        if chunk.token_ids:
            self._check_tokens(chunk, choice)
        elif chunk.first_index != self._next[choice] and not chunk.finish_reason and not chunk.parts:
            raise _broken(f"an empty chunk has first_index {chunk.first_index}, expected {self._next[choice]}")
        if chunk.finish_reason is not None:
            chunk = self._finish(chunk, choice)
        return chunk if chunk.attempt == self._attempt else msgspec.structs.replace(chunk, attempt=self._attempt)

    def incomplete(self) -> BackendProtocolError:
        """Return the error of a stream that ended although choices are open."""
        return BackendProtocolError(
            f"the engine ended its stream after {self.generated} tokens without a finish reason",
            reason="backend.stream_incomplete",
        )

    def _check_tokens(self, chunk: GenerateChunk, choice: int) -> None:
        data = chunk.token_ids
        if type(data) is not bytes or len(data) % TOKEN_BYTES:
            raise _broken("token_ids are not packed token ids (use dynamo_core.pack_tokens)")
        if chunk.first_index != self._next[choice]:
            raise _broken(
                f"first_index {chunk.first_index} of choice {choice} leaves a hole or repeats; "
                f"expected {self._next[choice]}"
            )
        largest = int.from_bytes(data, "little") if len(data) == TOKEN_BYTES else max(unpack_tokens(data))
        if largest >= self._id_limit:
            raise _broken(f"token id {largest} is not below {self._id_limit}")
        self._next[choice] += len(data) // TOKEN_BYTES
        if self._max_tokens is not None and self._next[choice] > self._max_tokens:
            raise _broken(f"choice {choice} has {self._next[choice]} tokens, more than max_tokens {self._max_tokens}")

    def _finish(self, chunk: GenerateChunk, choice: int) -> GenerateChunk:
        if chunk.finish_reason is FinishReason.UNKNOWN:
            raise _broken("the finish reason is unknown")
        self._finished[choice] = True
        self._open -= 1
        if self._open:
            return chunk
        if chunk.usage is None:
            chunk = msgspec.structs.replace(chunk, usage=Usage(self._prompt_tokens, self.generated))
        self.usage = chunk.usage
        return chunk


def _broken(what: str) -> BackendProtocolError:
    return BackendProtocolError(f"The engine broke its contract: {what}.")
