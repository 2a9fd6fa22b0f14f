"""Replies in token ids, whole or streamed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from dynamo_core.enums import FinishReason
from dynamo_core.errors import DynamoError
from dynamo_core.requests import TokenLogprob, Usage
from dynamo_frontend._http.response import HttpResponse
from dynamo_frontend._openai.logprobs import LogprobFormat
from dynamo_frontend._openai.stream import JSON, ReplyHead, SseWriter, StreamUsage, send_error
from dynamo_frontend._openai.usage import usage_object
from dynamo_frontend._reply import FINISH_NAMES, Reply
from dynamo_frontend._writer import SilentWriter

_encode = msgspec.json.encode


class TokenReply(Reply):
    """A reply whose accepted tokens go out as they are: no text is made of them.

    Its writer is a ``TokenWhole`` or a ``TokenStream``; once it is over, what still comes is dropped.
    """

    def take(self, choice: int, token_ids: list[int], logprobs: Sequence[TokenLogprob]) -> int | None:
        """Take new tokens of a choice."""
        writer = self.writer
        if isinstance(writer, TokenWhole | TokenStream):
            writer.tokens(choice, token_ids, logprobs)
        return None

    def finish_choice(self, choice: int, reason: FinishReason) -> None:
        """End a choice."""
        self.writer.finish(choice, FINISH_NAMES.get(reason, "stop"), None)


@dataclass(slots=True)
class _Choice:
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    finish_reason: str = ""


class TokenWhole(SilentWriter):
    """All token ids in one object.

    Args:
        response: Where to.
        head: Shared values.
        choices: How many.
        logprobs: How to show log-probabilities; None if not asked for.
    """

    def __init__(self, response: HttpResponse, head: ReplyHead, choices: int, logprobs: LogprobFormat | None) -> None:
        self._response = response
        self._head = head
        self._choices = [_Choice() for _ in range(choices)]
        self._logprobs = logprobs

    def tokens(self, choice: int, token_ids: list[int], logprobs: Sequence[TokenLogprob]) -> None:
        """Gather tokens."""
        state = self._choices[choice]
        state.token_ids.extend(token_ids)
        state.logprobs.extend(logprobs)

    def finish(self, choice: int, reason: str, stop: str | None) -> None:
        """Note the end of a choice."""
        self._choices[choice].finish_reason = reason

    def done(self, usage: Usage) -> None:
        """Send the reply."""
        head = self._head
        choices = [
            {
                "index": index,
                "token_ids": state.token_ids,
                "logprobs": _shown(self._logprobs, state.logprobs),
                "finish_reason": state.finish_reason,
            }
            for index, state in enumerate(self._choices)
        ]
        body = {"request_id": head.reply_id, "model": head.model, "choices": choices, "usage": usage_object(usage)}
        self._response.send(200, _encode(body), JSON, head.headers())

    def failed(self, error: DynamoError) -> None:
        """Send the error instead."""
        send_error(self._response, error, self._head)


class TokenStream(SseWriter, SilentWriter):
    """Events with the new token ids of one choice each."""

    def __init__(
        self, response: HttpResponse, head: ReplyHead, usage: StreamUsage, logprobs: LogprobFormat | None
    ) -> None:
        super().__init__(response, head, usage)
        self._event_head = b"data: " + _encode({"request_id": head.reply_id, "model": head.model})[:-1]
        self._logprobs = logprobs

    def tokens(self, choice: int, token_ids: list[int], logprobs: Sequence[TokenLogprob]) -> None:
        """Add tokens."""
        self._add(choice, token_ids, _shown(self._logprobs, logprobs), None)

    def finish(self, choice: int, reason: str, stop: str | None) -> None:
        """Add the end of a choice."""
        self._add(choice, [], None, reason)

    def _add(self, choice: int, token_ids: list[int], logprobs: dict[str, Any] | None, reason: str | None) -> None:
        entry = {"index": choice, "token_ids": token_ids, "logprobs": logprobs, "finish_reason": reason}
        self._pieces.append(self._event_head + b',"choices":[' + _encode(entry) + b"]" + self._tail())


def _shown(form: LogprobFormat | None, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    return {"content": form.chat(entries), "refusal": None} if form is not None else None
