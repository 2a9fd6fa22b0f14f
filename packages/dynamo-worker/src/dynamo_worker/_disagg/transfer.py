"""Serves ``worker_kv_transfer``: gives the bytes of leased blocks to whoever asks for them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from dynamo_core.clock import Clock
from dynamo_core.errors import BackendProtocolError, DeadlineExceededError, InvalidRequestError
from dynamo_core.kv import TransferRequest
from dynamo_core.planes import RequestContext, ResponseSink
from dynamo_core.tokens import require_algorithm
from dynamo_core.wire import TRANSFER_REQUEST
from dynamo_worker._deadline import within
from dynamo_worker._disagg.handoff import (
    HEAD_ENCODER,
    SHARED_MEMORY_HEADER,
    SupportsKvHandoff,
    TransferHead,
)
from dynamo_worker._disagg.leases import LeaseTable
from dynamo_worker._disagg.nixl import NIXL_HEADER, NixlPool
from dynamo_worker._disagg.rooms import BOOTSTRAP_HEADER, Room, Rooms
from dynamo_worker._disagg.segments import SLOT_BYTES, LendingPool, SegmentPool, SlotMemory
from dynamo_worker._metrics import WorkerMetrics

ITEM_BYTES = 1 << 19
_LOOK_S = 0.01  # how often to look for blocks of an engine whose KV events are off


class TransferHandler:
    """The request handler.

    The answer is a ``TransferHead`` and then the blocks' bytes in order, cut anywhere. Blocks of a prompt that is still
    being computed follow as they become whole; then fewer may come than the head promises. Through shared memory each
    item after the head stands for one slot of the segment, and as many empty items as there are slots come last: the
    credit they need proves that the receiver has read every slot.

    Args:
        engine: Whose blocks.
        leases: Holds on them.
        rooms: Where the receiver waits if it comes before the prompt is computed.
        segments: Shared memory; None without.
        nixl: Memory that receivers read through NIXL; None without.
        timeout_s: Longest transfer of a receiver that names no deadline.
        clock: Time.
        metrics: Where counts go.
    """

    def __init__(  # noqa: PLR0913 - built once, every argument by name
        self,
        engine: SupportsKvHandoff,
        leases: LeaseTable,
        rooms: Rooms,
        *,
        segments: SegmentPool | None,
        nixl: NixlPool | None = None,
        timeout_s: float,
        clock: Clock,
        metrics: WorkerMetrics,
    ) -> None:
        self._engine = engine
        self._leases = leases
        self._rooms = rooms
        self._segments = segments
        self._nixl = nixl
        self._timeout_s = timeout_s
        self._clock = clock
        self._metrics = metrics
        self._layout = engine.block_access().layout

    async def __call__(self, payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        """Serve one pull; whatever becomes of it, its lease ends.

        Raises:
            InvalidRequestError: if the receiver's blocks have another shape or other hashes.
            DeadlineExceededError: if the receiver's time ran out.
        """
        request = _decode(payload)
        room = self._room(request, context)
        limit_s = self._timeout_s if request.deadline_s is None else min(request.deadline_s, self._timeout_s)
        try:
            self._require_same_shape(request)
            await within(self._clock, limit_s, self._serve(request, room, context, sink))
        except TimeoutError:
            raise DeadlineExceededError(f"The KV transfer took longer than {limit_s} s.") from None
        finally:
            if room is not None:
                room.is_served = True
                if not room.entered.is_set():
                    self._rooms.leave(request.transfer_id, room)
            await self._leases.release(request.transfer_id)

    def _room(self, request: TransferRequest, context: RequestContext) -> Room | None:
        """Return where to wait for the prompt; None if it is here. In one turn: a lease follows its room at once."""
        if self._leases.use(request.transfer_id) or BOOTSTRAP_HEADER not in context.headers:
            return None
        return self._rooms.join(request.transfer_id)

    async def _serve(
        self, request: TransferRequest, room: Room | None, context: RequestContext, sink: ResponseSink
    ) -> None:
        if room is not None:
            await room.entered.wait()
        await self._send(request, room, context, sink)

    async def _send(
        self, request: TransferRequest, room: Room | None, context: RequestContext, sink: ResponseSink
    ) -> None:
        hashes = list(request.sequence_hashes)
        if room is None and hashes:
            hashes = hashes[: await self._engine.match_blocks(hashes)]
        began = self._clock.monotonic()
        pool: LendingPool[Any] | None = self._pool_of(context.headers) if hashes else None
        segment: SlotMemory | None = pool.take() if pool is not None else None
        if pool is None or segment is None:
            sink.send(HEAD_ENCODER.encode(TransferHead(len(hashes))))
            sent = await self._send_bytes(self._groups(hashes, room, ITEM_BYTES), context, sink)
        else:
            reusable = False
            try:
                sent, reusable = await self._send_slots(hashes, room, segment, context, sink)
            finally:
                pool.give_back(segment, reusable=reusable)
        self._metrics.kv_transfer_blocks.labels(direction="sent").inc(sent)
        if sent:
            self._metrics.kv_transfer_seconds.observe(self._clock.monotonic() - began)

    def _pool_of(self, headers: Mapping[str, str]) -> LendingPool[Any] | None:
        if self._nixl is not None and NIXL_HEADER in headers:
            return self._nixl
        return self._segments if SHARED_MEMORY_HEADER in headers else None

    async def _groups(self, hashes: Sequence[int], room: Room | None, size_bytes: int) -> AsyncIterator[Sequence[int]]:
        """Yield the blocks in order, some at a time, as soon as they are here; end early if no more will be."""
        group = max(1, size_bytes // self._layout.block_bytes)
        sent = 0
        while sent < len(hashes):
            changed, is_over = self._rooms.changed, room is None or room.is_over  # first: what comes later wakes us
            ready = len(hashes) if room is None else await self._engine.match_blocks(hashes)
            if ready <= sent:
                if is_over:
                    return
                with contextlib.suppress(TimeoutError):
                    await within(self._clock, _LOOK_S, _wait(changed))
            while sent < ready:
                stop = min(sent + group, ready)
                yield hashes[sent:stop]
                sent = stop

    async def _send_bytes(
        self, groups: AsyncIterator[Sequence[int]], context: RequestContext, sink: ResponseSink
    ) -> int:
        sent = 0
        async for wanted in groups:
            found = await self._engine.export_blocks(wanted)
            data = found[0] if len(found) == 1 else b"".join(found)
            for start in range(0, len(data), ITEM_BYTES):
                await sink.wait_credit()
                if context.stopped:
                    return sent
                sink.send(data[start : start + ITEM_BYTES])
            sent += len(found)
            if len(found) < len(wanted):
                break
        return sent

    async def _send_slots(
        self,
        hashes: Sequence[int],
        room: Room | None,
        segment: SlotMemory,
        context: RequestContext,
        sink: ResponseSink,
    ) -> tuple[int, bool]:
        """Return how many blocks were sent, and whether the receiver has read them all."""
        size = self._layout.block_bytes
        slot_blocks = max(1, SLOT_BYTES // size)
        slots = len(segment.view) // (slot_blocks * size)
        sink.send(HEAD_ENCODER.encode(TransferHead(len(hashes), segment.name, slot_blocks, slots)))
        groups = self._groups(hashes, room, slot_blocks * size)
        sent = await self._fill_slots(groups, segment, slots, context, sink)
        return sent, await _all_slots_are_read(slots, context, sink)

    async def _fill_slots(
        self,
        groups: AsyncIterator[Sequence[int]],
        segment: SlotMemory,
        slots: int,
        context: RequestContext,
        sink: ResponseSink,
    ) -> int:
        size = self._layout.block_bytes
        number, sent = 0, 0
        async for wanted in groups:
            await sink.wait_credit()
            if context.stopped:
                break
            start = number % slots * (len(segment.view) // slots)
            found = await self._engine.read_blocks_into(wanted, segment.view[start : start + len(wanted) * size])
            sink.send(found.to_bytes(4, "little"))
            number, sent = number + 1, sent + found
            if found < len(wanted):
                break
        return sent

    def _require_same_shape(self, request: TransferRequest) -> None:
        require_algorithm(request.algorithm)
        if request.layout != self._layout:
            raise InvalidRequestError(
                f"the receiver's KV blocks are {request.layout}, this worker's are {self._layout}; "
                "use the same model, block size and KV dtype on both sides",
                reason="request.kv_layout_mismatch",
                param="layout",
            )


async def _wait(event: asyncio.Event) -> None:
    await event.wait()


async def _all_slots_are_read(slots: int, context: RequestContext, sink: ResponseSink) -> bool:
    for _ in range(slots):
        if context.stopped:
            return False
        await sink.wait_credit()
        if context.stopped:
            return False
        sink.send(b"")
    return True


def _decode(payload: bytes) -> TransferRequest:
    try:
        return TRANSFER_REQUEST.decode(payload)
    except BackendProtocolError as error:
        raise InvalidRequestError(f"the transfer request cannot be read: {error.message}") from error
