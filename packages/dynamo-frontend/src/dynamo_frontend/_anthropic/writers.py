"""Replies of the messages API: content blocks, whole or as the API's sequence of events."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from dynamo_core.errors import DynamoError, ErrorClass
from dynamo_core.requests import TokenLogprob, Usage
from dynamo_frontend._errors import error_headers, http_status
from dynamo_frontend._http.response import HttpResponse
from dynamo_frontend._openai.stream import EVENT_STREAM, JSON, ReplyHead

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}
_ERROR_TYPES = {
    ErrorClass.INVALID_REQUEST: "invalid_request_error",
    ErrorClass.UNSUPPORTED_MEDIA: "invalid_request_error",
    ErrorClass.UNAUTHENTICATED: "authentication_error",
    ErrorClass.PERMISSION_DENIED: "permission_error",
    ErrorClass.NOT_FOUND: "not_found_error",
    ErrorClass.PAYLOAD_TOO_LARGE: "request_too_large",
    ErrorClass.RATE_LIMITED: "rate_limit_error",
    ErrorClass.CAPACITY_EXHAUSTED: "overloaded_error",
    ErrorClass.DEADLINE_EXCEEDED: "timeout_error",
}
_encode = msgspec.json.encode


def anthropic_error(error: DynamoError) -> bytes:
    """Return the error in this API's form."""
    kind = _ERROR_TYPES.get(error.error_class, "api_error")
    return _encode({"type": "error", "error": {"type": kind, "message": error.message}})


def send_anthropic_error(response: HttpResponse, error: DynamoError, status: int, headers: dict[str, str]) -> None:
    """Send an error as the whole response."""
    response.send(status, anthropic_error(error), JSON, {**headers, **error_headers(error)})


