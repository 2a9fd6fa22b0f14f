"""Where a generation's accepted output goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dynamo_core.enums import FinishReason
from dynamo_core.errors import DynamoError
from dynamo_core.requests import TokenLogprob, Usage


class GenerationSink(Protocol):
    """Where accepted output goes. Called on the event loop, in order, ``flush`` after each batch."""

    def tokens(self, choice: int, token_ids: list[int], logprobs: Sequence[TokenLogprob]) -> int | None:
        """Take new tokens. Returns how many of them count if a stop string ended the choice, else None."""
        ...

    def finished(self, choice: int, reason: FinishReason) -> None:
        """A choice ended."""
        ...

    def flush(self) -> None:
        """Everything that arrived together has been given."""
        ...

    def done(self, usage: Usage) -> None:
        """All choices ended."""
        ...

    def failed(self, error: DynamoError) -> None:
        """The generation cannot go on. Nothing follows."""
        ...

    @property
    def writable(self) -> bool:
        """Whether the client keeps up."""
        ...
