"""What writes a reply in an API's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dynamo_core.errors import DynamoError
from dynamo_core.requests import TokenLogprob, Usage


class ReplyWriter(Protocol):
    """Writes one reply in an API's form. ``logprobs`` covers the tokens that arrived with the text."""

    def text(self, choice: int, text: str, logprobs: Sequence[TokenLogprob]) -> None:
        """Add to a choice's answer."""
        ...

    def reasoning(self, choice: int, text: str) -> None:
        """Add to a choice's reasoning."""
        ...

    def call_start(self, choice: int, index: int, name: str) -> None:
        """Begin a tool call; ``index`` counts a choice's calls."""
        ...

    def call_arguments(self, choice: int, text: str) -> None:
        """Add to the arguments of the call that began last."""
        ...

    def call_end(self, choice: int, *, complete: bool) -> None:
        """End the call that began last; the arguments of one that the model finished are JSON."""
        ...

    def finish(self, choice: int, reason: str, stop: str | None) -> None:
        """End a choice: ``stop`` (with the stop string, if any), ``length``, ``tool_calls`` or ``content_filter``."""
        ...

    def flush(self) -> None:
        """Send what has been written."""
        ...

    def done(self, usage: Usage) -> None:
        """End the reply."""
        ...

    def failed(self, error: DynamoError) -> None:
        """End the reply with an error."""
        ...

    @property
    def writable(self) -> bool:
        """Whether the client keeps up."""
        ...


class SilentWriter:
    """Writer of a reply that is over."""

    writable = True

    def text(self, choice: int, text: str, logprobs: Sequence[TokenLogprob]) -> None:
        """Drop it."""

    def reasoning(self, choice: int, text: str) -> None:
        """Drop it."""

    def call_start(self, choice: int, index: int, name: str) -> None:
        """Drop it."""

    def call_arguments(self, choice: int, text: str) -> None:
        """Drop it."""

    def call_end(self, choice: int, *, complete: bool) -> None:
        """Drop it."""

    def finish(self, choice: int, reason: str, stop: str | None) -> None:
        """Drop it."""

    def flush(self) -> None:
        """Do nothing."""

    def done(self, usage: Usage) -> None:
        """Drop it."""

    def failed(self, error: DynamoError) -> None:
        """Drop it."""
