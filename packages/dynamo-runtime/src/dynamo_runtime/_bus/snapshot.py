"""States that publishers are asked for: taken once for all who ask meanwhile, cut to pieces, and put together again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any

import msgspec
import structlog

from dynamo_core.clock import Clock
from dynamo_core.errors import UnavailableError
from dynamo_core.events import EventEnvelope
from dynamo_core.ids import PublisherId
from dynamo_runtime._bus._metrics import ABSENT_SNAPSHOTS, SNAPSHOTS, BusMetrics
from dynamo_runtime._bus.options import BusOptions
from dynamo_runtime._bus.wire import PACKET_BYTES, ReplayPart
from dynamo_runtime._plane.timers import result_within

logger = structlog.get_logger(__name__)

MAX_WAITING = 64
"""Askers that one state is sent to; it lies in the socket's queue for each of them."""

_ASKED_AT_ONCE = 16
_SIZE = "bytes"
"""Header of a piece: bytes of the whole state, which shows whether a piece was lost."""

Reply = Callable[[ReplayPart], object]


class SnapshotOffer:
    """Answers whoever asks for a publisher's state, by one run of its source at a time.

    A state that was begun before the question may lack events that the asker does not hear either. Who asks during a
    run hence waits for the next one, which answers all that waited.

    Args:
        take: Runs the source; the envelope bears the sequence at which that began.
        clock: Time.
        options: Limits of size and time.
    """

    def __init__(
        self, take: Callable[[], Coroutine[Any, Any, EventEnvelope]], clock: Clock, options: BusOptions
    ) -> None:
        self._take = take
        self._clock = clock
        self._options = options
        self._waiting: list[Reply] = []
        self._task: asyncio.Task[None] | None = None

    def ask(self, reply: Reply) -> None:
        """Answer in pieces once the state has been taken; at once, with nothing, if too many wait."""
        if len(self._waiting) >= MAX_WAITING:
            reply(ReplayPart([], done=True))
            return
        self._waiting.append(reply)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._answer(), name="event-bus-snapshot")

    async def close(self) -> None:
        """Take no more states. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _answer(self) -> None:
        while self._waiting:
            waiting, self._waiting = self._waiting, []
            pieces = await self._pieces()
            for reply in waiting:
                for piece in pieces:
                    reply(ReplayPart([piece], done=False))
                reply(ReplayPart([], done=True))
        self._task = None

    async def _pieces(self) -> list[EventEnvelope]:
        try:
            state = await result_within(self._clock, self._options.replay_timeout_s, self._take())
        except Exception as error:  # noqa: BLE001 - a source may raise anything, and whoever asked is waiting
            logger.warning("event_bus.snapshot_failed", error=f"{type(error).__name__}: {error}")
            return []
        limit_bytes = self._options.max_snapshot_bytes
        if len(state.payload) > limit_bytes:
            logger.warning("event_bus.snapshot_too_large", bytes=len(state.payload), max_snapshot_bytes=limit_bytes)
            return []
        return cut(state)


def cut(state: EventEnvelope) -> list[EventEnvelope]:
    """Cut a state into pieces of ``PACKET_BYTES``, at least one."""
    payload, headers = state.payload, {_SIZE: str(len(state.payload))}
    return [
        msgspec.structs.replace(state, payload=payload[start : start + PACKET_BYTES], headers=headers)
        for start in range(0, max(1, len(payload)), PACKET_BYTES)
    ]


def joined(pieces: list[EventEnvelope]) -> EventEnvelope | None:
    """Put a state together again; None if there are no pieces, or not all of them."""
    if not pieces:
        return None
    payload = b"".join(piece.payload for piece in pieces)
    whole = pieces[0].headers.get(_SIZE) == str(len(payload))
    return msgspec.structs.replace(pieces[0], payload=payload, headers={}) if whole else None


async def gather(
    publishers: Iterable[PublisherId],
    ask: Callable[[PublisherId, float], Awaitable[list[EventEnvelope]]],
    *,
    clock: Clock,
    timeout_s: float,
    metrics: BusMetrics,
) -> list[EventEnvelope]:
    """Ask publishers for their states, some at a time, and return those that came. Cancelling drops the questions.

    Args:
        publishers: Whom to ask.
        ask: Returns the pieces of a publisher's state, at most that many seconds later.
        clock: Time.
        timeout_s: Limit of all of it.
        metrics: Counts.
    """
    deadline_s = clock.monotonic() + timeout_s
    places = asyncio.Semaphore(_ASKED_AT_ONCE)

    async def state(publisher: PublisherId) -> EventEnvelope | None:
        async with places:
            left_s = deadline_s - clock.monotonic()
            try:
                return joined(await ask(publisher, left_s)) if left_s > 0 else None
            except UnavailableError as error:
                logger.info("event_bus.snapshot_absent", publisher=f"{publisher:x}", error=error.message)
                return None

    async with asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(state(publisher)) for publisher in publishers]
    found = [each for each in (task.result() for task in asked) if each is not None]
    metrics.add(SNAPSHOTS, len(found))
    metrics.add(ABSENT_SNAPSHOTS, len(asked) - len(found))
    return found
