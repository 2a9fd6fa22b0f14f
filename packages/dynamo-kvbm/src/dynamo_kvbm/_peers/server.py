"""Gives peers this worker's inventory and blocks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

from dynamo_core.errors import CapacityExhaustedError, InvalidRequestError
from dynamo_core.kv import BlockDescriptor, BlockLayout, TransferRequest
from dynamo_core.planes import RequestContext, ResponseSink
from dynamo_core.tokens import require_algorithm
from dynamo_core.wire import TRANSFER_REQUEST
from dynamo_kvbm._metrics import KvbmMetrics
from dynamo_kvbm._peers.messages import BLOCKS_OF, ITEM_BYTES, InventoryChange, encode_change
from dynamo_kvbm._tiers.packed_block import packed_block

MAX_FETCHES = 4
MAX_FOLLOWERS = 256
READ_BLOCKS = 4
CHANGE_BLOCKS = 4096

ReadBlocks = Callable[[Sequence[int]], list[tuple[BlockDescriptor, bytes | memoryview]]]
"""Returns the longest prefix of these blocks that is held, with bytes that stay valid; any thread may call it."""


class PeerServer:
    """The handlers of both endpoints. All methods run on the event loop.

    Args:
        read: Reads blocks.
        layout: Shape of the blocks.
        identity: What the blocks are of.
        metrics: Where counts go.
    """

    def __init__(self, read: ReadBlocks, layout: BlockLayout, identity: str, metrics: KvbmMetrics) -> None:
        self._read = read
        self._layout = layout
        self._identity = identity
        self._metrics = metrics
        self._held: dict[int, None] = {}
        self._followers: dict[_Follower, None] = {}
        self._fetches = 0

    def note(self, stored: Iterable[int], removed: Iterable[int]) -> None:
        """Take in a change of the inventory and pass it on to followers."""
        stored, removed = list(stored), list(removed)
        for item in removed:
            self._held.pop(item, None)
        self._held.update(dict.fromkeys(stored))
        for follower in self._followers:
            follower.note(stored, removed)

    async def serve_inventory(self, payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        """Send the inventory and every change until the caller leaves.

        A caller that reads slowly gets later changes merged, never an endless queue.

        Raises:
            CapacityExhaustedError: if too many follow already.
        """
        if len(self._followers) >= MAX_FOLLOWERS:
            raise CapacityExhaustedError(f"{MAX_FOLLOWERS} peers follow this worker's inventory already")
        follower = _Follower(self._held)
        context.on_stop(follower.wake.set)
        self._followers[follower] = None
        try:
            while not context.stopped:
                await sink.wait_credit()
                for change in follower.take():
                    sink.send(encode_change(change))
                if not context.stopped:
                    await follower.wake.wait()
        finally:
            del self._followers[follower]

    async def serve_blocks(self, payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        """Send the longest prefix of the blocks asked for that is held.

        Raises:
            InvalidRequestError: if the caller's blocks have another shape, or are of another model.
            CapacityExhaustedError: if too many blocks are being sent already; the caller computes them instead.
        """
        request = TRANSFER_REQUEST.decode(payload)
        self._require_same(request, context)
        if self._fetches >= MAX_FETCHES:
            raise CapacityExhaustedError(f"{MAX_FETCHES} peers are being sent blocks already")
        self._fetches += 1
        try:
            await self._send(request.sequence_hashes, context, sink)
        finally:
            self._fetches -= 1

    async def _send(self, hashes: Sequence[int], context: RequestContext, sink: ResponseSink) -> None:
        for start in range(0, len(hashes), READ_BLOCKS):
            wanted = hashes[start : start + READ_BLOCKS]
            found = await asyncio.to_thread(self._read, wanted)
            for block, data in found:
                body = memoryview(await asyncio.to_thread(packed_block, block, data))
                for begin in range(0, len(body), ITEM_BYTES):
                    await sink.wait_credit()
                    if context.stopped:
                        return
                    sink.send(bytes(body[begin : begin + ITEM_BYTES]))
            self._metrics.peer_sent.inc(len(found))
            if len(found) < len(wanted):
                return

    def _require_same(self, request: TransferRequest, context: RequestContext) -> None:
        require_algorithm(request.algorithm)
        if request.layout != self._layout:
            raise InvalidRequestError(f"blocks here are {self._layout}, not {request.layout}", param="layout")
        if context.headers.get(BLOCKS_OF) != self._identity:
            raise InvalidRequestError("blocks here are of another model", param=BLOCKS_OF)


class _Follower:
    """What one caller has not been sent yet: at most the inventory and what left it since."""

    def __init__(self, held: Iterable[int]) -> None:
        self._stored = dict.fromkeys(held)
        self._removed: dict[int, None] = {}
        self._sent: set[int] = set()
        self.wake = asyncio.Event()

    def note(self, stored: Iterable[int], removed: Iterable[int]) -> None:
        for item in removed:
            self._stored.pop(item, None)
            if item in self._sent:
                self._removed[item] = None
        for item in stored:
            self._removed.pop(item, None)
            if item not in self._sent:
                self._stored[item] = None
        self.wake.set()

    def take(self) -> list[InventoryChange]:
        """Return what is to be sent; the first time at least one change, if only to say that nothing is held."""
        self.wake.clear()
        stored, removed = list(self._stored), list(self._removed)
        self._stored.clear()
        self._removed.clear()
        self._sent.difference_update(removed)
        self._sent.update(stored)
        count = max(len(stored), len(removed), 1)
        return [
            InventoryChange(tuple(stored[at : at + CHANGE_BLOCKS]), tuple(removed[at : at + CHANGE_BLOCKS]))
            for at in range(0, count, CHANGE_BLOCKS)
        ]
