"""Pulls the missing blocks of a prompt from a prefill worker into the device cache, as they arrive."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import msgspec

from dynamo_core.clock import Clock
from dynamo_core.errors import BackendProtocolError, DynamoError
from dynamo_core.ids import EndpointId
from dynamo_core.kv import BlockDescriptor, TransferRequest
from dynamo_core.planes import Call, CallOptions, RequestPlane
from dynamo_core.wire import TRANSFER_REQUEST
from dynamo_worker._disagg.handoff import HEAD_DECODER, SHARED_MEMORY_HEADER, KvHandoff, SupportsKvHandoff, TransferHead
from dynamo_worker._disagg.nixl import NIXL_HEADER, NIXL_NAME, NixlPool, NixlReader, NixlSegment
from dynamo_worker._disagg.rooms import BOOTSTRAP_HEADER
from dynamo_worker._disagg.segments import SEGMENT_SLOTS, SHARED_FOLDER, Segment, is_shared
from dynamo_worker._metrics import WorkerMetrics

_IMPORT_BYTES = 1 << 20
_CREDIT_ITEMS = 16
MAX_MAPPED_SEGMENTS = 16


class _Items:
    """A receiver whose credit is given back only when an item's content has been used."""

    def __init__(self) -> None:
        self._items: deque[bytes] = deque()
        self._ended = False
        self._error: DynamoError | None = None
        self._arrived = asyncio.Event()
        self.call: Call | None = None

    def on_items(self, items: Sequence[bytes]) -> None:
        self._items.extend(items)
        self._arrived.set()

    def on_end(self, error: DynamoError | None) -> None:
        self._ended, self._error = True, error
        self._arrived.set()

    async def next(self) -> bytes | None:
        """Return the next item, None at the clean end."""
        while not self._items:
            if self._ended:
                if self._error is not None:
                    raise self._error
                return None
            self._arrived.clear()
            await self._arrived.wait()
        return self._items.popleft()

    def used(self) -> None:
        if self.call is not None and not self._ended:
            self.call.grant(1)

    def close(self) -> None:
        if self.call is not None and not self._ended:
            self.call.cancel(kill=True)


