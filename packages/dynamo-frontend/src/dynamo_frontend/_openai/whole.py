"""Replies that are sent whole."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from dynamo_core.errors import DynamoError
from dynamo_core.requests import TokenLogprob, Usage
from dynamo_frontend._http.response import HttpResponse
from dynamo_frontend._openai.logprobs import LogprobFormat
from dynamo_frontend._openai.stream import JSON, ReplyHead, send_error, tool_call_id
from dynamo_frontend._openai.usage import usage_object


@dataclass(slots=True)
class _Call:
    """A tool call while it grows."""

    name: str
    arguments: list[str] = field(default_factory=list[str])


@dataclass(slots=True)
class _Choice:
    """What one choice has gathered."""

    text: list[str] = field(default_factory=list[str])
    reasoning: list[str] = field(default_factory=list[str])
    calls: list[_Call] = field(default_factory=list[_Call])
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    finish_reason: str = ""


class WholeWriter(abc.ABC):
    """Gathers a reply and sends it once it is complete."""

    object_name = ""

    def __init__(self, response: HttpResponse, head: ReplyHead, choices: int, logprobs: LogprobFormat | None) -> None:
        self._response = response
        self._head = head
        self._choices = [_Choice() for _ in range(choices)]
        self._logprobs = logprobs

    @property
    def writable(self) -> bool:
        """A whole reply is bounded by its tokens, so the client's pace does not matter."""
        return True

    def text(self, choice: int, text: str, logprobs: Sequence[TokenLogprob]) -> None:
        """Gather text."""
        state = self._choices[choice]
        state.text.append(text)
        state.logprobs.extend(logprobs)

    def reasoning(self, choice: int, text: str) -> None:
        """Gather reasoning."""
        self._choices[choice].reasoning.append(text)

    def call_start(self, choice: int, index: int, name: str) -> None:
        """Begin a call."""
        self._choices[choice].calls.append(_Call(name))

    def call_arguments(self, choice: int, text: str) -> None:
        """Gather a call's arguments."""
        self._choices[choice].calls[-1].arguments.append(text)

    def call_end(self, choice: int, *, complete: bool) -> None:
        """Do nothing: this form does not mark a call that was cut off."""
        return

    def finish(self, choice: int, reason: str, stop: str | None) -> None:
        """Note the end of a choice."""
        self._choices[choice].finish_reason = reason

    def flush(self) -> None:
        """Do nothing: a whole reply leaves at its end."""
        return

    def done(self, usage: Usage) -> None:
        """Send the reply."""
        head = self._head
        body = {
            "id": head.reply_id,
            "object": self.object_name,
            "created": head.created_s,
            "model": head.model,
            "choices": [self._choice(index, state) for index, state in enumerate(self._choices)],
            "usage": usage_object(usage),
        }
        self._response.send(200, msgspec.json.encode(body), JSON, head.headers())

    def failed(self, error: DynamoError) -> None:
        """Send the error instead."""
        send_error(self._response, error, self._head)

    @abc.abstractmethod
    def _choice(self, index: int, state: _Choice) -> dict[str, Any]:
        """Return one choice's object."""


class ChatWhole(WholeWriter):
    """A ``chat.completion`` object."""

    object_name = "chat.completion"

    def _choice(self, index: int, state: _Choice) -> dict[str, Any]:
        text = "".join(state.text)
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not state.calls else None}
        if state.reasoning:
            message["reasoning_content"] = "".join(state.reasoning)
        if state.calls:
            message["tool_calls"] = [
                {
                    "id": tool_call_id(self._head.reply_id, index, number),
                    "type": "function",
                    "function": {"name": call.name, "arguments": "".join(call.arguments)},
                }
                for number, call in enumerate(state.calls)
            ]
        shown = None
        if self._logprobs is not None:
            shown = {"content": self._logprobs.chat(state.logprobs), "refusal": None}
        return {"index": index, "message": message, "logprobs": shown, "finish_reason": state.finish_reason}


class CompletionWhole(WholeWriter):
    """A ``text_completion`` object.

    Args:
        response: Where to.
        head: Shared values.
        choices: How many.
        logprobs: How to show log-probabilities; None if not asked for.
        echoes: Prompt text to begin each choice with; empty without ``echo``.
    """

    object_name = "text_completion"

    def __init__(
        self,
        response: HttpResponse,
        head: ReplyHead,
        choices: int,
        logprobs: LogprobFormat | None,
        echoes: Sequence[str] = (),
    ) -> None:
        super().__init__(response, head, choices, logprobs)
        self._echoes = echoes

    def _choice(self, index: int, state: _Choice) -> dict[str, Any]:
        text = (self._echoes[index] if self._echoes else "") + "".join(state.text)
        shown = self._logprobs.completion(state.logprobs, 0)[0] if self._logprobs is not None else None
        return {"index": index, "text": text, "logprobs": shown, "finish_reason": state.finish_reason}
