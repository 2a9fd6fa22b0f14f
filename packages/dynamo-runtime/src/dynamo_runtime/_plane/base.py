"""What the TCP and the NATS request plane have in common: endpoints, pooled connections, signs of life."""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

from dynamo_core.clock import Clock
from dynamo_core.errors import DeadlineExceededError, UnavailableError
from dynamo_core.ids import EndpointId
from dynamo_core.planes import (
    DEFAULT_CALL_OPTIONS,
    Call,
    CallOptions,
    RequestHandler,
    ServedEndpoint,
    StreamReceiver,
)
from dynamo_runtime._plane._metrics import CALLS_OPEN, CALLS_QUEUED, CALLS_SERVED, CONNECTIONS, INHIBITED, PlaneMetrics
from dynamo_runtime._plane.admission import Admission
from dynamo_runtime._plane.client import refused_call
from dynamo_runtime._plane.connection import PlaneState
from dynamo_runtime._plane.options import PlaneOptions
from dynamo_runtime._plane.pool import ConnectionPool, Dial, split_address
from dynamo_runtime._plane.server import EndpointTable
from dynamo_runtime._plane.timers import Timers, wait_within

if TYPE_CHECKING:
    from dynamo_core.telemetry import Metrics

_CHECKS_PER_INTERVAL = 4


class StreamPlane(ABC):
    """A request plane whose connections are ordered streams of bytes.

    It listens from the first ``serve`` on: a process that only calls need not be reachable.

    Args:
        dial: Opens a connection to an address.
        clock: Time.
        options: Limits and times.
        metrics: Scope to register metrics in.
    """

    def __init__(self, dial: Dial, *, clock: Clock, options: PlaneOptions, metrics: Metrics | None) -> None:
        self.state = PlaneState(clock, options, PlaneMetrics(metrics), Timers(clock))
        admission = Admission(options, self.state.timers, self.state.metrics)
        self.table = EndpointTable(clock, admission)
        self._pool = ConnectionPool(self.state, dial)
        self._address = ""
        self._listening = asyncio.Lock()
        self._keepalive: asyncio.Task[None] | None = None
        self._closed = False
        self.state.metrics.watch(CONNECTIONS, "Open connections", lambda: len(self.state.connections))
        self.state.metrics.watch(CALLS_SERVED, "Calls being served", lambda: self.table.in_flight)
        self.state.metrics.watch(CALLS_QUEUED, "Calls that wait for a place", lambda: admission.waiting)
        self.state.metrics.watch(INHIBITED, "Addresses not dialled after a failure", lambda: self._pool.inhibited)
        self.state.metrics.watch(CALLS_OPEN, "Calls opened by this process that run", lambda: self._pool.calls)

    @property
    def faults(self) -> Mapping[str, int]:
        """Connections and calls ended for a fault, by kind."""
        return self.state.metrics.faults

    @property
    def connects(self) -> int:
        """Connections opened to peers so far."""
        return self.state.metrics.connects

    @abstractmethod
    async def listen(self) -> str:
        """Accept callers from now on; return the address.

        Raises:
            ConfigurationError: if the plane cannot listen where its URL says.
        """

    @abstractmethod
    async def stop_listening(self) -> None:
        """Accept no more callers. Idempotent."""

    async def start(self) -> None:
        """Get ready to open and serve calls."""
        if self._keepalive is None and self.state.options.keepalive_interval_s > 0:
            self._keepalive = asyncio.get_running_loop().create_task(
                self._watch_peers(), name="request-plane-keepalive"
            )

    async def close(self) -> None:
        """Close all endpoints, calls and connections. Idempotent."""
        self._closed = True
        for endpoint in self.table.endpoints():
            await endpoint.close()
        await self.stop_listening()
        await self._pool.close()
        error = UnavailableError("This process closed its request plane.", reason="transport.disconnected")
        gone = [connection.gone for connection in self.state.connections]
        for connection in list(self.state.connections):
            connection.leave(error)
        await wait_within(self.state.clock, self.state.options.connect_timeout_s, _settled(gone))
        for connection in list(self.state.connections):
            connection.abort(error)
        await _settled(gone)
        await self.state.timers.close()
        if self._keepalive is not None:
            self._keepalive.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keepalive
            self._keepalive = None

    async def serve(self, endpoint: EndpointId, handler: RequestHandler, *, schema: str = "") -> ServedEndpoint:
        """Serve an endpoint. A non-empty ``schema`` refuses calls that name another one.

        Raises:
            ConfigurationError: if the plane cannot listen where its URL says.
        """
        async with self._listening:
            self._check_open()
            self._address = self._address or await self.listen()
        return self.table.add(endpoint, self._address, handler, schema)

    async def open(
        self,
        address: str,
        endpoint: EndpointId,
        payload: bytes,
        receiver: StreamReceiver,
        options: CallOptions = DEFAULT_CALL_OPTIONS,
    ) -> Call:
        """Open a call; see ``dynamo_core.planes.RequestPlane.open``."""
        self._check_open()
        base, number = split_address(address)
        deadline_s = options.deadline_s
        connection = self._pool.ready(base)
        if connection is None:
            started_s = self.state.clock.monotonic()
            connection = await self._pool.acquire(base)
            if deadline_s is not None:
                deadline_s -= self.state.clock.monotonic() - started_s
        if deadline_s is not None and deadline_s <= 0:
            return refused_call(receiver, DeadlineExceededError("The deadline passed before the call could leave."))
        return connection.open(f"{endpoint}{number}", payload, receiver, options, deadline_s)

    def _check_open(self) -> None:
        if self._closed:
            raise UnavailableError("This process closed its request plane.", reason="transport.cannot_connect")

    async def _watch_peers(self) -> None:
        options = self.state.options
        period_s = min(options.keepalive_interval_s, options.keepalive_timeout_s) / _CHECKS_PER_INTERVAL
        checked_at_s = self.state.clock.monotonic()
        while True:
            await self.state.clock.sleep(period_s)
            now_s = self.state.clock.monotonic()
            stood_still = now_s - checked_at_s > options.keepalive_interval_s + period_s
            checked_at_s = now_s
            for connection in list(self.state.connections):
                connection.check_alive(now_s, fresh_start=stood_still)


async def _settled(gone: list[asyncio.Future[None]]) -> None:
    if gone:
        await asyncio.wait(gone)
