"""What is sent to and read from the server, as records; unknown fields are ignored."""

from __future__ import annotations

from typing import Any

import msgspec

from dynamo_core.errors import BackendProtocolError
from dynamo_core.requests import TokenLogprob, TopLogprob

TOKEN_PREFIX = "token_id:"
MAX_EVENT_BYTES = 1 << 24


class ServedModel(msgspec.Struct, frozen=True):
    """One entry of ``/v1/models``."""

    id: str
    root: str | None = None
    max_model_len: int | None = None


class ModelList(msgspec.Struct, frozen=True):
    """Answer of ``/v1/models``."""

    data: list[ServedModel] = []


class Logprobs(msgspec.Struct, frozen=True):
    """Log-probabilities in the completions form."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None


class Choice(msgspec.Struct, frozen=True):
    """New output of one choice."""

    index: int = 0
    text: str | None = None
    token_ids: list[int] | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class PromptDetails(msgspec.Struct, frozen=True):
    """Parts of the prompt's token count."""

    cached_tokens: int | None = None


class UsageCounts(msgspec.Struct, frozen=True):
    """Token counts of the server."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that came from its cache."""
        details = self.prompt_tokens_details
        return details.cached_tokens or 0 if details is not None else 0


class Completion(msgspec.Struct, frozen=True):
    """One event of a completion stream, or a whole completion."""

    choices: list[Choice] = []
    usage: UsageCounts | None = None
    error: Any = None


COMPLETION = msgspec.json.Decoder(Completion)
MODEL_LIST = msgspec.json.Decoder(ModelList)


def decode_completion(data: bytes) -> Completion:
    """Read one event.

    Raises:
        BackendProtocolError: if it is not a completion.
    """
    try:
        return COMPLETION.decode(data)
    except msgspec.MsgspecError as error:
        raise BackendProtocolError(f"the server's completion event cannot be read: {error}") from error


class SseDecoder:
    """Cuts a byte stream into the data of server-sent events."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """Return the data of the events that became complete.

        Raises:
            BackendProtocolError: if one event grows beyond ``MAX_EVENT_BYTES``.
        """
        *lines, self._rest = (self._rest + piece).split(b"\n")
        events: list[bytes] = []
        for line in lines:
            text = line.rstrip(b"\r")
            if text.startswith(b"data:"):
                self._data.append(text[5:].removeprefix(b" "))
            elif not text and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        if len(self._rest) + sum(map(len, self._data)) > MAX_EVENT_BYTES:
            raise BackendProtocolError(f"one event of the server exceeds {MAX_EVENT_BYTES} bytes")
        return events


def token_of(text: str) -> int | None:
    """Return the id in ``token_id:N``; None for any other text."""
    number = text.removeprefix(TOKEN_PREFIX)
    return int(number) if number != text and number.isdecimal() else None


def token_logprobs(given: Logprobs | None) -> tuple[TokenLogprob, ...]:
    """Return log-probabilities by token id.

    Raises:
        BackendProtocolError: if the server names a token by its text, which need not be unique.
    """
    if given is None:
        return ()
    tops = given.top_logprobs or [None] * len(given.tokens)
    return tuple(
        TokenLogprob(
            _required_token(token),
            0.0 if value is None else value,
            tuple(
                TopLogprob(_required_token(name), chance)
                for name, chance in sorted((top or {}).items(), key=lambda item: -item[1])
            ),
        )
        for token, value, top in zip(given.tokens, given.token_logprobs, tops, strict=True)
    )


def _required_token(text: str) -> int:
    token = token_of(text)
    if token is None:
        raise BackendProtocolError(f"the server names the token {text!r} by its text, expected {TOKEN_PREFIX}N")
    return token
