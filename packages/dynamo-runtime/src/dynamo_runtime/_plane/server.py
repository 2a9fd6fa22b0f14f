"""The serving side: connections that callers opened, and the endpoints they call."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

from dynamo_core.clock import Clock
from dynamo_core.errors import (
    BackendProtocolError,
    CapacityExhaustedError,
    DynamoError,
    ErrorRecord,
    InvalidRequestError,
    UnavailableError,
)
from dynamo_core.ids import EndpointId
from dynamo_core.planes import RequestHandler, ServedEndpoint
from dynamo_runtime._plane.admission import Admission
from dynamo_runtime._plane.connection import Connection, PlaneState
from dynamo_runtime._plane.framing import Batch, Cancel, Grant, Open, encode
from dynamo_runtime._plane.stream import ServerCall, bounded_record
from dynamo_runtime._plane.timers import wait_within

SPLIT_BYTES = 1 << 20
"""Above this a tick's items are spread over several frames, so that none meets the frame limit."""

_ITEM_OVERHEAD_BYTES = 8
_FAILURES_PER_FRAME = 64


class TcpEndpoint:
    """A served endpoint.

    Args:
        table: Where it is listed.
        wire_name: Name by which callers open it.
        address: URL for discovery.
        handler: Serves its calls.
        schema: Schema of its payloads; empty takes any.
    """

    def __init__(
        self, table: EndpointTable, wire_name: str, address: str, handler: RequestHandler, schema: str
    ) -> None:
        self.wire_name = wire_name
        self.handler = handler
        self.schema = schema
        self.draining = False
        self._table = table
        self._address = address
        self._calls: set[ServerCall] = set()
        self._idle: asyncio.Event = asyncio.Event()
        self._idle.set()

    @property
    def address(self) -> str:
        """URL under which peers reach it."""
        return self._address

    @property
    def in_flight(self) -> int:
        """Calls being served."""
        return len(self._calls)

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new calls, wait for running ones; return whether all ended in time."""
        self.draining = True
        return await wait_within(self._table.clock, timeout_s, self._idle.wait())

    async def close(self) -> None:
        """Stop serving and end what still runs with ``backend.engine_shutdown``. Idempotent."""
        self.draining = True
        self._table.remove(self)
        error = UnavailableError("The worker shuts down.", reason="backend.engine_shutdown")
        tasks = [call.task for call in self._calls if call.task is not None]
        for call in list(self._calls):
            call.end_with(error)
        current = asyncio.current_task()
        await asyncio.gather(*(task for task in tasks if task is not current), return_exceptions=True)

    def accept(self, connection: ServerConnection, frame: Open) -> ServerCall:
        """Start a call."""
        call = ServerCall(connection, frame, self)
        self._calls.add(call)
        self._idle.clear()
        admission = self._table.admission
        call.begin(self.handler, frame.payload, None if admission.enter(call) else admission.turn)
        return call

    def released(self, call: ServerCall) -> None:
        """Count a call as done."""
        self._calls.discard(call)
        self._table.admission.leave(call)
        if not self._calls:
            self._idle.set()


class EndpointTable:
    """The endpoints of one plane by wire name.

    Args:
        clock: Time.
        admission: Places for calls, over all endpoints.
    """

    def __init__(self, clock: Clock, admission: Admission) -> None:
        self.clock = clock
        self.admission = admission
        self._endpoints: dict[str, TcpEndpoint] = {}
        self._numbers = itertools.count(2)

    @property
    def in_flight(self) -> int:
        """Calls being served."""
        return sum(endpoint.in_flight for endpoint in self._endpoints.values())

    def add(self, endpoint: EndpointId, base_address: str, handler: RequestHandler, schema: str) -> TcpEndpoint:
        """List an endpoint; a second one of the same name gets an address of its own."""
        name = str(endpoint)
        address = base_address
        if name in self._endpoints:
            number = next(self._numbers)
            name, address = f"{name}#{number}", f"{base_address}#{number}"
        served = TcpEndpoint(self, name, address, handler, schema)
        self._endpoints[name] = served
        return served

    def remove(self, endpoint: TcpEndpoint) -> None:
        """Unlist an endpoint."""
        if self._endpoints.get(endpoint.wire_name) is endpoint:
            del self._endpoints[endpoint.wire_name]

    def endpoints(self) -> list[TcpEndpoint]:
        """Return all endpoints."""
        return list(self._endpoints.values())

    def admit(self, frame: Open) -> TcpEndpoint:
        """Return the endpoint that serves a call.

        Raises:
            DynamoError: why none does.
        """
        endpoint = self._endpoints.get(frame.endpoint)
        if endpoint is None:
            raise UnavailableError(
                f"endpoint {frame.endpoint} is not served here; look its address up in discovery",
                reason="backend.worker_unavailable",
            )
        if endpoint.draining:
            raise UnavailableError(f"{frame.endpoint} takes no new calls", reason="backend.draining")
        if endpoint.schema and frame.schema and frame.schema != endpoint.schema:
            raise InvalidRequestError(
                f"{frame.endpoint} takes {endpoint.schema}, not {frame.schema}",
                reason="request.schema_mismatch",
                param="schema",
            )
        self.admission.check()
        return endpoint


class ServerConnection(Connection):
    """A connection that a caller opened.

    Args:
        state: What the plane's connections share.
        table: Endpoints to serve.
    """

    def __init__(self, state: PlaneState, table: EndpointTable) -> None:
        super().__init__(state)
        self._table = table
        self._calls: dict[int, ServerCall] = {}
        self._ready: list[ServerCall] = []
        self._ended: list[int] = []
        self._failed: list[tuple[int, ErrorRecord]] = []

    def role_handlers(self) -> dict[type, Callable[..., None]]:
        """Return the frames of callers."""
        return {Open: self._on_open, Grant: self._on_grant, Cancel: self._on_cancel}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet the caller, unless there are too many."""
        super().connection_made(transport)
        if len(self.state.connections) > self.state.options.max_connections:
            limit = self.state.options.max_connections
            self.refuse(CapacityExhaustedError(f"{limit} connections are open already"), "refused")

    def pause_writing(self) -> None:
        """Stop listening to a caller that does not read: its calls and refusals would pile up."""
        super().pause_writing()
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """Listen again."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()
        super().resume_writing()

    def mark_ready(self, call: ServerCall) -> None:
        """A call has items that may leave."""
        self._ready.append(call)
        self.schedule()

    def end(self, call: ServerCall, error: ErrorRecord | None) -> None:
        """A call is over."""
        if self._calls.pop(call.id, None) is None:
            return
        # Items that it sent before must not be overtaken; they leave in the same batch, before the ends.
        if error is None:
            self._ended.append(call.id)
        else:
            self._failed.append((call.id, error))
        self.schedule()

    def collect(self, out: list[bytes | bytearray]) -> None:
        """Pack the tick's items and ends of all calls."""
        ready, self._ready = self._ready, []
        calls: list[int] = []
        items: list[list[bytes]] = []
        size = 0
        for call in ready:
            taken = call.take()
            if taken:
                calls.append(call.id)
                items.append(taken)
                size += sum(map(len, taken))
        if size > SPLIT_BYTES:
            calls, items = _split(calls, items, out)
        ended, self._ended = self._ended, []
        failed, self._failed = self._failed, []
        if calls or ended or failed:
            out.append(encode(Batch(calls, items, ended, failed[:_FAILURES_PER_FRAME])))
        out.extend(
            encode(Batch([], [], [], failed[start : start + _FAILURES_PER_FRAME]))
            for start in range(_FAILURES_PER_FRAME, len(failed), _FAILURES_PER_FRAME)
        )

    def on_lost(self, error: DynamoError) -> None:
        """Tell all handlers that their caller left."""
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.drop(cancel=False)

    def _on_open(self, frame: Open) -> None:
        if frame.call in self._calls:
            raise BackendProtocolError(f"call {frame.call} is open already")
        try:
            endpoint = self._table.admit(frame)
        except DynamoError as error:
            self.state.metrics.fault("refused")
            self._failed.append((frame.call, bounded_record(error)))
            self.schedule()
            return
        self._calls[frame.call] = endpoint.accept(self, frame)

    def _on_grant(self, frame: Grant) -> None:
        if len(frame.calls) != len(frame.counts):
            raise BackendProtocolError("a grant must have a count for each call")
        for call_id, count in zip(frame.calls, frame.counts, strict=True):
            call = self._calls.get(call_id)
            if call is not None and count > 0:
                call.grant(count)

    def _on_cancel(self, frame: Cancel) -> None:
        call = self._calls.get(frame.call)
        if call is None:
            return
        if frame.kill:
            del self._calls[frame.call]
            call.drop(cancel=True)
        else:
            call.stop()


def _split(
    calls: list[int], items: list[list[bytes]], out: list[bytes | bytearray]
) -> tuple[list[int], list[list[bytes]]]:
    """Append frames of about ``SPLIT_BYTES`` to ``out`` and return what is left for the last one."""
    part_calls: list[int] = []
    part_items: list[list[bytes]] = []
    size = 0
    for call_id, group in zip(calls, items, strict=True):
        for item in group:
            if size and size + len(item) > SPLIT_BYTES:
                out.append(encode(Batch(part_calls, part_items, [], [])))
                part_calls, part_items, size = [], [], 0
            if not part_calls or part_calls[-1] != call_id:
                part_calls.append(call_id)
                part_items.append([])
            part_items[-1].append(item)
            size += len(item) + _ITEM_OVERHEAD_BYTES
    return part_calls, part_items


if TYPE_CHECKING:
    _SERVED: type[ServedEndpoint] = TcpEndpoint
