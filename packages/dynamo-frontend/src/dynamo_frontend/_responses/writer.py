"""Replies of the responses API: output items, whole or as the API's sequence of events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from dynamo_core.errors import DynamoError
from dynamo_core.requests import TokenLogprob, Usage
from dynamo_frontend._errors import error_object
from dynamo_frontend._http.response import HttpResponse
from dynamo_frontend._openai.stream import EVENT_STREAM, JSON, ReplyHead, send_error

_encode = msgspec.json.encode
_PARTS = {"message": "output_text", "reasoning": "reasoning_text"}


@dataclass(slots=True)
class _Item:
    """One output item while it grows."""

    kind: str
    item_id: str
    pieces: list[str] = field(default_factory=list[str])
    call_id: str = ""
    name: str = ""
    status: str = "in_progress"

    def shown(self) -> dict[str, Any]:
        """Return the item as the API shows it."""
        head = {"id": self.item_id, "type": self.kind, "status": self.status}
        if self.kind == "function_call":
            return {**head, "call_id": self.call_id, "name": self.name, "arguments": "".join(self.pieces)}
        content = [self.part()] if self.status != "in_progress" else []
        if self.kind == "reasoning":
            return {**head, "summary": [], "content": content}
        return {**head, "role": "assistant", "content": content}

    def part(self) -> dict[str, Any]:
        """Return the item's only content part."""
        part: dict[str, Any] = {"type": _PARTS[self.kind], "text": "".join(self.pieces)}
        return part if self.kind == "reasoning" else {**part, "annotations": [], "logprobs": []}


class ResponseWriter:
    """A response, whole or streamed.

    Args:
        response: Where to.
        head: Shared values.
        echo: Fields of the request that every response object repeats.
        stream: Whether events are sent.
    """

    def __init__(self, response: HttpResponse, head: ReplyHead, echo: dict[str, Any], *, stream: bool) -> None:
        self._response = response
        self._head = head
        self._echo = echo
        self._stream = stream
        self._items: list[_Item] = []
        self._open = False
        self._begun = False
        self._reason = "stop"
        self._sequence = 0
        self._out: list[bytes] = []
        if stream and head.keep_alive_s:
            response.on_quiet(head.keep_alive_s, self._keep_alive)

    @property
    def writable(self) -> bool:
        """Whether the client keeps up; a whole reply is bounded by its tokens."""
        return not self._stream or self._response.writable

    def text(self, choice: int, text: str, logprobs: Sequence[TokenLogprob]) -> None:
        """Add text."""
        if text:
            self._grow("message", text)

    def reasoning(self, choice: int, text: str) -> None:
        """Add reasoning."""
        self._grow("reasoning", text)

    def call_start(self, choice: int, index: int, name: str) -> None:
        """Begin a function call."""
        self._close()
        self._add("function_call", name)

    def call_arguments(self, choice: int, text: str) -> None:
        """Add to the function call's arguments."""
        self._items[-1].pieces.append(text)
        self._event("response.function_call_arguments.delta", {**self._item_place(), "delta": text})

    def call_end(self, choice: int, *, complete: bool) -> None:
        """End the function call; one that was cut off is shown as incomplete."""
        self._close("completed" if complete else "incomplete")

    def finish(self, choice: int, reason: str, stop: str | None) -> None:
        """Note why it ended."""
        self._reason = reason

    def flush(self) -> None:
        """Send the events written so far in one piece."""
        if self._out:
            if not self._response.started:
                self._response.start(200, EVENT_STREAM, self._head.headers())
            self._response.write(b"".join(self._out))
            self._out.clear()

    def done(self, usage: Usage) -> None:
        """Send the end, or the whole response."""
        self._begin()
        self._close()
        cut = self._reason in ("length", "content_filter")
        final = self._object("incomplete" if cut else "completed", usage)
        if not self._stream:
            self._response.send(200, _encode(final), JSON, self._head.headers())
            return
        self._event("response.incomplete" if cut else "response.completed", {"response": final})
        self.flush()
        self._response.end()

    def failed(self, error: DynamoError) -> None:
        """Send the error: as a status if nothing was sent yet, else as an event that ends the stream."""
        if not self._response.started and not self._out:
            send_error(self._response, error, self._head)
            return
        shown = error_object(error)["error"]
        failure = {**self._object("failed", None), "error": {"code": "server_error", "message": shown["message"]}}
        self._event("response.failed", {"response": failure})
        self.flush()
        self._response.end()

    def _keep_alive(self) -> None:
        self._begin()
        self.flush()
        self._response.write(b": keep-alive\n\n")

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            started = self._object("in_progress", None)
            self._event("response.created", {"response": started})
            self._event("response.in_progress", {"response": started})

    def _grow(self, kind: str, text: str) -> None:
        if not self._open or self._items[-1].kind != kind:
            self._close()
            item = self._add(kind)
            self._event("response.content_part.added", {**self._place(), "part": {**item.part()}})
        self._items[-1].pieces.append(text)
        extra = {"logprobs": []} if kind == "message" else {}
        self._event(f"response.{_PARTS[kind]}.delta", {**self._place(), "delta": text, **extra})

    def _add(self, kind: str, name: str = "") -> _Item:
        self._begin()
        number = len(self._items)
        suffix = self._head.reply_id.removeprefix("resp_")
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[kind]
        item = _Item(kind, f"{prefix}_{suffix}_{number}", call_id=f"call_{suffix}_{number}", name=name)
        self._items.append(item)
        self._open = True
        self._event("response.output_item.added", {"output_index": number, "item": item.shown()})
        return item

    def _close(self, status: str = "completed") -> None:
        if not self._open:
            return
        self._open = False
        item = self._items[-1]
        item.status = status
        if item.kind == "function_call":
            done = {**self._item_place(), "name": item.name, "arguments": "".join(item.pieces)}
            self._event("response.function_call_arguments.done", done)
        else:
            part = item.part()
            extra = {"logprobs": []} if item.kind == "message" else {}
            self._event(f"response.{_PARTS[item.kind]}.done", {**self._place(), "text": part["text"], **extra})
            self._event("response.content_part.done", {**self._place(), "part": part})
        done = {"output_index": len(self._items) - 1, "item": item.shown()}
        self._event("response.output_item.done", done)

    def _place(self) -> dict[str, Any]:
        return {**self._item_place(), "content_index": 0}

    def _item_place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1].item_id, "output_index": len(self._items) - 1}

    def _event(self, kind: str, data: dict[str, Any]) -> None:
        if self._stream:
            body = _encode({"type": kind, "sequence_number": self._sequence, **data})
            self._out.append(b"event: " + kind.encode() + b"\ndata: " + body + b"\n\n")
            self._sequence += 1

    def _object(self, status: str, usage: Usage | None) -> dict[str, Any]:
        cut = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(self._reason)
        return {
            "id": self._head.reply_id,
            "object": "response",
            "created_at": self._head.created_s,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": cut} if status == "incomplete" else None,
            "model": self._head.model,
            "output": [item.shown() for item in self._items],
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            "usage": _usage(usage) if usage is not None else None,
            **self._echo,
        }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }
