"""One choice of a request as one or two completions: while it may not end yet, what would end it is forbidden."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from dynamo_core.requests import GenerateRequest, TokenLogprob
from dynamo_core.tokens import unpack_tokens
from dynamo_worker._llamacpp._body import completion_body
from dynamo_worker._llamacpp._completion import Step
from dynamo_worker._output_builder import Delta

Completions = Callable[[dict[str, Any]], AsyncGenerator[Step, None]]


@dataclass
class Generation:
    """State of one choice.

    Attributes:
        request: What was asked.
        choice: Index of the choice.
        max_tokens: Most tokens of this attempt.
        end_token_ids: Tokens that end the choice.
        control_token_ids: Tokens of the model that stand for no text.
        cached_tokens: Prompt tokens that came from the cache.
        tokens: Prompt and output so far.
    """

    request: GenerateRequest
    choice: int
    max_tokens: int
    end_token_ids: Sequence[int]
    control_token_ids: frozenset[int]
    cached_tokens: int = 0
    tokens: list[int] = field(default_factory=list[int])

    def __post_init__(self) -> None:
        self.tokens = list(unpack_tokens(self.request.token_ids))

    async def run(self, completions: Completions) -> AsyncIterator[Delta]:
        """Yield the choice's output; leaving it ends it in llama.cpp."""
        left = self.max_tokens
        free = min(max(0, self.request.stop.min_tokens - self.request.accepted_tokens), left)
        if free and self.end_token_ids:
            finish = "length" if free == left else None
            async for delta in self._complete(completions, free, self.end_token_ids):
                left -= len(delta.token_ids)
                yield Delta(delta.choice, delta.token_ids, delta.logprobs, finish=delta.finish and finish)
            if finish:
                return
        async for delta in self._complete(completions, left, ()):
            yield delta

    async def _complete(self, completions: Completions, count: int, banned: Sequence[int]) -> AsyncIterator[Delta]:
        body = completion_body(self.request, self.tokens, choice=self.choice, max_tokens=count, banned=banned)
        held: tuple[TokenLogprob, ...] = ()
        is_first = not banned or not self.cached_tokens
        async with aclosing(completions(body)) as steps:
            async for step in steps:
                if step.cached_tokens is not None and is_first:
                    self.cached_tokens = step.cached_tokens
                entries = held + step.logprobs
                tokens = [entry.token_id for entry in entries]
                ended = next((index for index, token in enumerate(tokens) if token in self.end_token_ids), None)
                if ended is not None:
                    yield self._delta(entries[: ended + 1], "stop")
                    return
                held = ()
                if step.finish is None and tokens and tokens[-1] in self.control_token_ids:
                    # It may be an end that the model's own list lacks; what comes next tells.
                    held, entries = entries[-1:], entries[:-1]
                elif step.finish == "stop" and tokens and tokens[-1] in self.control_token_ids:
                    entries = entries[:-1]
                if entries or step.finish:
                    yield self._delta(entries, step.finish)

    def _delta(self, entries: Sequence[TokenLogprob], finish: str | None) -> Delta:
        tokens = [entry.token_id for entry in entries]
        self.tokens += tokens
        wanted = self.request.output.logprobs
        logprobs = () if wanted is None else tuple(_cut(entry, wanted) for entry in entries)
        return Delta(self.choice, tokens, logprobs, finish=finish)


def _cut(entry: TokenLogprob, count: int) -> TokenLogprob:
    return TokenLogprob(entry.token_id, entry.logprob, entry.top[:count])
