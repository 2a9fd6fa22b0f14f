"""Follows the KV events that a vLLM or SGLang engine publishes over ZMQ, with nothing of ours beside the engine."""

from __future__ import annotations

import asyncio
import enum
from collections import Counter
from collections.abc import Callable

import structlog
import zmq
import zmq.asyncio

from dynamo_core.errors import BackendProtocolError, DynamoError, InvalidRequestError
from dynamo_core.events import BlocksCleared, KvEvent, KvEventBatch
from dynamo_core.ids import WorkerId
from dynamo_router._engine_wire import open_message, read_event

REPLAY_TIMEOUT_MS = 5000
MAX_WAITING_MESSAGES = 100_000
_SEQUENCE_BYTES = 8
_END_OF_REPLAY = (1 << 64) - 1
_log = structlog.get_logger(__name__)


class SourceState(enum.Enum):
    """How far an engine has been heard."""

    PENDING = "pending"
    ACTIVE = "active"
    CLOSED = "closed"


class EngineEventSource:
    """One dp rank's engine events, numbered as a worker's stream and handed on.

    Messages of an engine grow by one. Missed ones, also those from before this source began, are fetched from the
    engine's replay socket; if they cannot be had, the stream has a gap, which the router shows as ``lossy``. An engine
    that begins anew holds nothing any more.

    Args:
        apply: Takes batches in order, for example ``KvRouter.apply_events``.
        worker: Whose events these are; a dp rank that a message names replaces this one's.
        endpoint: Where the engine publishes, for example ``tcp://10.0.0.7:5557``.
        replay_endpoint: Its replay socket; empty if it has none.
        topic: Topic to subscribe to; empty for all.
    """

    def __init__(
        self,
        apply: Callable[[KvEventBatch], object],
        worker: WorkerId,
        endpoint: str,
        *,
        replay_endpoint: str = "",
        topic: str = "",
    ) -> None:
        self.state = SourceState.PENDING
        self.counts: Counter[str] = Counter()
        self._apply = apply
        self._worker = worker
        self._endpoint = endpoint
        self._replay_endpoint = replay_endpoint
        self._topic = topic
        self._context: zmq.asyncio.Context | None = None
        self._task: asyncio.Task[None] | None = None
        # Next sequence to apply, and the newest one that came through the subscription.
        self._next: int | None = 0 if replay_endpoint else None
        self._heard = -1
        # Per dp rank: id of its last event.
        self._last_ids: dict[int, int] = {worker.dp_rank: 0}

    async def start(self) -> None:
        """Subscribe; then fetch what the engine remembers and follow it in the background.

        Raises:
            InvalidRequestError: if an address cannot be used.
        """
        self._context = zmq.asyncio.Context()
        socket = self._context.socket(zmq.SUB)
        socket.setsockopt(zmq.RCVHWM, MAX_WAITING_MESSAGES)
        socket.setsockopt_string(zmq.SUBSCRIBE, self._topic)
        try:
            socket.connect(self._endpoint)
            if self._replay_endpoint:
                self._replay_socket(self._context).close()
        except zmq.ZMQError as error:
            await self.close()
            raise InvalidRequestError(
                f"KV event endpoints {self._endpoint!r} and {self._replay_endpoint!r} cannot be used: {error}; "
                "give addresses like tcp://HOST:PORT",
                param="kv_events_endpoints",
            ) from error
        self._task = asyncio.create_task(self._follow(socket), name=f"engine-events-{self._worker}")

    async def close(self) -> None:
        """Stop following. Idempotent."""
        self.state = SourceState.CLOSED
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        context, self._context = self._context, None
        if context is not None:
            # Closes what a task that was cancelled before it began has left open, too.
            context.destroy(linger=0)

    # -- messages ----------------------------------------------------------------------------------------------------

    async def _follow(self, socket: zmq.asyncio.Socket) -> None:
        if self._replay_endpoint:
            await self._replay(0, None)
        while True:
            frames: list[bytes] = await socket.recv_multipart()
            if len(frames) < 2 or len(frames[-2]) != _SEQUENCE_BYTES:
                self.counts["malformed"] += 1
                continue
            await self._hear(int.from_bytes(frames[-2], "big"), frames[-1])

    async def _hear(self, sequence: int, payload: bytes) -> None:
        if sequence <= self._heard:
            self._begin_anew()
        self._heard = sequence
        if self._next is not None and sequence > self._next:
            await self._fill(self._next, sequence)
        if self._next is None or sequence >= self._next:
            self._take(sequence, payload)

    def _begin_anew(self) -> None:
        _log.info("engine_began_anew", worker=str(self._worker), endpoint=self._endpoint)
        self.counts["restarts"] += 1
        self._next = 0
        for rank in list(self._last_ids):
            self._emit(rank, (BlocksCleared(self._number(rank)),), 0)

    async def _fill(self, first: int, stop: int) -> None:
        if self._replay_endpoint:
            await self._replay(first, stop)
        if self._next is not None and self._next < stop:
            self._lose(f"messages {self._next}..{stop - 1}")

    def _lose(self, what: str) -> None:
        """Leave out an event id, so that the stream shows the gap."""
        _log.warning("engine_events_lost", worker=str(self._worker), endpoint=self._endpoint, lost=what)
        self.counts["lost"] += 1
        for rank in self._last_ids:
            self._number(rank)

    def _take(self, sequence: int, payload: bytes) -> None:
        self._next = sequence + 1
        self.state = SourceState.ACTIVE
        self.counts["messages"] += 1
        try:
            message = open_message(payload)
            rank = self._worker.dp_rank if message.dp_rank is None else message.dp_rank
            read = [read_event(item, self._number(rank)) for item in message.items]
        except BackendProtocolError as error:
            self._lose(f"message {sequence}: {error.message}")
        else:
            self._emit(rank, tuple(event for event, _ in read), max((size for _, size in read), default=0))

    def _number(self, rank: int) -> int:
        self._last_ids[rank] = self._last_ids.get(rank, 0) + 1
        return self._last_ids[rank]

    def _emit(self, rank: int, events: tuple[KvEvent, ...], block_size: int) -> None:
        try:
            self._apply(KvEventBatch(WorkerId(self._worker.instance_id, rank), events, block_size))
        except DynamoError as error:
            self.counts["refused"] += 1
            _log.warning("engine_events_refused", worker=str(self._worker), dp_rank=rank, reason=error.message)

    # -- replay ------------------------------------------------------------------------------------------------------

    def _replay_socket(self, context: zmq.asyncio.Context) -> zmq.asyncio.Socket:
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, REPLAY_TIMEOUT_MS)
        socket.connect(self._replay_endpoint)
        return socket

    async def _replay(self, first: int, stop: int | None) -> None:
        """Fetch messages from ``first`` on, up to ``stop`` if that one has come already."""
        assert self._context is not None
        socket = self._replay_socket(self._context)
        try:
            await socket.send_multipart([b"", first.to_bytes(_SEQUENCE_BYTES, "big")])
            while True:
                *_, number, payload = await socket.recv_multipart()
                sequence = int.from_bytes(number, "big")
                if sequence == _END_OF_REPLAY or (stop is not None and sequence >= stop):
                    return
                self._take_replayed(sequence, payload)
        except (zmq.ZMQError, ValueError) as error:
            _log.warning("engine_replays_nothing", endpoint=self._replay_endpoint, error=str(error))
        finally:
            socket.close()

    def _take_replayed(self, sequence: int, payload: bytes) -> None:
        if self._next is not None and sequence < self._next:
            return
        if self._next is not None and sequence > self._next:
            self._lose(f"messages {self._next}..{sequence - 1}, which left the engine's buffer")
        self.counts["replayed"] += 1
        self._take(sequence, payload)