class BlockPuller:
    """The decode side of a transfer.

    Args:
        engine: Where blocks go.
        plane: Request plane.
        timeout_s: Longest transfer.
        metrics: Where counts go.
        use_shared_memory: Whether to map the sender's memory where both share it.
        nixl: Memory that NIXL reads into, for senders that have it too; None without.
        clock: Time between two looks at a NIXL transfer.
    """

    def __init__(  # noqa: PLR0913 - built once, every argument by name
        self,
        engine: SupportsKvHandoff,
        plane: RequestPlane,
        *,
        timeout_s: float,
        metrics: WorkerMetrics,
        clock: Clock,
        use_shared_memory: bool = True,
        nixl: NixlPool | None = None,
    ) -> None:
        self._engine = engine
        self._plane = plane
        self._timeout_s = timeout_s
        self._metrics = metrics
        self._clock = clock
        self._use_shared_memory = use_shared_memory
        self._nixl = nixl
        self._segments: dict[str, Segment] = {}

    async def pull(self, handoff: KvHandoff, blocks: Sequence[BlockDescriptor]) -> int:
        """Bring the blocks that the device lacks; return how many came. Cancelling keeps those that came.

        A pull for which nothing is missing still tells the sender, so that its lease ends.

        Raises:
            DynamoError: what ended the transfer; blocks that came before stay.
        """
        held = await self._engine.match_blocks([block.sequence_hash for block in blocks])
        missing = blocks[held:]
        pool = self._nixl if handoff.nixl and missing else None
        into, reusable = pool.take() if pool is not None else None, False
        try:
            came = await self._pull_missing(handoff, missing, into)
            reusable = True
        finally:
            if pool is not None and into is not None:
                pool.give_back(into, reusable=reusable)
        return came

    async def _pull_missing(
        self, handoff: KvHandoff, missing: Sequence[BlockDescriptor], into: NixlSegment | None
    ) -> int:
        layout = self._engine.block_access().layout
        request = TransferRequest(
            handoff.lease_id,
            tuple(block.sequence_hash for block in missing),
            layout,
            handoff.algorithm,
            deadline_s=self._timeout_s,
        )
        way = self._way(handoff, into)
        headers = {name: "1" for name in (way, BOOTSTRAP_HEADER if handoff.bootstrap else "") if name}
        # Through slots the credit is the number of them that the sender may fill ahead of us, plus the head.
        credit = SEGMENT_SLOTS if way else _CREDIT_ITEMS
        options = CallOptions(
            handoff.lease_id,
            self._timeout_s,
            headers,
            credit,
            TRANSFER_REQUEST.schema,
        )
        items = _Items()
        payload = TRANSFER_REQUEST.encode(request)
        endpoint = EndpointId.parse(handoff.endpoint)
        items.call = await self._plane.open(handoff.address, endpoint, payload, items, options)
        try:
            came = await self._receive(items, missing, layout.block_bytes, into)
        finally:
            items.close()
        self._metrics.kv_transfer_blocks.labels(direction="received").inc(came)
        self._metrics.kv_transfer_bytes.inc(came * layout.block_bytes)
        return came

    def close(self) -> None:
        """Unmap everything."""
        for segment in self._segments.values():
            segment.close()
        self._segments.clear()

    def _way(self, handoff: KvHandoff, into: NixlSegment | None) -> str:
        if into is not None:
            return NIXL_HEADER
        return SHARED_MEMORY_HEADER if self._use_shared_memory and is_shared(handoff.shared_memory) else ""

    async def _receive(
        self, items: _Items, missing: Sequence[BlockDescriptor], block_bytes: int, into: NixlSegment | None
    ) -> int:
        first = await items.next()
        head = _head(first)
        items.used()
        if head.blocks > len(missing):
            raise BackendProtocolError(f"the sender promises {head.blocks} blocks, {len(missing)} were asked for")
        if head.segment.startswith(NIXL_NAME) and self._nixl is not None and into is not None:
            reader = NixlReader(self._nixl.agent, head.segment, into, self._clock)
            try:
                return await self._receive_slots(items, head, reader, missing, block_bytes)
            finally:
                reader.close()
        if head.segment:
            segment = self._map(head.segment, head.slots * head.slot_blocks * block_bytes)
            return await self._receive_slots(items, head, segment, missing, block_bytes)
        return await self._receive_bytes(items, missing[: head.blocks], block_bytes)

    async def _receive_bytes(self, items: _Items, missing: Sequence[BlockDescriptor], block_bytes: int) -> int:
        pending = bytearray()
        came = 0
        step = max(1, _IMPORT_BYTES // block_bytes) * block_bytes
        while (item := await items.next()) is not None:
            pending += item
            if len(pending) >= step:
                whole = len(pending) // block_bytes
                fitted = await self._import(missing[came : came + whole], memoryview(bytes(pending)), block_bytes)
                del pending[: whole * block_bytes]
                came += fitted
                if fitted < whole:
                    return came
            items.used()
        whole = len(pending) // block_bytes
        if whole * block_bytes != len(pending) or came + whole > len(missing):
            raise BackendProtocolError("the sender's KV bytes are no whole number of the blocks asked for")
        return came + await self._import(missing[came : came + whole], memoryview(bytes(pending)), block_bytes)

    async def _receive_slots(
        self,
        items: _Items,
        head: TransferHead,
        slots: Segment | NixlReader,
        missing: Sequence[BlockDescriptor],
        block_bytes: int,
    ) -> int:
        slot_bytes = head.slot_blocks * block_bytes
        came, number, seen, is_full = 0, 0, 0, False
        while (item := await items.next()) is not None:
            count = int.from_bytes(item, "little")
            if count > min(head.slot_blocks, len(missing) - seen):
                raise BackendProtocolError(f"the sender fills a slot with {count} blocks, which is too many")
            if count and not is_full:
                start = number % head.slots * slot_bytes
                view = await slots.read(start, count * block_bytes)
                fitted = await self._import(missing[came : came + count], view, block_bytes)
                came += fitted
                is_full = fitted < count
            number, seen = number + (1 if count else 0), seen + count
            items.used()
        return came

    async def _import(self, blocks: Sequence[BlockDescriptor], data: memoryview, block_bytes: int) -> int:
        if not blocks:
            return 0
        pieces = [data[index * block_bytes : (index + 1) * block_bytes] for index in range(len(blocks))]
        return await self._engine.import_blocks(blocks, pieces)

    def _map(self, path: str, size_bytes: int) -> Segment:
        known = self._segments.pop(path, None)
        if known is None:
            if Path(path).parent != SHARED_FOLDER:
                raise BackendProtocolError(f"the sender's shared memory {path!r} is not in {SHARED_FOLDER}")
            try:
                known = Segment(Path(path), size_bytes, create=False)
            except OSError as error:
                raise BackendProtocolError(f"the sender's shared memory cannot be mapped: {error}") from error
        self._segments[path] = known  # last used, last in order
        while len(self._segments) > MAX_MAPPED_SEGMENTS:
            self._segments.pop(next(iter(self._segments))).close()
        return known


def _head(item: bytes | None) -> TransferHead:
    if item is None:
        raise BackendProtocolError("the sender answered nothing", reason="backend.stream_incomplete")
    try:
        return HEAD_DECODER.decode(item)
    except msgspec.MsgspecError as error:
        raise BackendProtocolError(f"the sender's transfer head cannot be read: {error}") from error
