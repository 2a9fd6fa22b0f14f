"""Chunks as the contract wants them, from what a foreign engine says: positions, ends, usage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from dynamo_core.enums import FinishReason
from dynamo_core.requests import GenerateChunk, GenerateRequest, TokenLogprob, Usage
from dynamo_core.tokens import pack_tokens, token_count

_REASONS = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "abort": FinishReason.CANCELLED,
    "content_filter": FinishReason.CONTENT_FILTER,
    "tool_calls": FinishReason.STOP,
}


@dataclass(frozen=True)
class Delta:
    """New output of one choice as the engine gave it.

    Attributes:
        choice: Which choice.
        token_ids: New tokens, an end token included.
        logprobs: One entry a token, or none.
        text: New text, from engines that give text.
        finish: The engine's word for the end (``stop``, ``length``, ...), if this is the end.
        is_end_token_last: Whether the last token is what ended it, for engines that know; it is not output then.
    """

    choice: int = 0
    token_ids: Sequence[int] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    text: str | None = None
    finish: str | None = None
    is_end_token_last: bool = False


class OutputBuilder:
    """State of one request's output.

    The chunk that ends the last choice is kept until ``close``, because engines tell usage after it.

    Args:
        request: The request.
        eos_token_ids: End tokens of the model, for requests that name none.
    """

    def __init__(self, request: GenerateRequest, eos_token_ids: Sequence[int] = ()) -> None:
        choices = max(1, request.sampling.n)
        self._request = request
        self._prompt_tokens = request.prompt_tokens or token_count(request.token_ids)
        self._next = [request.accepted_tokens] * choices
        self._open = set(range(choices))
        self._last: GenerateChunk | None = None
        self._stop_ids = frozenset(request.stop.stop_token_ids)
        self._eos_ids = frozenset(() if request.stop.ignore_eos else request.eos_token_ids or eos_token_ids)

    @property
    def end_token_ids(self) -> list[int]:
        """Tokens that end a choice: those of the request and the model's own, unless they are ignored."""
        return sorted(self._stop_ids | self._eos_ids)

    @property
    def complete(self) -> bool:
        """Whether every choice has ended."""
        return not self._open

    def take(self, delta: Delta) -> GenerateChunk | None:
        """Return the chunk for new output; None if there is nothing to say yet, or the choice has ended."""
        choice = delta.choice
        if choice not in self._open:
            return None
        reason, ended_by, count = self._end_of(delta)
        if not (count or delta.text or reason):
            return None
        chunk = GenerateChunk(
            pack_tokens(delta.token_ids[:count]),
            self._next[choice],
            choice,
            self._request.attempt,
            reason,
            ended_by,
            logprobs=delta.logprobs[:count],
            text=delta.text,
        )
        self._next[choice] += count
        if reason is not None:
            self._open.discard(choice)
        if self._open:
            return chunk
        self._last = chunk
        return None

    def close(self, *, completion_tokens: int | None = None, cached_tokens: int = 0) -> GenerateChunk | None:
        """Return the chunk that ends the request, with usage; None while a choice is open.

        Args:
            completion_tokens: The engine's own count of this attempt, for engines that give text only.
            cached_tokens: Prompt tokens that came from the engine's cache.
        """
        if self._last is None:
            return None
        counted = sum(self._next)
        told = (completion_tokens or 0) + self._request.accepted_tokens * len(self._next)
        usage = Usage(self._prompt_tokens, counted or told, cached_tokens)
        last, self._last = self._last, None
        return msgspec.structs.replace(last, usage=usage)

    def cancelled(self) -> list[GenerateChunk]:
        """Return the chunks that end every open choice as cancelled, the last one with usage."""
        if not self._open and self._last is not None:
            ended = self.close()
            return [ended] if ended is not None else []
        ends = [
            GenerateChunk(
                first_index=self._next[choice],
                choice=choice,
                attempt=self._request.attempt,
                finish_reason=FinishReason.CANCELLED,
            )
            for choice in sorted(self._open)
        ]
        self._open.clear()
        if ends:
            ends[-1] = msgspec.structs.replace(ends[-1], usage=Usage(self._prompt_tokens, sum(self._next)))
        return ends

    def _end_of(self, delta: Delta) -> tuple[FinishReason | None, int | None, int]:
        """Return the reason, the token that ended the choice, and how many tokens are output."""
        count = len(delta.token_ids)
        if delta.finish is None:
            return None, None, count
        reason = _REASONS.get(delta.finish, FinishReason.UNKNOWN)
        if reason is not FinishReason.STOP or not count:
            return reason, None, count
        last = delta.token_ids[-1]
        if last in self._stop_ids:
            return FinishReason.STOP, last, count - 1
        if last in self._eos_ids or delta.is_end_token_last:
            return FinishReason.EOS, last, count - 1
        return reason, None, count
