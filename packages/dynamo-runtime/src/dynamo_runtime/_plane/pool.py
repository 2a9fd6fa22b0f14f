"""Connections to peers by address: opened on demand, shared by all calls, replaced once lost."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import NamedTuple, TypeAlias

from dynamo_core.errors import DynamoError, InvalidRequestError, UnavailableError
from dynamo_runtime._plane.client import ClientConnection
from dynamo_runtime._plane.connection import PlaneState
from dynamo_runtime._plane.timers import wait_within

Dial: TypeAlias = Callable[[str], Awaitable[ClientConnection]]
"""Opens a connection to an address, without waiting for its greeting. Raises ``OSError`` or ``DynamoError``."""


_MAX_SILENT = 4096
_LONGEST_PAUSE_FACTOR = 16


class _Silence(NamedTuple):
    until_s: float
    pause_s: float


class ConnectionPool:
    """One connection an address. It holds no more entries than there are open or opening connections.

    Args:
        state: What the plane's connections share.
        dial: Opens a connection.
    """

    def __init__(self, state: PlaneState, dial: Dial) -> None:
        self._state = state
        self._dial = dial
        self._open: dict[str, ClientConnection] = {}
        self._opening: dict[str, asyncio.Task[ClientConnection]] = {}
        self._silent: OrderedDict[str, _Silence] = OrderedDict()

    @property
    def inhibited(self) -> int:
        """Addresses that are not dialled now because they did not answer."""
        now_s = self._state.clock.monotonic()
        return sum(silence.until_s > now_s for silence in self._silent.values())

    @property
    def calls(self) -> int:
        """Calls that run over all connections."""
        return sum(connection.calls for connection in self._open.values())

    def ready(self, address: str) -> ClientConnection | None:
        """Return the open connection to an address that can be written to now, if there is one."""
        connection = self._open.get(address)
        return connection if connection is not None and not connection.closed and not connection.paused else None

    async def acquire(self, address: str) -> ClientConnection:
        """Return a connection that can be written to, opening one if need be. Cancelling only ends the wait.

        Raises:
            UnavailableError: if the address cannot be reached.
        """
        connection = self._open.get(address)
        if connection is None or connection.closed:
            connection = await self._connected(address)
        await connection.wait_writable()
        if connection.closed:
            raise UnavailableError("The connection to the worker was lost.", reason="transport.disconnected")
        return connection

    async def close(self) -> None:
        """End attempts that are under way. Open connections are the plane's to close."""
        tasks = list(self._opening.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _connected(self, address: str) -> ClientConnection:
        task = self._opening.get(address)
        if task is None:
            self._check_answers(address)
            task = asyncio.get_running_loop().create_task(self._connect(address), name=f"connect {address}")
            self._opening[address] = task
            task.add_done_callback(functools.partial(self._settled, address))
        return await asyncio.shield(task)

    def _settled(self, address: str, task: asyncio.Task[ClientConnection]) -> None:
        del self._opening[address]
        if task.cancelled() or task.exception() is not None:
            return
        connection = task.result()
        self._open[address] = connection
        connection.gone.add_done_callback(lambda _: self._lost(address, connection))

    def _lost(self, address: str, connection: ClientConnection) -> None:
        if self._open.get(address) is connection:
            del self._open[address]

    async def _connect(self, address: str) -> ClientConnection:
        attempt = asyncio.get_running_loop().create_task(self._greeted(address))
        try:
            in_time = await wait_within(self._state.clock, self._state.options.connect_timeout_s, _settle(attempt))
        finally:
            # A finished attempt does not mind; one that is still dialling closes its socket.
            attempt.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError, DynamoError):
                await attempt
        limit_s = self._state.options.connect_timeout_s
        if not in_time:
            self._note_silence(address)
            raise cannot_connect(address, f"no answer within {limit_s} s")
        try:
            connection = attempt.result()
        except OSError as error:
            # TLS too: a peer whose certificate is not trusted is as good as not there.
            raise cannot_connect(address, str(error)) from error
        self._state.metrics.connect()
        self._silent.pop(address, None)
        return connection

    def _check_answers(self, address: str) -> None:
        """Refuse an address that has just not answered: each call would wait for the whole limit again."""
        silence = self._silent.get(address)
        if silence is not None and (left_s := silence.until_s - self._state.clock.monotonic()) > 0:
            raise cannot_connect(address, f"it did not answer; it is tried again in {left_s:.1f} s")

    def _note_silence(self, address: str) -> None:
        shortest_s = self._state.options.path_retry_interval_s
        known = self._silent.pop(address, None)
        pause_s = shortest_s if known is None else min(shortest_s * _LONGEST_PAUSE_FACTOR, known.pause_s * 2)
        self._silent[address] = _Silence(self._state.clock.monotonic() + pause_s, pause_s)
        while len(self._silent) > _MAX_SILENT:
            self._silent.popitem(last=False)

    async def _greeted(self, address: str) -> ClientConnection:
        connection = await self._dial(address)
        try:
            await connection.greeted
        except asyncio.CancelledError:
            connection.abort(cannot_connect(address, "the peer did not greet"))
            raise
        if connection.loss is not None:
            raise cannot_connect(address, connection.loss.diagnostic) from connection.loss
        return connection


async def _settle(task: asyncio.Task[ClientConnection]) -> None:
    await asyncio.wait((task,))


def cannot_connect(address: str, detail: str) -> UnavailableError:
    """Return the error of an address that cannot be reached."""
    return UnavailableError(
        f"The worker at {address} cannot be reached.", reason="transport.cannot_connect", diagnostic=detail
    )


def split_address(address: str) -> tuple[str, str]:
    """Return the part of an address that is dialled and the number of an endpoint's second server in a process.

    Raises:
        InvalidRequestError: if nothing is left to dial.
    """
    base, mark, number = address.partition("#")
    if not base:
        raise InvalidRequestError(f"address {address!r} names no host", param="address")
    return base, mark + number
