"""A publisher as vLLM has it (PUB with sequence numbers, ROUTER for replay), and what the relay makes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from dynamo_core.clock import SystemClock
from dynamo_core.enums import Tier
from dynamo_core.errors import BackendProtocolError, ConfigurationError
from dynamo_core.kv import BlockDescriptor
from dynamo_core.tokens import BlockHasher, pack_tokens, unpack_hashes
from dynamo_worker._kv_relay.events import Cleared, Removed, Stored, decode_batch
from dynamo_worker._kv_relay.relay import KvEventRelay, rank_endpoint

TOKENS = list(range(100, 108))
END = (1 << 64) - 1


class Sink:
    def __init__(self) -> None:
        self.reports: list[tuple[str, Any]] = []
        self.changed = asyncio.Event()

    def stored(self, blocks: Sequence[BlockDescriptor], *, tier: Tier = Tier.DEVICE, lora: str = "") -> None:
        self._note("stored", (list(blocks), tier, lora))

    def removed(self, sequence_hashes: Sequence[int], *, tier: Tier = Tier.DEVICE) -> None:
        self._note("removed", list(sequence_hashes))

    def cleared(self) -> None:
        self._note("cleared", None)

    def _note(self, kind: str, value: Any) -> None:
        self.reports.append((kind, value))
        self.changed.set()

    async def until(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.reports) < count:
                self.changed.clear()
                await self.changed.wait()

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.reports]


class Publisher:
    """One rank of an engine."""

    def __init__(self, *, replays: bool = True) -> None:
        self.context = zmq.asyncio.Context()
        self.socket = self.context.socket(zmq.XPUB)
        self.endpoint = f"tcp://127.0.0.1:{self.socket.bind_to_random_port('tcp://127.0.0.1')}"
        self.router = self.context.socket(zmq.ROUTER)
        port = self.router.bind_to_random_port("tcp://127.0.0.1")
        self.replay_endpoint = f"tcp://127.0.0.1:{port}" if replays else ""
        self.kept: list[tuple[int, bytes]] = []
        self.sequence = 0
        self.task = asyncio.ensure_future(self._serve())

    async def subscribed(self) -> None:
        await asyncio.wait_for(self.socket.recv(), 10)

    async def publish(self, *events: Any, lost: bool = False, kept: bool = True) -> None:
        payload = msgspec.msgpack.encode([1.0, list(events), 0])
        if kept:
            self.kept.append((self.sequence, payload))
        if not lost:
            await self.socket.send_multipart([b"", self.sequence.to_bytes(8, "big"), payload])
        self.sequence += 1

    async def repeat(self, sequence: int) -> None:
        await self.socket.send_multipart([b"", sequence.to_bytes(8, "big"), dict(self.kept)[sequence]])

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.context.destroy(linger=0)

    async def _serve(self) -> None:
        while True:
            client, _, start = await self.router.recv_multipart()
            for sequence, payload in self.kept:
                if sequence >= int.from_bytes(start, "big"):
                    await self.router.send_multipart([client, b"", sequence.to_bytes(8, "big"), payload])
            await self.router.send_multipart([client, b"", END.to_bytes(8, "big"), b""])


def stored(hashes: list[Any], tokens: list[int], parent: Any = None, **rest: Any) -> dict[str, Any]:
    return {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": parent,
        "token_ids": tokens,
        "block_size": 4,
        **rest,
    }


@pytest.fixture
async def rig() -> AsyncIterator[Any]:
    opened: list[Any] = []

    def build(*, replays: bool = True) -> tuple[Publisher, KvEventRelay, Sink]:
        publisher, sink = Publisher(replays=replays), Sink()
        relay = KvEventRelay(
            publisher.endpoint,
            replay_endpoint=publisher.replay_endpoint,
            topic="",
            block_size=4,
            sink=sink,
            clock=SystemClock(),
        )
        opened.append((relay, publisher))
        return publisher, relay, sink

    yield build
    for relay, publisher in opened:
        await relay.close()
        await publisher.close()


async def test_blocks_keep_the_engines_names_and_get_our_content_hashes(rig: Any) -> None:
    publisher, relay, sink = rig()
    relay.start()
    await publisher.subscribed()
    await publisher.publish(stored([11, -1], TOKENS, medium="GPU"))
    await publisher.publish(stored([13], [1, 2, 3, 4], parent=-1, lora_name="fast", medium="CPU"))
    await sink.until(2)
    local = unpack_hashes(BlockHasher(4).hash_tokens(pack_tokens(TOKENS)).local)
    last = (1 << 64) - 1
    assert sink.reports[0][1] == (
        [BlockDescriptor(11, local[0], None, 0), BlockDescriptor(last, local[1], 11, 1)],
        Tier.DEVICE,
        "",
    )
    (block,), tier, lora = sink.reports[1][1]
    assert (block.parent_hash, block.position, tier, lora) == (last, 2, Tier.HOST, "fast")
    assert (
        block.local_hash == unpack_hashes(BlockHasher(4, lora="fast").hash_tokens(pack_tokens([1, 2, 3, 4])).local)[0]
    )


async def test_what_came_before_the_relay_is_replayed(rig: Any) -> None:
    publisher, relay, sink = rig()
    await publisher.publish(stored([11], TOKENS[:4]))
    await publisher.publish({"type": "BlockRemoved", "block_hashes": [11]})
    relay.start()
    await sink.until(2)
    assert sink.kinds == ["stored", "removed"]


async def test_a_first_message_that_was_replayed_too_is_no_restart(rig: Any) -> None:
    publisher, relay, sink = rig()
    await publisher.publish(stored([11], TOKENS[:4]), lost=True)
    relay.start()
    await publisher.subscribed()
    await sink.until(1)
    await publisher.repeat(0)
    await publisher.publish(stored([12], TOKENS[4:], parent=11))
    await sink.until(2)
    assert sink.kinds == ["stored", "stored"]


async def test_a_gap_is_filled_from_the_replay(rig: Any) -> None:
    publisher, relay, sink = rig()
    relay.start()
    await publisher.subscribed()
    await publisher.publish(stored([11], TOKENS[:4]))
    await sink.until(1)
    await publisher.publish(stored([12], TOKENS[4:], parent=11), lost=True)
    await publisher.publish({"type": "AllBlocksCleared"})
    await sink.until(3)
    assert sink.kinds == ["stored", "stored", "cleared"]


async def test_a_gap_that_cannot_be_filled_clears_the_rank(rig: Any) -> None:
    publisher, relay, sink = rig(replays=False)
    relay.start()
    await publisher.subscribed()
    await publisher.publish(stored([11], TOKENS[:4]))
    await publisher.publish(stored([12], TOKENS[4:], parent=11), lost=True)
    await publisher.publish(stored([13], TOKENS[:4]))
    await sink.until(3)
    assert sink.kinds == ["stored", "cleared", "stored"]


async def test_an_engine_that_begins_anew_is_noticed(rig: Any) -> None:
    publisher, relay, sink = rig(replays=False)
    relay.start()
    await publisher.subscribed()
    await publisher.publish(stored([11], TOKENS[:4]))
    await publisher.publish(stored([12], TOKENS[4:], parent=11))
    publisher.sequence = 0
    await publisher.publish(stored([13], TOKENS[:4]))
    await sink.until(4)
    assert sink.kinds == ["stored", "stored", "cleared", "stored"]


async def test_another_block_size_is_not_relayed(rig: Any) -> None:
    publisher, relay, sink = rig(replays=False)
    relay.start()
    await publisher.subscribed()
    await publisher.publish({**stored([11], TOKENS), "block_size": 8})
    await publisher.publish(stored([12], TOKENS[:4]))
    await sink.until(2)
    assert sink.kinds == ["cleared", "stored"]


def test_events_as_arrays_and_hashes_as_bytes() -> None:
    name = bytes(range(32))
    payload = msgspec.msgpack.encode(
        [
            2.5,
            [
                ["BlockStored", [name], None, [1, 2], 2, None, "GPU", "fast", None, "future"],
                ["BlockRemoved", [name], "NVME"],
                ["AllBlocksCleared"],
                ["SomethingNew", 1],
            ],
            3,
            "future",
        ]
    )
    batch = decode_batch(payload)
    number = int.from_bytes(name[-8:], "big")
    assert batch.events == (
        Stored((number,), None, (1, 2), 2, Tier.DEVICE, "fast"),
        Removed((number,), Tier.DISK),
        Cleared(),
    )
    assert (batch.dp_rank, batch.num_unknown) == (3, 1)


@pytest.mark.parametrize("payload", [b"", b"\x01", msgspec.msgpack.encode([1.0, [{"type": "BlockStored"}]]), b"\xc1"])
def test_garbage_is_a_typed_error(payload: bytes) -> None:
    with pytest.raises(BackendProtocolError):
        decode_batch(payload)


def test_ranks_count_from_the_port() -> None:
    assert rank_endpoint("tcp://host:5557", 0) == "tcp://host:5557"
    assert rank_endpoint("tcp://host:5557", 3) == "tcp://host:5560"
    assert rank_endpoint("", 3) == ""
    with pytest.raises(ConfigurationError, match="has no port"):
        rank_endpoint("ipc:///tmp/events", 1)
