"""What the parts of a bus share, and a subscription's connections to the processes of its publishers."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

import zmq

from dynamo_core.clock import Clock
from dynamo_core.discovery import Discovery
from dynamo_runtime._bus._metrics import BusMetrics
from dynamo_runtime._bus.options import BusOptions
from dynamo_runtime._bus.sockets import SocketReader

LEAVE_GRACE_S = 1.0
"""How long a connection outlives its last publisher: what that one sent before leaving may still be on its way."""


class Listener(Protocol):
    """A subscription, as its bus sees it."""

    @property
    def buffered(self) -> int:
        """Events that wait for the reader."""
        ...

    async def close(self) -> None:
        """Leave the topic. Idempotent."""
        ...


@dataclass
class BusState:
    """What all parts of one bus share."""

    context: zmq.Context[zmq.Socket[bytes]]
    discovery: Discovery
    clock: Clock
    options: BusOptions
    metrics: BusMetrics
    subscriptions: dict[Listener, None] = field(default_factory=dict[Listener, None])


class Links:
    """Connections of a subscriber's socket by address; publishers of one process share one.

    Args:
        reader: The subscriber's socket.
        clock: Time.
    """

    def __init__(self, reader: SocketReader, clock: Clock) -> None:
        self._reader = reader
        self._clock = clock
        self._uses: Counter[str] = Counter()
        self._leaving: dict[str, asyncio.Task[None]] = {}

    def add(self, address: str) -> None:
        """Use an address, connecting to it if it is the first use."""
        self._uses[address] += 1
        leaving = self._leaving.pop(address, None)
        if leaving is not None:
            leaving.cancel()
        elif self._uses[address] == 1:
            self._reader.socket.connect(address)
            self._reader.poke()

    def remove(self, address: str) -> None:
        """Stop using an address; the last use disconnects after a grace."""
        self._uses[address] -= 1
        if not self._uses[address]:
            del self._uses[address]
            self._leaving[address] = asyncio.get_running_loop().create_task(self._leave(address))

    async def close(self) -> None:
        """Forget what is under way; closing the socket disconnects."""
        tasks = list(self._leaving.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _leave(self, address: str) -> None:
        await self._clock.sleep(LEAVE_GRACE_S)
        del self._leaving[address]
        self._reader.drain()
        with contextlib.suppress(zmq.ZMQError):
            self._reader.socket.disconnect(address)
