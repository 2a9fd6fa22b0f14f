"""Program of the frontend benchmark: sends chat requests over kept connections and prints what it saw as JSON.

``python http_load.py URL MODEL MODE CONCURRENCY TOKENS``. It runs as a process of its own, so that its work is never
counted as the server's. Each line of input is a number of requests to send, and is answered by a line of figures.

Modes: ``requests`` are answered whole, ``stream`` and ``resumable`` in events, which a client can come back for or not.
``kserve`` sends a completion in the form of KServe's ``generate``. ``hold`` opens streams, reports that each has its
first event, and keeps them until its input ends. ``live`` asks for ``/live`` instead, and ``long`` sends prompts of so
many words as ``TOKENS`` says, no two of them equal: whether they are answered or refused for their length, the server
has read them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Callable
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

_CONTENT = "Tell me about the sea, its tides and its ships, please."


class Connection(asyncio.Protocol):
    """One kept connection with one request at a time.

    Attributes:
        events: Server-sent events of the response so far, as far as they carry a choice.
        answered: Done once the response, or with ``first_only`` its first body bytes, is here.
    """

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._first_only = False
        self.accepted: tuple[int, ...] = (200,)
        self.body = bytearray()
        self.events = 0
        self.answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail what waits."""
        if not self.answered.done():
            self.answered.set_exception(exc or ConnectionResetError("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        """Feed the parser."""
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        """Forget the last response."""
        self.body.clear()
        self.events = 0

    def on_body(self, body: bytes) -> None:
        """Count events by their common part; keep only what a check of the status needs."""
        self.events += body.count(b'"finish_reason"')
        if len(self.body) < 4096:
            self.body += body
        if self._first_only and not self.answered.done():
            self.answered.set_result(None)

    def on_message_complete(self) -> None:
        """Answer what waits."""
        status = self._parser.get_status_code()
        self._parser = httptools.HttpResponseParser(self)
        if self.answered.done():
            return
        if status in self.accepted:
            self.answered.set_result(None)
        else:
            self.answered.set_exception(RuntimeError(f"status {status}: {bytes(self.body[:500])!r}"))

    async def ask(self, request: bytes, *, first_only: bool = False) -> None:
        """Send a request and wait for its answer."""
        assert self._transport is not None
        self._first_only = first_only
        self.answered = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self.answered


def request_bytes(
    host: str, model: str, tokens: int, *, stream: bool, content: str = _CONTENT, headers: str = ""
) -> bytes:
    """Return a chat request that generates exactly so many tokens on an engine that ignores its end of text."""
    fields: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": stream,
    }
    return _post("/v1/chat/completions", host, fields, headers)


def kserve_bytes(host: str, model: str, tokens: int) -> bytes:
    """Return a completion of so many tokens in the form of KServe."""
    fields = {"text_input": _CONTENT, "parameters": {"max_tokens": tokens, "temperature": 0}}
    return _post(f"/v2/models/{model}/generate", host, fields)


def _post(path: str, host: str, fields: dict[str, Any], headers: str = "") -> bytes:
    body = json.dumps(fields).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n{headers}"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body


def long_requests(host: str, model: str, words: int) -> Callable[[], bytes]:
    """Return what makes chat requests with prompts of so many words, no two of them equal."""
    numbers = itertools.count()
    text = " ".join(f"word{index % 997}" for index in range(words))

    def make() -> bytes:
        return request_bytes(host, model, 4, stream=False, content=f"{next(numbers)} {text}")

    return make


async def load(connections: list[Connection], request: Callable[[], bytes], count: int) -> dict[str, float]:
    """Send so many requests, each connection its next as soon as the last is answered."""
    left = count
    times: list[float] = []
    events = 0

    async def work(connection: Connection) -> None:
        nonlocal left, events
        while left > 0:
            left -= 1
            message = request()
            started = time.perf_counter()
            await connection.ask(message)
            times.append(time.perf_counter() - started)
            events += connection.events

    began = time.perf_counter()
    await asyncio.gather(*map(work, connections))
    wall = time.perf_counter() - began
    times.sort()
    p50, p99 = times[len(times) // 2], times[int(len(times) * 0.99)]
    shown = {"p50_ms": p50 * 1e3, "p99_ms": p99 * 1e3, "max_ms": times[-1] * 1e3}
    return {"wall_s": wall, **shown, "events": events, "requests": len(times)}


def request_maker(host: str, model: str, mode: str, tokens: int) -> Callable[[], bytes]:
    """Return what makes the requests of a mode."""
    if mode == "long":
        return long_requests(host, model, tokens)
    if mode == "live":
        live = f"GET /live HTTP/1.1\r\nhost: {host}\r\n\r\n".encode()
        return lambda: live
    if mode == "kserve":
        infer = kserve_bytes(host, model, tokens)
        return lambda: infer
    headers = "x-dynamo-stream-resume: true\r\n" if mode == "resumable" else ""
    request = request_bytes(host, model, tokens, stream=mode != "requests", headers=headers)
    return lambda: request


async def run(url: str, model: str, mode: str, concurrency: int, tokens: int) -> None:
    """Connect, then obey lines of input."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or 80
    make = request_maker(parts.netloc, model, mode, tokens)
    loop = asyncio.get_running_loop()
    connections = [(await loop.create_connection(Connection, host, port))[1] for _ in range(concurrency)]
    if mode == "hold":
        await asyncio.gather(*[connection.ask(make(), first_only=True) for connection in connections])
        print(json.dumps({"open": len(connections)}), flush=True)
        await asyncio.to_thread(sys.stdin.read)
        return
    for connection in connections:
        connection.accepted = (200, 400) if mode == "long" else (200,)
    for line in iter(sys.stdin.readline, ""):
        print(json.dumps(await load(connections, make, int(line))), flush=True)


if __name__ == "__main__":
    with contextlib.suppress(ImportError):
        import uvloop

        uvloop.install()
    server, name, what, count, length = sys.argv[1:]
    asyncio.run(run(server, name, what, int(count), int(length)))
