"""The request plane in one process: handlers run as tasks, items are handed over once per event-loop tick."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import structlog

from dynamo_core.clock import Clock, SystemClock
from dynamo_core.errors import (
    CancelledRequestError,
    ConfigurationError,
    DeadlineExceededError,
    DynamoError,
    InvalidRequestError,
    PayloadTooLargeError,
    UnavailableError,
    as_dynamo_error,
    error_from_record,
)
from dynamo_core.ids import EndpointId
from dynamo_core.memory.discovery import require_memory_url
from dynamo_core.planes import DEFAULT_CALL_OPTIONS, CallOptions, RequestHandler, StreamReceiver

DEFAULT_MAX_PAYLOAD_BYTES = 64 << 20
_log = structlog.get_logger(__name__)


class MemoryRequestPlane:
    """A client of a memory network: it serves endpoints and opens calls.

    Args:
        clock: Source of deadlines.
        max_payload_bytes: Largest payload of a call.
        network: The network of another client; a new one if omitted. ``peer`` is the way to share.
    """

    def __init__(
        self,
        *,
        clock: Clock | None = None,
        max_payload_bytes: int = DEFAULT_MAX_PAYLOAD_BYTES,
        network: _Network | None = None,
    ) -> None:
        if max_payload_bytes < 1:
            raise ConfigurationError(f"max_payload_bytes {max_payload_bytes} must be at least 1")
        self._clock = clock if clock is not None else SystemClock()
        self._network = network if network is not None else _Network()
        self._max_payload_bytes = max_payload_bytes
        self._served: dict[str, MemoryEndpoint] = {}
        self._calls: dict[MemoryCall, None] = {}
        self._closed = False

    def peer(self) -> MemoryRequestPlane:
        """Return another client of the same network, as another process would be."""
        return MemoryRequestPlane(clock=self._clock, max_payload_bytes=self._max_payload_bytes, network=self._network)

    async def start(self) -> None:
        """Do nothing: the network is here."""

    async def close(self) -> None:
        """Close all endpoints and calls. Idempotent."""
        self._closed = True
        for call in list(self._calls):
            call.stop()
            call.end(UnavailableError("the request plane closed", reason="transport.disconnected"))
        for endpoint in list(self._served.values()):
            await endpoint.close()
        await asyncio.sleep(0)  # receivers hear of the end in this tick

    async def serve(self, endpoint: EndpointId, handler: RequestHandler, *, schema: str = "") -> MemoryEndpoint:
        """Serve an endpoint under an address of its own; several may serve the same one."""
        self._require_open()
        served = MemoryEndpoint(self._network, endpoint, handler, schema, self._clock, self._served)
        self._served[served.address] = served
        return served

    async def open(
        self,
        address: str,
        endpoint: EndpointId,
        payload: bytes,
        receiver: StreamReceiver,
        options: CallOptions = DEFAULT_CALL_OPTIONS,
    ) -> MemoryCall:
        """Open a call; its handler starts in the next event-loop tick.

        Raises:
            UnavailableError: if nothing serves the address.
            PayloadTooLargeError: if the payload exceeds the limit.
        """
        self._require_open()
        if len(payload) > self._max_payload_bytes:
            raise PayloadTooLargeError(
                f"payload of {len(payload)} bytes exceeds the limit of {self._max_payload_bytes}; send less"
            )
        served = self._network.endpoints.get(address)
        if served is None:
            raise UnavailableError(f"nothing serves {address}", reason="transport.cannot_connect")
        stream = MemoryCall(receiver, options, self._clock, self._calls)
        self._calls[stream] = None
        served.accept(endpoint, payload, stream)
        return stream

    def sever(self, address: str) -> None:
        """Lose the process behind an address: calls end as disconnected, handlers die; for tests of that."""
        served = self._network.endpoints.pop(address, None)
        if served is not None:
            served.abandon(UnavailableError(f"lost {address}", reason="transport.disconnected"))

    def _require_open(self) -> None:
        if self._closed:
            raise UnavailableError("this request plane is closed", reason="transport.closed")


class MemoryEndpoint:
    """An endpoint served in this process."""

    def __init__(
        self,
        network: _Network,
        endpoint: EndpointId,
        handler: RequestHandler,
        schema: str,
        clock: Clock,
        siblings: dict[str, MemoryEndpoint],
    ) -> None:
        self._network = network
        self._endpoint = endpoint
        self._handler = handler
        self._schema = schema
        self._clock = clock
        self._siblings = siblings
        self._address = network.new_address()
        self._running: dict[asyncio.Task[None], MemoryCall] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        network.endpoints[self._address] = self

    @property
    def address(self) -> str:
        """``mem://<number>``, unique in the network."""
        return self._address

    @property
    def in_flight(self) -> int:
        """Calls being served."""
        return len(self._running)

    def accept(self, endpoint: EndpointId, payload: bytes, stream: MemoryCall) -> None:
        """Run the handler for a call, or end the call with the reason why not."""
        refusal = self._refusal(endpoint, stream)
        if refusal is not None:
            stream.end(refusal)
            return
        task = asyncio.get_running_loop().create_task(
            self._run(payload, stream), name=f"{self._endpoint} {stream.request_id}"
        )
        stream.on_kill(task.cancel)
        self._running[task] = stream
        self._idle.clear()
        task.add_done_callback(self._forget)

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new calls, wait for running ones; return whether all ended in time."""
        self._draining = True
        return self._idle.is_set() or await _first(self._idle.wait(), self._clock.sleep(timeout_s))

    async def close(self) -> None:
        """Stop serving and end what still runs with ``backend.engine_shutdown``. Idempotent."""
        self._network.endpoints.pop(self._address, None)
        self._siblings.pop(self._address, None)
        self.abandon(UnavailableError("the endpoint closed", reason="backend.engine_shutdown"))
        await self._idle.wait()

    def abandon(self, error: DynamoError) -> None:
        """End every running call with ``error`` and cancel its handler."""
        for task, stream in list(self._running.items()):
            stream.stop()
            stream.end(error)
            task.cancel()

    def _refusal(self, endpoint: EndpointId, stream: MemoryCall) -> DynamoError | None:
        if endpoint != self._endpoint:
            return UnavailableError(
                f"{self._address} serves {self._endpoint}, not {endpoint}", reason="backend.worker_unavailable"
            )
        if self._draining:
            return UnavailableError(f"{self._address} is draining", reason="backend.draining")
        wanted = stream.options.schema
        if self._schema and wanted and wanted != self._schema:
            return InvalidRequestError(
                f"{self._endpoint} takes {self._schema}, not {wanted}", reason="request.schema_mismatch"
            )
        return None

    async def _run(self, payload: bytes, stream: MemoryCall) -> None:
        try:
            await self._handler(payload, stream, stream)
        except DynamoError as error:
            stream.end(error)
        except Exception as error:  # noqa: BLE001 - whatever a handler raises ends its call as an InternalError
            _log.exception("handler failed", endpoint=str(self._endpoint), request_id=stream.request_id)
            stream.end(as_dynamo_error(error))
        else:
            stream.end(None)

    def _forget(self, task: asyncio.Task[None]) -> None:
        # A handler that ends by cancellation of its own leaves its caller waiting unless the call ends here.
        stream = self._running.pop(task)
        stream.end(CancelledRequestError("the handler was cancelled", reason="backend.cancelled"))
        if not self._running:
            self._idle.set()


class MemoryCall:
    """One call: its caller's handle, its handler's context, and its sink."""

    def __init__(
        self, receiver: StreamReceiver, options: CallOptions, clock: Clock, siblings: dict[MemoryCall, None]
    ) -> None:
        self.options = options
        self._headers = dict(options.headers)
        self._receiver = receiver
        self._clock = clock
        self._siblings = siblings
        self._loop = asyncio.get_running_loop()
        self._credit = options.credit_items
        self._outbox: list[bytes] = []
        self._ended = False
        self._stopped = asyncio.Event()
        self._may_send = asyncio.Event()
        self._callbacks: list[Callable[[], None]] = []
        self._kill: Callable[[], object] = self.stop
        self._deadline_at: float | None = None
        self._timer: asyncio.Task[None] | None = None
        if options.deadline_s is not None:
            self._deadline_at = clock.monotonic() + options.deadline_s
            self._timer = self._loop.create_task(self._expire(options.deadline_s))
        self._update_credit(0)

    # The caller's side.

    def grant(self, items: int) -> None:
        """Allow that many more items."""
        self._update_credit(items)

    def cancel(self, *, kill: bool = False) -> None:
        """Ask the handler to stop; with ``kill`` end the call now and cancel the handler. Idempotent."""
        self.stop()
        if kill and not self._ended:
            self._outbox.clear()
            self.end(CancelledRequestError("the caller killed the call"))
            self._kill()

    # The handler's side.

    @property
    def request_id(self) -> str:
        """Request id of the caller."""
        return self.options.request_id

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers of the caller."""
        return self._headers

    @property
    def stopped(self) -> bool:
        """Whether the caller wants no more."""
        return self._stopped.is_set()

    def remaining_s(self) -> float | None:
        """Seconds to the deadline; None without one."""
        return None if self._deadline_at is None else max(0.0, self._deadline_at - self._clock.monotonic())

    async def wait_stopped(self) -> None:
        """Return once ``stopped``."""
        await self._stopped.wait()

    def on_stop(self, callback: Callable[[], None]) -> None:
        """Call back once when ``stopped`` becomes true, at once if it is."""
        if self.stopped:
            callback()
        else:
            self._callbacks.append(callback)

    def send(self, item: bytes) -> None:
        """Queue an item for this tick; dropped after the end."""
        if self._ended:
            return
        self._update_credit(-1)
        self._outbox.append(item)
        if len(self._outbox) == 1:
            self._loop.call_soon(self._flush)

    @property
    def credit(self) -> int:
        """Items that may still be sent."""
        return self._credit

    async def wait_credit(self) -> None:
        """Return once ``credit`` is positive or the call has stopped."""
        await self._may_send.wait()

    # The plane's side.

    def on_kill(self, kill: Callable[[], object]) -> None:
        """Set what ends the handler."""
        self._kill = kill

    def stop(self) -> None:
        """Tell the handler that no more is wanted."""
        if self.stopped:
            return
        self._stopped.set()
        self._update_credit(0)
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def end(self, error: DynamoError | None) -> None:
        """End the call, once: what was sent is delivered first, then the end, in the next tick."""
        if self._ended:
            return
        self._ended = True
        self._siblings.pop(self, None)
        if self._timer is not None and self._timer is not asyncio.current_task():
            self._timer.cancel()
        self._loop.call_soon(self._finish, error)

    def _finish(self, error: DynamoError | None) -> None:
        self._callbacks.clear()
        try:
            self._flush()
        finally:
            # A copy by way of the record, as over a wire: no shared exception, no traceback that pins frames.
            self._receiver.on_end(None if error is None else error_from_record(error.to_record()))

    def _flush(self) -> None:
        if self._outbox:
            items, self._outbox = self._outbox, []
            self._receiver.on_items(items)

    def _update_credit(self, change: int) -> None:
        self._credit += change
        if self._credit > 0 or self.stopped:
            self._may_send.set()
        else:
            self._may_send.clear()

    async def _expire(self, deadline_s: float) -> None:
        await self._clock.sleep(deadline_s)
        self.end(DeadlineExceededError(f"the call exceeded its deadline of {deadline_s:g} s"))
        self.stop()


class _Network:
    """What all clients share."""

    def __init__(self) -> None:
        self.endpoints: dict[str, MemoryEndpoint] = {}
        self._numbers = itertools.count(1)

    def new_address(self) -> str:
        return f"mem://{next(self._numbers)}"


async def _first(wanted: Awaitable[Any], limit: Awaitable[Any]) -> bool:
    """Wait for either; return whether ``wanted`` came, and leave neither behind."""
    tasks = [asyncio.ensure_future(wanted), asyncio.ensure_future(limit)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].done()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def create_request_plane(url: str, *, clock: Clock, options: Mapping[str, object]) -> MemoryRequestPlane:
    """Entry point ``mem`` of ``dynamo_core.request_planes``: return a client of a new network.

    Raises:
        ConfigurationError: if the URL is not ``mem://``, or for an unknown or bad option.
    """
    require_memory_url(url, options, ("max_payload_bytes",))
    limit = options.get("max_payload_bytes", DEFAULT_MAX_PAYLOAD_BYTES)
    if not isinstance(limit, int):
        raise ConfigurationError(f"max_payload_bytes {limit!r} must be a whole number of bytes")
    return MemoryRequestPlane(clock=clock, max_payload_bytes=limit)
