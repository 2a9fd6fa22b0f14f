"""One worker among its peers: it serves its host tier, follows the others', and fetches from them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

import structlog

from dynamo_core.clock import Clock
from dynamo_core.discovery import (
    INSTANCES_PREFIX,
    Discovery,
    Instance,
    RecordDeleted,
    RecordPut,
    endpoint_prefix,
)
from dynamo_core.errors import DynamoError
from dynamo_core.ids import EndpointId, InstanceId, new_instance_id, new_request_id
from dynamo_core.kv import BlockDescriptor, BlockLayout, TransferRequest
from dynamo_core.planes import CallOptions, RequestPlane, ServedEndpoint
from dynamo_core.streams import open_stream
from dynamo_core.wire import INSTANCE, TRANSFER_REQUEST
from dynamo_kvbm._metrics import KvbmMetrics
from dynamo_kvbm._peers import messages
from dynamo_kvbm._peers.directory import Peer, PeerDirectory
from dynamo_kvbm._peers.messages import BLOCKS_ADDRESS, BLOCKS_OF, decode_change
from dynamo_kvbm._peers.server import PeerServer, ReadBlocks
from dynamo_kvbm._tiers.packed_block import HEADER, unpacked_block

MAX_PEERS = 64
RETRY_S = 1.0
MAX_RETRY_S = 30.0

Found = dict[int, tuple[BlockDescriptor, memoryview]]

_log = structlog.get_logger(__name__)


class PeerNode:
    """All methods run on one event loop; ``directory`` may be read from any thread.

    Args:
        discovery: Started plane on which peers find each other.
        plane: Started plane on which they talk.
        namespace: Whose peers.
        layout: Shape of the blocks.
        fingerprint: What the blocks are of; peers with other blocks are passed over.
        read: Reads blocks of this worker.
        max_blocks: Most blocks known of all peers.
        clock: Time.
        metrics: Where counts go.
    """

    def __init__(  # noqa: PLR0913 - built in one place, every argument by name
        self,
        *,
        discovery: Discovery,
        plane: RequestPlane,
        namespace: str,
        layout: BlockLayout,
        fingerprint: str,
        read: ReadBlocks,
        max_blocks: int,
        clock: Clock,
        metrics: KvbmMetrics,
    ) -> None:
        self.instance_id: InstanceId = new_instance_id()
        self.directory = PeerDirectory(max_blocks, metrics)
        self._discovery = discovery
        self._plane = plane
        self._inventory = EndpointId(namespace, messages.COMPONENT, messages.INVENTORY_ENDPOINT)
        self._blocks = EndpointId(namespace, messages.COMPONENT, messages.BLOCKS_ENDPOINT)
        self._layout = layout
        self._identity = messages.identity_of(fingerprint)
        self._clock = clock
        self._metrics = metrics
        self.server = PeerServer(read, layout, self._identity, metrics)
        self._served: list[ServedEndpoint] = []
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Serve, register, and begin to follow peers.

        Raises:
            DynamoError: if a plane refuses.
        """
        blocks = await self._plane.serve(self._blocks, self.server.serve_blocks, schema=TRANSFER_REQUEST.schema)
        inventory = await self._plane.serve(
            self._inventory, self.server.serve_inventory, schema=messages.INVENTORY_SCHEMA
        )
        self._served = [inventory, blocks]
        facts = {BLOCKS_ADDRESS: blocks.address, BLOCKS_OF: self._identity}
        record = Instance(self._inventory, self.instance_id, inventory.address, metadata=facts)
        lease = await self._discovery.lease()
        await self._discovery.put(record.key, INSTANCE.encode(record), lease=lease)
        self._spawn("", self._watch())

    async def close(self) -> None:
        """Leave. Idempotent; cancellation leaves the rest to the planes' own close."""
        tasks, self._tasks = list(self._tasks.values()), {}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        served, self._served = self._served, []
        for endpoint in served:
            await endpoint.close()

    async def fetch(self, sequence_hashes: Sequence[int], limit_s: float) -> Found:
        """Return the longest prefix of these blocks that the best peer sends whole within the time.

        A peer that refuses, is lost or is late leaves what had arrived. Cancelling ends the call on the peer too.
        """
        found = self.directory.best(sequence_hashes)
        if found is None:
            return {}
        peer, length = found
        request = TransferRequest(new_request_id(), tuple(sequence_hashes[:length]), self._layout, deadline_s=limit_s)
        options = CallOptions(
            request.transfer_id, limit_s, headers={BLOCKS_OF: self._identity}, schema=TRANSFER_REQUEST.schema
        )
        blocks: Found = {}
        try:
            await self._receive(peer, request, options, blocks)
        except DynamoError as error:
            self._metrics.peer_failures.labels(error.reason).inc()
            _log.warning("peer did not send all blocks", peer=peer.address, arrived=len(blocks), error=str(error))
        self._metrics.peer_received.inc(len(blocks))
        # What it did not send it may no longer have; its next change says so again if it has.
        self.directory.remove(peer, [item for item in request.sequence_hashes if item not in blocks][:1])
        return blocks

    async def _receive(self, peer: Peer, request: TransferRequest, options: CallOptions, blocks: Found) -> None:
        size = HEADER.size + self._layout.block_bytes
        wanted = iter(request.sequence_hashes)
        body = bytearray()
        stream = await open_stream(self._plane, peer.address, self._blocks, TRANSFER_REQUEST.encode(request), options)
        async with stream:
            async for item in stream:
                body += item
                while len(body) >= size:
                    expected = next(wanted, None)
                    whole, body = body[:size], body[size:]
                    block = None if expected is None else unpacked_block(expected, memoryview(whole))
                    if block is None:
                        self._metrics.peer_failures.labels("checksum").inc()
                        return
                    blocks[block[0].sequence_hash] = block

    async def _watch(self) -> None:
        async for event in self._discovery.watch(INSTANCES_PREFIX + endpoint_prefix(self._inventory)):
            if isinstance(event, RecordPut):
                self._meet(event.key, event.value)
            elif isinstance(event, RecordDeleted) and (task := self._tasks.pop(event.key, None)) is not None:
                task.cancel()

    def _meet(self, key: str, value: bytes) -> None:
        try:
            instance = INSTANCE.decode(value)
        except DynamoError as error:
            _log.warning("peer record cannot be read", key=key, error=str(error))
            return
        mine = instance.instance_id == self.instance_id or instance.metadata.get(BLOCKS_OF) != self._identity
        if mine or key in self._tasks:
            return
        if len(self._tasks) > MAX_PEERS:
            _log.warning("too many peers; this one is not followed", peer=instance.address, limit=MAX_PEERS)
            return
        self._spawn(key, self._follow(instance))

    async def _follow(self, instance: Instance) -> None:
        """Keep the directory true to one peer, for as long as it is registered."""
        peer = Peer(instance.instance_id, instance.metadata.get(BLOCKS_ADDRESS, instance.address))
        delay_s = RETRY_S
        try:
            while True:
                try:
                    await self._listen(peer, instance.address)
                except DynamoError as error:
                    _log.info("peer inventory lost", peer=instance.address, error=str(error))
                self.directory.forget(peer)
                await self._clock.sleep(delay_s)
                delay_s = min(2 * delay_s, MAX_RETRY_S)
        finally:
            self.directory.forget(peer)

    async def _listen(self, peer: Peer, address: str) -> None:
        options = CallOptions(new_request_id(), schema=messages.INVENTORY_SCHEMA)
        async with await open_stream(self._plane, address, self._inventory, b"", options) as stream:
            async for item in stream:
                change = decode_change(item)
                self.directory.remove(peer, change.removed)
                self.directory.add(peer, change.stored)

    def _spawn(self, key: str, work: Coroutine[Any, Any, None]) -> None:
        task = self._tasks[key] = asyncio.create_task(work, name=f"kvbm-peer {key}")
        task.add_done_callback(_report)


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.warning("a peer task ended", task=task.get_name(), error=str(error))
