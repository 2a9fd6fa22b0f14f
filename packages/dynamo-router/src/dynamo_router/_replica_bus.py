"""Messages between selection services over ZMQ: each publishes on a socket of its own and listens to its peers'."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from struct import Struct

import structlog
import zmq
import zmq.asyncio

from dynamo_core.errors import ConfigurationError

_log = structlog.get_logger(__name__)
_HEAD = Struct("<QQ")
_MAX_WAITING_MESSAGES = 10_000
_MAX_PUBLISHERS = 256
_FAREWELL_MS = 1000


class ReplicaBus:
    """Publishes to whoever listens, and tells of every message of the peers and of every loss.

    A message has two frames: publisher and sequence number, packed, and the payload.

    Args:
        bind: Where to publish, ``tcp://HOST:PORT``; port 0 for any free one.
        peers: Where the others publish; one that is not up yet, or comes back, is connected to when it is.
        on_message: Is given the publisher's number and the payload.
        on_lost: Is given the number of a publisher whose messages were lost.
    """

    def __init__(
        self,
        bind: str,
        peers: Sequence[str],
        *,
        on_message: Callable[[int, bytes], None],
        on_lost: Callable[[int], None],
    ) -> None:
        self.address = bind
        self._peers = peers
        self._on_message = on_message
        self._on_lost = on_lost
        self._name = secrets.randbits(64)
        self._sent = 0
        self._heard: dict[int, int] = {}
        self._context = zmq.asyncio.Context()
        self._publisher: zmq.SyncSocket | None = None
        self._following: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Bind, connect and begin to listen.

        Raises:
            ConfigurationError: if an address cannot be used.
        """
        # Publishing never waits, so it needs no loop.
        publisher = zmq.Context.shadow(self._context.underlying).socket(zmq.PUB)
        publisher.setsockopt(zmq.LINGER, _FAREWELL_MS)
        self._publisher = publisher
        listener = self._context.socket(zmq.SUB)
        listener.setsockopt(zmq.LINGER, 0)
        listener.setsockopt(zmq.RCVHWM, _MAX_WAITING_MESSAGES)
        listener.subscribe(b"")
        address = self.address
        try:
            publisher.bind(address)
            for address in self._peers:
                listener.connect(address)
        except zmq.ZMQError as error:
            listener.close()
            await self.close()
            raise ConfigurationError(
                f"replica sync cannot use {address}: {error.strerror}; give tcp://HOST:PORT with a port that is free "
                "here for --replica-sync-bind, and the peers' own for --replica-sync-peers"
            ) from error
        self.address = publisher.getsockopt_string(zmq.LAST_ENDPOINT)
        self._following = asyncio.create_task(self._follow(listener), name="router-replica-bus")

    def publish(self, payload: bytes) -> None:
        """Send to all that listen at this moment. Never waits; a listener that is too slow loses messages."""
        if self._publisher is not None:
            self._sent += 1
            self._publisher.send_multipart([_HEAD.pack(self._name, self._sent), payload])

    async def close(self) -> None:
        """Stop listening, and publishing once what was said has gone out. Idempotent."""
        following, self._following = self._following, None
        if following is not None:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        publisher, self._publisher = self._publisher, None
        if publisher is not None:
            publisher.close()
        # Waits for the farewell, which must not hold up the loop.
        await asyncio.to_thread(self._context.term)

    async def _follow(self, listener: zmq.asyncio.Socket) -> None:
        try:
            while True:
                self._take(await listener.recv_multipart())
        finally:
            listener.close()

    def _take(self, frames: Sequence[bytes]) -> None:
        if len(frames) != 2 or len(frames[0]) != _HEAD.size:
            _log.warning("replica_message_refused", error=f"{len(frames)} frames are no message of a replica")
            return
        publisher, number = _HEAD.unpack(frames[0])
        last = self._heard.pop(publisher, number - 1)
        self._heard[publisher] = number
        if len(self._heard) > _MAX_PUBLISHERS:
            del self._heard[next(iter(self._heard))]
        if number != last + 1:
            self._on_lost(publisher)
        self._on_message(publisher, frames[1])
