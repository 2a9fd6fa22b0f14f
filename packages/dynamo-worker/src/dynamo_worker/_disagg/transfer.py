"""Serves ``worker_kv_transfer``: gives the bytes of leased blocks to whoever asks for them."""

from __future__ import annotations

from collections.abc import Sequence

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
from dynamo_worker._disagg.segments import SLOT_BYTES, Segment, SegmentPool
from dynamo_worker._metrics import WorkerMetrics

ITEM_BYTES = 1 << 19


class TransferHandler:
    """The request handler.

    The answer is a ``TransferHead`` and then the blocks' bytes in order, cut anywhere. Through shared memory each item
    after the head stands for one slot of the segment, and as many empty items as there are slots come last: the credit
    they need proves that the receiver has read every slot.

    Args:
        engine: Whose blocks.
        leases: Holds on them.
        segments: Shared memory; None to send bytes only.
        timeout_s: Longest transfer of a receiver that names no deadline.
        clock: Time.
        metrics: Where counts go.
    """

    def __init__(
        self,
        engine: SupportsKvHandoff,
        leases: LeaseTable,
        *,
        segments: SegmentPool | None,
        timeout_s: float,
        clock: Clock,
        metrics: WorkerMetrics,
    ) -> None:
        self._engine = engine
        self._leases = leases
        self._segments = segments
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
        self._leases.use(request.transfer_id)
        limit_s = self._timeout_s if request.deadline_s is None else min(request.deadline_s, self._timeout_s)
        try:
            self._require_same_shape(request)
            await within(self._clock, limit_s, self._send(request, context, sink))
        except TimeoutError:
            raise DeadlineExceededError(f"The KV transfer took longer than {limit_s} s.") from None
        finally:
            await self._leases.release(request.transfer_id)

    async def _send(self, request: TransferRequest, context: RequestContext, sink: ResponseSink) -> None:
        wanted = list(request.sequence_hashes)
        hashes = wanted[: await self._engine.match_blocks(wanted)] if wanted else []
        began = self._clock.monotonic()
        segment = None
        if hashes and self._segments is not None and SHARED_MEMORY_HEADER in context.headers:
            segment = self._segments.take()
        if segment is None:
            sink.send(HEAD_ENCODER.encode(TransferHead(len(hashes))))
            await self._send_bytes(hashes, context, sink)
        else:
            await self._send_slots(hashes, segment, context, sink)
        self._metrics.kv_transfer_blocks.labels(direction="sent").inc(len(hashes))
        if hashes:
            self._metrics.kv_transfer_seconds.observe(self._clock.monotonic() - began)

    async def _send_bytes(self, hashes: Sequence[int], context: RequestContext, sink: ResponseSink) -> None:
        group = max(1, ITEM_BYTES // self._layout.block_bytes)
        for first in range(0, len(hashes), group):
            wanted = hashes[first : first + group]
            found = await self._engine.export_blocks(wanted)
            data = found[0] if len(found) == 1 else b"".join(found)
            for start in range(0, len(data), ITEM_BYTES):
                await sink.wait_credit()
                if context.stopped:
                    return
                sink.send(data[start : start + ITEM_BYTES])
            if len(found) < len(wanted):
                return

    async def _send_slots(
        self, hashes: Sequence[int], segment: Segment, context: RequestContext, sink: ResponseSink
    ) -> None:
        assert self._segments is not None
        reusable = False
        try:
            reusable = await self._fill_slots(hashes, segment, context, sink)
        finally:
            self._segments.give_back(segment, reusable=reusable)

    async def _fill_slots(
        self, hashes: Sequence[int], segment: Segment, context: RequestContext, sink: ResponseSink
    ) -> bool:
        """Send all blocks; return whether the receiver has read every slot."""
        size = self._layout.block_bytes
        slot_blocks = max(1, SLOT_BYTES // size)
        slots = len(segment.view) // (slot_blocks * size)
        sink.send(HEAD_ENCODER.encode(TransferHead(len(hashes), str(segment.path), slot_blocks, slots)))
        for number, first in enumerate(range(0, len(hashes), slot_blocks)):
            wanted = hashes[first : first + slot_blocks]
            await sink.wait_credit()
            if context.stopped:
                return False
            start = number % slots * slot_blocks * size
            found = await self._engine.read_blocks_into(wanted, segment.view[start : start + len(wanted) * size])
            sink.send(found.to_bytes(4, "little"))
            if found < len(wanted):
                break
        for _ in range(slots):
            await sink.wait_credit()
            if context.stopped:
                return False
            sink.send(b"")
        return True

    def _require_same_shape(self, request: TransferRequest) -> None:
        require_algorithm(request.algorithm)
        if request.layout != self._layout:
            raise InvalidRequestError(
                f"the receiver's KV blocks are {request.layout}, this worker's are {self._layout}; "
                "use the same model, block size and KV dtype on both sides",
                reason="request.kv_layout_mismatch",
                param="layout",
            )


def _decode(payload: bytes) -> TransferRequest:
    try:
        return TRANSFER_REQUEST.decode(payload)
    except BackendProtocolError as error:
        raise InvalidRequestError(f"the transfer request cannot be read: {error.message}") from error
