"""Subscribes to one dp rank's KV events, fills gaps from the engine's replay socket, and reports what it hears."""

from __future__ import annotations

import asyncio
import re

import structlog
import zmq
import zmq.asyncio

from dynamo_core.clock import Clock
from dynamo_core.engine import KvEventSink
from dynamo_core.errors import BackendProtocolError, ConfigurationError
from dynamo_worker._deadline import within
from dynamo_worker._kv_relay.events import decode_batch
from dynamo_worker._kv_relay.translator import EventTranslator

REPLAY_TIMEOUT_S = 5.0
_SEQUENCE_BYTES = 8
_END_OF_REPLAY = (1 << 64) - 1
_PORT = re.compile(r"^(tcp://[^:]+:)(\d+)$")

log = structlog.get_logger(__name__)


class KvEventRelay:
    """Relay of one dp rank.

    A message's sequence grows by one. What was missed, also before the relay came, is asked from the replay socket;
    if it cannot be had, everything of this rank is reported gone and known anew from there.

    Args:
        endpoint: Address of the engine's publisher.
        replay_endpoint: Address of its replay socket; empty without one.
        topic: Topic to subscribe to; empty for all.
        block_size: Tokens a block.
        sink: Where reports go.
        clock: Time.
    """

    def __init__(
        self, endpoint: str, *, replay_endpoint: str, topic: str, block_size: int, sink: KvEventSink, clock: Clock
    ) -> None:
        self._endpoint = endpoint
        self._replay_endpoint = replay_endpoint
        self._translator = EventTranslator(sink, block_size)
        self._clock = clock
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt_string(zmq.SUBSCRIBE, topic)
        self._next: int | None = None
        self._first_payload = b""
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Subscribe; catch up with what the engine still remembers, and relay, in the background."""
        try:
            self._socket.connect(self._endpoint)
        except zmq.ZMQError as error:
            raise ConfigurationError(f"KV event endpoint {self._endpoint!r} cannot be used: {error}") from error
        self._task = asyncio.ensure_future(self._relay())

    async def close(self) -> None:
        """Stop and release the sockets. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self._socket.close()
        self._context.term()

    async def _relay(self) -> None:
        if self._replay_endpoint:
            await self._replay(0)
        while True:
            frames: list[bytes] = await self._socket.recv_multipart()
            if len(frames) < 2 or len(frames[-2]) != _SEQUENCE_BYTES:
                log.warning("KV event message has no sequence", endpoint=self._endpoint, frames=len(frames))
                continue
            await self._take(int.from_bytes(frames[-2], "big"), frames[-1])

    async def _take(self, sequence: int, payload: bytes) -> None:
        if self._next is not None and sequence < self._next:
            # What was replayed may come again through the subscription; so may the first message, which is no restart
            # then. A restarted engine's first message has another time stamp.
            if sequence or payload == self._first_payload:
                return
            log.info("engine began anew", endpoint=self._endpoint)
            self._translator.clear()
        elif self._next is not None and sequence > self._next:
            await self._fill(self._next, sequence)
        self._apply(sequence, payload)

    async def _fill(self, first: int, stop: int) -> None:
        if self._replay_endpoint:
            await self._replay(first, stop)
        if self._next != stop:
            log.warning("KV events lost", endpoint=self._endpoint, first=first, last=stop - 1)
            self._translator.clear()

    async def _replay(self, first: int, stop: int | None = None) -> None:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        try:
            socket.connect(self._replay_endpoint)
            await within(self._clock, REPLAY_TIMEOUT_S, self._ask(socket, first, stop))
        except (TimeoutError, zmq.ZMQError) as error:
            log.warning("engine does not replay KV events", endpoint=self._replay_endpoint, error=str(error))
        finally:
            socket.close()

    async def _ask(self, socket: zmq.asyncio.Socket, first: int, stop: int | None) -> None:
        await socket.send_multipart([b"", first.to_bytes(_SEQUENCE_BYTES, "big")])
        while True:
            *_, number, payload = await socket.recv_multipart()
            sequence = int.from_bytes(number, "big")
            if sequence == _END_OF_REPLAY or not payload:
                return
            if stop is not None and sequence >= stop:
                continue  # comes through the subscription
            if self._next is None and sequence > 0:
                log.info("earlier KV events have left the engine's buffer", first=sequence)
            if self._next is None or sequence == self._next:
                self._apply(sequence, payload)

    def _apply(self, sequence: int, payload: bytes) -> None:
        self._next = sequence + 1
        if sequence == 0:
            self._first_payload = payload
        try:
            batch = decode_batch(payload)
            self._translator.apply(batch)
        except BackendProtocolError as error:
            log.warning("KV events left out", endpoint=self._endpoint, sequence=sequence, problem=error.message)
            self._translator.clear()


def rank_endpoint(endpoint: str, rank: int) -> str:
    """Return the address of a dp rank: engines use the base port plus the rank.

    Raises:
        ConfigurationError: if ranks beyond the first are asked of an address without a port.
    """
    if not rank or not endpoint:
        return endpoint
    found = _PORT.match(endpoint)
    if found is None:
        raise ConfigurationError(
            f"KV event endpoint {endpoint!r} has no port to count ranks from; give tcp://HOST:PORT"
        )
    return f"{found[1]}{int(found[2]) + rank}"
