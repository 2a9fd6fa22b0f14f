"""A road to a server that can be cut without a word, or broken off: a TCP proxy."""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType


class Road:
    """A TCP proxy before a port of this machine; use it as a context.

    Args:
        target: Port of the server.

    Attributes:
        port: Where it listens.
    """

    def __init__(self, target: int) -> None:
        self.port = 0
        self._target = target
        self._open = asyncio.Event()
        self._open.set()
        self._server: asyncio.Server | None = None
        self._passing: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Road:
        await self.restore()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.break_off()

    def cut(self) -> None:
        """Let nothing pass any more, and tell nobody."""
        self._open.clear()

    async def break_off(self) -> None:
        """Reset all connections and take no new ones."""
        if self._server is not None:
            self._server.close()
        for task in list(self._passing):
            task.cancel()
        await asyncio.gather(*self._passing, return_exceptions=True)

    async def restore(self) -> None:
        """Take connections."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._passing.add(task)
        task.add_done_callback(self._passing.discard)
        try:
            onward_reader, onward_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        try:
            await asyncio.gather(self._carry(reader, onward_writer), self._carry(onward_reader, writer))
        except asyncio.CancelledError:
            # The road was broken off; the server's task is the loop's own and must not end as cancelled.
            return
        finally:
            writer.transport.abort()
            onward_writer.transport.abort()

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                await self._open.wait()
                sink.write(data)
        sink.transport.abort()
