"""Program of the frontend benchmark: the simplest engine with an OpenAI-compatible API, for gateways to stand before.

``python http_upstream.py MODEL`` listens on a free port of 127.0.0.1 and prints it. Every answer is made of bytes that
are ready beforehand: whole, or ``max_tokens`` events, one a turn of the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from typing import cast

import httptools


class Engine(asyncio.Protocol):
    """One connection."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._target = b""
        self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Feed the parser."""
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        """Forget the last request."""
        self._body = b""

    def on_url(self, url: bytes) -> None:
        """Keep the path."""
        self._target = url

    def on_body(self, body: bytes) -> None:
        """Keep the body."""
        self._body += body

    def on_message_complete(self) -> None:
        """Answer."""
        if self._target != b"/v1/chat/completions":
            self._send({"object": "list", "data": [{"id": self._model, "object": "model"}]})
            return
        fields = json.loads(self._body)
        if fields.get("stream"):
            asyncio.get_running_loop().create_task(self._stream(int(fields.get("max_tokens") or 16)))
            return
        message = {"role": "assistant", "content": "one two three four"}
        choices = [{"index": 0, "message": message, "finish_reason": "length"}]
        tokens = int(fields.get("max_tokens") or 16)
        usage = {"prompt_tokens": 20, "completion_tokens": tokens, "total_tokens": 20 + tokens}
        self._send(
            {
                "id": "x",
                "object": "chat.completion",
                "created": 1,
                "model": self._model,
                "choices": choices,
                "usage": usage,
            }
        )

    def _send(self, answer: object) -> None:
        body = json.dumps(answer).encode()
        self._write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        )

    async def _stream(self, tokens: int) -> None:
        self._write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        choice = {"index": 0, "delta": {"content": " token"}, "finish_reason": None}
        event = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": self._model, "choices": [choice]}
        data = f"data: {json.dumps(event, separators=(',', ':'))}\n\n".encode()
        chunk = b"%x\r\n%b\r\n" % (len(data), data)
        for _ in range(tokens):
            self._write(chunk)
            await asyncio.sleep(0)
        self._write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    def _write(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(data)


async def main(model: str) -> None:
    """Serve until ended."""
    server = await asyncio.get_running_loop().create_server(lambda: Engine(model), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    with contextlib.suppress(ImportError):
        import uvloop

        uvloop.install()
    asyncio.run(main(sys.argv[1]))
