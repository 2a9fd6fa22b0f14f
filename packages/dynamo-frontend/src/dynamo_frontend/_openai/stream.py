"""Server-sent events of a streamed reply, from templates encoded once per request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from dynamo_core.errors import DynamoError
from dynamo_core.requests import TokenLogprob, Usage
from dynamo_frontend._errors import error_body, error_headers, http_status
from dynamo_frontend._http.response import HttpResponse
from dynamo_frontend._openai.logprobs import LogprobFormat
from dynamo_frontend._openai.usage import usage_object

EVENT_STREAM = "text/event-stream; charset=utf-8"
JSON = "application/json"
_encode = msgspec.json.encode
_DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class ReplyHead:
    """What every reply of a request shares.

    Attributes:
        reply_id: ``id`` of the reply.
        created_s: Unix time.
        model: Name the client used.
        headers: Returns the response headers; called when the response starts.
        overload_status: Status when all workers are busy.
        keep_alive_s: Seconds of silence after which a stream sends a sign of life; 0 for never.
    """

    reply_id: str
    created_s: int
    model: str
    headers: Callable[[], dict[str, str]]
    overload_status: int = 529
    keep_alive_s: float = 0.0


@dataclass(slots=True)
class StreamUsage:
    """Which usage a stream carries: at its end, and with every chunk."""

    final: bool = False
    continuous: bool = False
    current: Callable[[], Usage] = Usage


class SseWriter:
    """What the streamed forms share: start on first output, events, usage, the end."""

    object_name = ""

    def __init__(self, response: HttpResponse, head: ReplyHead, usage: StreamUsage) -> None:
        self._response = response
        self._head = head
        self._usage = usage
        self._pieces: list[bytes] = []
        common = {"id": head.reply_id, "object": self.object_name, "created": head.created_s, "model": head.model}
        # b'data: {"id":...,"model":"m"' without the closing brace; what varies is spliced in behind it.
        self._event_head = b"data: " + _encode(common)[:-1]
        if head.keep_alive_s:
            response.on_quiet(head.keep_alive_s, self._keep_alive)
        self._null_usage = b',"usage":null' if usage.final else b""

    @property
    def writable(self) -> bool:
        """Whether the client keeps up."""
        return self._response.writable

    def flush(self) -> None:
        """Send the events written so far in one piece."""
        pieces = self._pieces
        if pieces:
            self._start()
            self._response.write(pieces[0] if len(pieces) == 1 else b"".join(pieces))
            pieces.clear()

    def done(self, usage: Usage) -> None:
        """Send the usage, if asked for, and the end."""
        if self._usage.final:
            self._pieces.append(self._event_head + b',"choices":[],"usage":' + _encode(usage_object(usage)) + b"}\n\n")
        self._pieces.append(_DONE)
        self.flush()
        self._response.end()

    def failed(self, error: DynamoError) -> None:
        """Send the error: as a status if nothing was sent yet, else as an event that ends the stream."""
        if not self._response.started and not self._pieces:
            send_error(self._response, error, self._head)
            return
        self._pieces.append(b"event: error\ndata: " + error_body(error) + b"\n\n")
        self.flush()
        self._response.end()

    def _keep_alive(self) -> None:
        self._start()
        self._response.write(b": keep-alive\n\n")

    def _start(self) -> None:
        if not self._response.started:
            self._response.start(200, EVENT_STREAM, self._head.headers())

    def _tail(self) -> bytes:
        """Return what follows the choices of a chunk."""
        if self._usage.continuous:
            return b',"usage":' + _encode(usage_object(self._usage.current())) + b"}\n\n"
        return self._null_usage + b"}\n\n"


class ChatStream(SseWriter):
    """``chat.completion.chunk`` events."""

    object_name = "chat.completion.chunk"

    def __init__(
        self, response: HttpResponse, head: ReplyHead, usage: StreamUsage, logprobs: LogprobFormat | None
    ) -> None:
        super().__init__(response, head, usage)
        self._logprobs = logprobs
        self._opened: dict[int, bytes] = {}
        self._calls: dict[int, int] = {}
        self._plain_tail = b',"logprobs":null,"finish_reason":null}]' + self._null_usage + b"}\n\n"

    def text(self, choice: int, text: str, logprobs: Sequence[TokenLogprob]) -> None:
        """Add a content delta."""
        head = self._opened.get(choice) or self._open(choice)
        if not self._usage.continuous and self._logprobs is None:
            self._pieces.append(head + b'{"content":' + _encode(text) + b"}" + self._plain_tail)
            return
        shown = b"null"
        if self._logprobs is not None and logprobs:
            shown = _encode({"content": self._logprobs.chat(logprobs), "refusal": None})
        self._delta(head, {"content": text}, shown)

    def reasoning(self, choice: int, text: str) -> None:
        """Add a reasoning delta."""
        self._delta(self._opened.get(choice) or self._open(choice), {"reasoning_content": text})

    def call_start(self, choice: int, index: int, name: str) -> None:
        """Begin a tool call: its name comes once, its arguments follow as they are made."""
        self._calls[choice] = index
        entry = {"index": index, "id": tool_call_id(self._head.reply_id, choice, index), "type": "function"}
        delta = {"tool_calls": [{**entry, "function": {"name": name, "arguments": ""}}]}
        self._delta(self._opened.get(choice) or self._open(choice), delta)

    def call_arguments(self, choice: int, text: str) -> None:
        """Add to the open call's arguments."""
        delta = {"tool_calls": [{"index": self._calls[choice], "function": {"arguments": text}}]}
        self._delta(self._opened[choice], delta)

    def call_end(self, choice: int, *, complete: bool) -> None:
        """Do nothing: this form does not mark the end of a call."""

    def finish(self, choice: int, reason: str, stop: str | None) -> None:
        """Add the end of a choice."""
        head = self._opened.get(choice) or self._open(choice)
        self._pieces.append(head + b'{},"logprobs":null,"finish_reason":' + _encode(reason) + b"}]" + self._tail())

    def _open(self, choice: int) -> bytes:
        head = self._opened[choice] = self._event_head + b',"choices":[{"index":%d,"delta":' % choice
        self._delta(head, {"role": "assistant", "content": ""})
        return head

    def _delta(self, head: bytes, delta: dict[str, Any], logprobs: bytes = b"null") -> None:
        middle = b',"logprobs":' + logprobs + b',"finish_reason":null}]'
        self._pieces.append(head + _encode(delta) + middle + self._tail())


class CompletionStream(SseWriter):
    """``text_completion`` events.

    Args:
        response: Where to.
        head: Shared values.
        usage: Which usage to send.
        logprobs: How to show log-probabilities; None if not asked for.
        echoes: Prompt text to begin each choice with; empty without ``echo``.
    """

    object_name = "text_completion"

    def __init__(
        self,
        response: HttpResponse,
        head: ReplyHead,
        usage: StreamUsage,
        logprobs: LogprobFormat | None,
        echoes: Sequence[str] = (),
    ) -> None:
        super().__init__(response, head, usage)
        self._logprobs = logprobs
        self._echoes = echoes
        self._begun: set[int] = set()
        self._offsets: dict[int, int] = {}
        self._plain_tail = b',"logprobs":null,"finish_reason":null}]' + self._null_usage + b"}\n\n"

    def text(self, choice: int, text: str, logprobs: Sequence[TokenLogprob]) -> None:
        """Add text."""
        head = self._choice_head(choice)
        if self._echoes and choice not in self._begun:
            self._begun.add(choice)
            text = self._echoes[choice] + text
        if not self._usage.continuous and self._logprobs is None:
            self._pieces.append(head + _encode(text) + self._plain_tail)
            return
        shown = b"null"
        if self._logprobs is not None and logprobs:
            arrays, self._offsets[choice] = self._logprobs.completion(logprobs, self._offsets.get(choice, 0))
            shown = _encode(arrays)
        self._pieces.append(head + _encode(text) + b',"logprobs":' + shown + b',"finish_reason":null}]' + self._tail())

    def reasoning(self, choice: int, text: str) -> None:
        """Completions have no reasoning of their own; it is text."""
        self.text(choice, text, ())

    def call_start(self, choice: int, index: int, name: str) -> None:
        """Do nothing: completions have no tool calls."""

    def call_arguments(self, choice: int, text: str) -> None:
        """Completions have no tool calls; what is written is text."""
        self.text(choice, text, ())

    def call_end(self, choice: int, *, complete: bool) -> None:
        """Do nothing: completions have no tool calls."""

    def finish(self, choice: int, reason: str, stop: str | None) -> None:
        """Add the end of a choice."""
        if self._echoes and choice not in self._begun:
            self.text(choice, "", ())
        head = self._choice_head(choice)
        self._pieces.append(head + b'"","logprobs":null,"finish_reason":' + _encode(reason) + b"}]" + self._tail())

    def _choice_head(self, choice: int) -> bytes:
        return self._event_head + b',"choices":[{"index":%d,"text":' % choice


def tool_call_id(reply_id: str, choice: int, index: int) -> str:
    """Return a call's id: the same whichever way the reply is sent."""
    return f"call_{reply_id.rpartition('-')[2]}_{choice}_{index}"


def send_error(response: HttpResponse, error: DynamoError, head: ReplyHead) -> None:
    """Send an error as the whole response."""
    headers = {**head.headers(), **error_headers(error)}
    response.send(http_status(error, head.overload_status), error_body(error), JSON, headers)