class MessageWriter:
    """A whole ``message``."""

    def __init__(self, response: HttpResponse, head: ReplyHead) -> None:
        self._response = response
        self._head = head
        self._blocks: list[dict[str, Any]] = []
        self._arguments: list[str] = []
        self._reason: str = "end_turn"
        self._stop: str | None = None

    @property
    def writable(self) -> bool:
        """A whole reply is bounded by its tokens."""
        return True

    def text(self, choice: int, text: str, logprobs: Sequence[TokenLogprob]) -> None:
        """Gather text."""
        self._add("text", text)

    def reasoning(self, choice: int, text: str) -> None:
        """Gather thinking."""
        self._add("thinking", text)

    def call_start(self, choice: int, index: int, name: str) -> None:
        """Begin a tool use."""
        self._blocks.append(tool_use(self._head, index, name))
        self._arguments = []

    def call_arguments(self, choice: int, text: str) -> None:
        """Gather a tool use's input."""
        self._arguments.append(text)

    def call_end(self, choice: int, *, complete: bool) -> None:
        """Read the input; what was cut off is no JSON, and is shown as the text it is."""
        self._blocks[-1]["input"] = _input("".join(self._arguments))

    def finish(self, choice: int, reason: str, stop: str | None) -> None:
        """Note why it ended."""
        self._reason, self._stop = stop_reason(reason, stop), stop

    def flush(self) -> None:
        """Do nothing: a whole reply leaves at its end."""
        return

    def done(self, usage: Usage) -> None:
        """Send the message."""
        body = {
            **message_object(self._head, usage),
            "content": self._blocks,
            "stop_reason": self._reason,
            "stop_sequence": self._stop,
        }
        self._response.send(200, _encode(body), JSON, self._head.headers())

    def failed(self, error: DynamoError) -> None:
        """Send the error instead."""
        status = http_status(error, self._head.overload_status)
        send_anthropic_error(self._response, error, status, self._head.headers())

    def _add(self, kind: str, text: str) -> None:
        if not text:
            return
        if not self._blocks or self._blocks[-1]["type"] != kind:
            self._blocks.append({"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {}))
        self._blocks[-1][kind] += text


class MessageStream:
    """The API's events: ``message_start``, blocks one after the other, ``message_delta``, ``message_stop``."""

    def __init__(self, response: HttpResponse, head: ReplyHead, current: Callable[[], Usage]) -> None:
        self._response = response
        self._head = head
        self._current = current
        self._pieces: list[bytes] = []
        self._index = -1
        self._kind = ""
        self._delta_head = b""
        if head.keep_alive_s:
            response.on_quiet(head.keep_alive_s, self._keep_alive)
        self._end: dict[str, Any] = {"stop_reason": "end_turn", "stop_sequence": None}

    @property
    def writable(self) -> bool:
        """Whether the client keeps up."""
        return self._response.writable

    def text(self, choice: int, text: str, logprobs: Sequence[TokenLogprob]) -> None:
        """Add text."""
        if text:
            self._block("text", {"type": "text", "text": ""}, b'{"type":"text_delta","text":')
            self._pieces.append(self._delta_head + _encode(text) + b"}}\n\n")

    def reasoning(self, choice: int, text: str) -> None:
        """Add thinking."""
        block = {"type": "thinking", "thinking": "", "signature": ""}
        self._block("thinking", block, b'{"type":"thinking_delta","thinking":')
        self._pieces.append(self._delta_head + _encode(text) + b"}}\n\n")

    def call_start(self, choice: int, index: int, name: str) -> None:
        """Begin a tool use as a block of its own."""
        self._close_block()
        self._block("tool_use", tool_use(self._head, index, name), b'{"type":"input_json_delta","partial_json":')

    def call_arguments(self, choice: int, text: str) -> None:
        """Add to the tool use's input."""
        self._pieces.append(self._delta_head + _encode(text) + b"}}\n\n")

    def call_end(self, choice: int, *, complete: bool) -> None:
        """End the tool use's block."""
        self._close_block()

    def finish(self, choice: int, reason: str, stop: str | None) -> None:
        """Note why it ended."""
        self._end = {"stop_reason": stop_reason(reason, stop), "stop_sequence": stop}

    def flush(self) -> None:
        """Send the events written so far in one piece."""
        if self._pieces:
            if not self._response.started:
                self._response.start(200, EVENT_STREAM, self._head.headers())
            self._response.write(b"".join(self._pieces))
            self._pieces.clear()

    def done(self, usage: Usage) -> None:
        """Send the end."""
        self._begin()
        self._close_block()
        self._event({"type": "message_delta", "delta": self._end, "usage": anthropic_usage(usage)})
        self._event({"type": "message_stop"})
        self.flush()
        self._response.end()

    def failed(self, error: DynamoError) -> None:
        """Send the error: as a status if nothing was sent yet, else as an event that ends the stream."""
        if not self._response.started and not self._pieces:
            status = http_status(error, self._head.overload_status)
            send_anthropic_error(self._response, error, status, self._head.headers())
            return
        self._pieces.append(b"event: error\ndata: " + anthropic_error(error) + b"\n\n")
        self.flush()
        self._response.end()

    def _keep_alive(self) -> None:
        self._begin()
        self._event({"type": "ping"})
        self.flush()

    def _begin(self) -> None:
        if self._index < 0:
            self._index = 0
            start = {
                **message_object(self._head, Usage(self._current().prompt_tokens)),
                "content": [],
                "stop_reason": None,
                "stop_sequence": None,
            }
            self._event({"type": "message_start", "message": start})

    def _block(self, kind: str, block: dict[str, Any], delta: bytes) -> None:
        if self._kind == kind:
            return
        self._begin()
        self._close_block()
        self._kind = kind
        self._event({"type": "content_block_start", "index": self._index, "content_block": block})
        head = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":' % self._index
        self._delta_head = head + delta

    def _close_block(self) -> None:
        if self._kind:
            self._event({"type": "content_block_stop", "index": self._index})
            self._index += 1
            self._kind = ""

    def _event(self, data: dict[str, Any]) -> None:
        self._pieces.append(b"event: " + str(data["type"]).encode() + b"\ndata: " + _encode(data) + b"\n\n")


def message_object(head: ReplyHead, usage: Usage) -> dict[str, Any]:
    """Return what a message has in common, whole or at its start."""
    common = {"id": head.reply_id, "type": "message", "role": "assistant", "model": head.model}
    return {**common, "usage": anthropic_usage(usage)}


def anthropic_usage(usage: Usage) -> dict[str, int]:
    """Return the accounting in this API's form, where input tokens do not count those read from a cache."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def stop_reason(reason: str, stop: str | None) -> str:
    """Return why a message ended, in this API's words."""
    return "stop_sequence" if stop is not None and reason == "stop" else _STOP_REASONS.get(reason, "end_turn")


def tool_use(head: ReplyHead, index: int, name: str) -> dict[str, Any]:
    """Return a tool-use block whose input is yet to come."""
    return {"type": "tool_use", "id": f"toolu_{head.reply_id.removeprefix('msg_')}_{index}", "name": name, "input": {}}


def _input(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return {"arguments": arguments}
