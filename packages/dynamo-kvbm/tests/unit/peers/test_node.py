from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack

import pytest

from dynamo_core.clock import SystemClock
from dynamo_core.ids import EndpointId
from dynamo_core.kv import BlockDescriptor, BlockLayout
from dynamo_core.memory import MemoryDiscovery, MemoryRequestPlane
from dynamo_core.planes import CallOptions, RequestContext, ResponseSink
from dynamo_core.telemetry import Metrics
from dynamo_kvbm._metrics import KvbmMetrics
from dynamo_kvbm._peers import server as peer_server
from dynamo_kvbm._peers.directory import Peer, PeerDirectory
from dynamo_kvbm._peers.node import PeerNode
from dynamo_kvbm._tiers.host import HostTier
from dynamo_kvbm._tiers.packed_block import packed_block

# 768 KiB: a block takes more than one item.
LAYOUT = BlockLayout(num_layers=24, block_size=16, kv_heads=8, head_dim=32, dtype="f32")
SIZE = LAYOUT.block_bytes
DEADLINE_S = 20.0


def content(item: int) -> bytes:
    return item.to_bytes(8, "little") * (SIZE // 8)


def chain(*hashes: int) -> list[BlockDescriptor]:
    return [BlockDescriptor(item, item ^ 5, hashes[i - 1] if i else None, i) for i, item in enumerate(hashes)]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0)


class Worker:
    """A host tier and its node on shared planes."""

    def __init__(self, discovery: MemoryDiscovery, plane: MemoryRequestPlane, fingerprint: str, known: int) -> None:
        self.plane = plane.peer()
        self.discovery = discovery.peer()
        self.tier = HostTier(8, SIZE)
        self.metrics = Metrics()
        self.node = PeerNode(
            discovery=self.discovery,
            plane=self.plane,
            namespace="test",
            layout=LAYOUT,
            fingerprint=fingerprint,
            read=self.read,
            max_blocks=known,
            clock=SystemClock(),
            metrics=KvbmMetrics(self.metrics),
        )

    def read(self, hashes: Sequence[int]) -> list[tuple[BlockDescriptor, bytes | memoryview]]:
        pairs = zip(hashes, self.tier.get(hashes), strict=True)
        return [
            (self.tier.describe([item])[0], data)
            for item, data in itertools.takewhile(lambda pair: pair[1] is not None, pairs)
            if data is not None
        ]

    def store(self, *hashes: int) -> None:
        self.tier.put(chain(*hashes), [content(item) for item in hashes])
        self.node.server.note(hashes, [])

    def knows(self, *hashes: int) -> bool:
        return all(self.node.directory.contains(hashes))

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


class Cluster:
    def __init__(self, stack: AsyncExitStack) -> None:
        self.discovery, self.plane = MemoryDiscovery(), MemoryRequestPlane()
        self._stack = stack

    async def worker(self, fingerprint: str = "m@1", known: int = 100) -> Worker:
        worker = Worker(self.discovery, self.plane, fingerprint, known)
        await worker.node.start()
        self._stack.push_async_callback(worker.plane.close)
        self._stack.push_async_callback(worker.discovery.close)
        self._stack.push_async_callback(worker.node.close)
        return worker


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:
        yield Cluster(stack)


async def test_blocks_come_whole_from_the_peer_that_holds_them(cluster: Cluster) -> None:
    first = await cluster.worker()
    first.store(1, 2, 3)
    second = await cluster.worker()
    await until(lambda: second.knows(1, 2, 3))
    found = await second.node.fetch([1, 2, 9], DEADLINE_S)
    assert {item: (block, bytes(data)) for item, (block, data) in found.items()} == {
        block.sequence_hash: (block, content(block.sequence_hash)) for block in chain(1, 2)
    }
    assert first.value("dynamo_kvbm_peer_sent_blocks_total") == 2
    assert second.value("dynamo_kvbm_peer_received_blocks_total") == 2
    assert not first.node.directory.contains([1])[0], "a worker is no peer of its own"


async def test_later_changes_are_followed(cluster: Cluster) -> None:
    first, second = await cluster.worker(), await cluster.worker()
    first.store(1)
    await until(lambda: second.knows(1))
    first.node.server.note([2], [1])
    await until(lambda: second.knows(2) and not second.knows(1))
    assert second.value("dynamo_kvbm_peer_known_blocks") == 1


async def test_the_peer_with_the_longest_prefix_is_asked(cluster: Cluster) -> None:
    short, long, asking = [await cluster.worker() for _ in range(3)]
    short.store(1)
    long.store(1, 2)
    await until(lambda: asking.knows(1, 2))
    await until(lambda: asking.value("dynamo_kvbm_peer_known_blocks") == 3)
    assert len(await asking.node.fetch([1, 2], DEADLINE_S)) == 2
    assert short.value("dynamo_kvbm_peer_sent_blocks_total") == 0


async def test_blocks_of_another_model_are_never_followed(cluster: Cluster) -> None:
    first, other, same = await cluster.worker(), await cluster.worker("m@2"), await cluster.worker()
    first.store(1)
    await until(lambda: same.knows(1))
    assert not other.knows(1)


async def test_a_peer_that_is_gone_is_forgotten_and_missed_by_nobody(cluster: Cluster) -> None:
    first, second = await cluster.worker(), await cluster.worker()
    first.store(1)
    await until(lambda: second.knows(1))
    await first.plane.close()
    assert await second.node.fetch([1], DEADLINE_S) == {}
    await until(lambda: not second.knows(1))


async def test_what_the_peer_has_dropped_ends_the_fetch_and_is_forgotten(cluster: Cluster) -> None:
    first, second = await cluster.worker(), await cluster.worker()
    first.store(1, 2)
    await until(lambda: second.knows(1, 2))
    first.tier.remove([2])
    assert list(await second.node.fetch([1, 2], DEADLINE_S)) == [1]
    assert second.node.directory.contains([1, 2]) == [True, False]


@pytest.mark.parametrize("damage", ["flip", "swap", "cut", "more"])
async def test_damaged_blocks_are_never_taken(cluster: Cluster, damage: str) -> None:
    asking = await cluster.worker()

    async def lie(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        one, two = (packed_block(block, content(block.sequence_hash)) for block in chain(1, 2))
        body = {"flip": two[:-1] + bytes([two[-1] ^ 1]), "swap": one, "cut": two[:-1], "more": two + two}[damage]
        sink.send(one)
        sink.send(body)

    liar = EndpointId("test", "kvbm", "peer_blocks")
    served = await cluster.plane.serve(liar, lie)
    peer = Peer(7, served.address)
    asking.node.directory.add(peer, [1, 2])
    found = await asking.node.fetch([1, 2], DEADLINE_S)
    assert {item: bytes(data) for item, (_, data) in found.items()} == {
        item: content(item) for item in ((1, 2) if damage == "more" else (1,))
    }
    await cluster.plane.close()


async def test_a_peer_that_is_late_leaves_what_had_arrived(cluster: Cluster) -> None:
    asking = await cluster.worker()

    async def stall(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        sink.send(packed_block(chain(1)[0], content(1)))
        await context.wait_stopped()

    served = await cluster.plane.serve(EndpointId("test", "kvbm", "peer_blocks"), stall)
    asking.node.directory.add(Peer(7, served.address), [1, 2])
    assert list(await asking.node.fetch([1, 2], 0.2)) == [1]
    assert asking.value("dynamo_kvbm_peer_failures_total", reason="request.deadline_exceeded") == 1
    await cluster.plane.close()


@pytest.mark.parametrize(
    ("header", "layout"), [({}, LAYOUT), ({"blocks_of": "x"}, LAYOUT), (None, BlockLayout(1, 1, 1, 1))]
)
async def test_other_blocks_are_refused_by_the_server_too(
    cluster: Cluster, header: dict[str, str] | None, layout: BlockLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = await cluster.worker(), await cluster.worker()
    first.store(1)
    await until(lambda: second.knows(1))
    if header is None:
        monkeypatch.setattr(second.node, "_layout", layout)
    else:
        monkeypatch.setattr(second.node, "_identity", header.get("blocks_of", ""))
    assert await second.node.fetch([1], DEADLINE_S) == {}
    assert second.value("dynamo_kvbm_peer_failures_total", reason="request.invalid_argument") == 1


async def test_a_busy_peer_refuses_at_once(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_server, "MAX_FETCHES", 0)
    first, second = await cluster.worker(), await cluster.worker()
    first.store(1)
    await until(lambda: second.knows(1))
    assert await second.node.fetch([1], DEADLINE_S) == {}
    assert second.value("dynamo_kvbm_peer_failures_total", reason="capacity.exhausted") == 1


async def test_what_is_known_of_peers_is_bounded(cluster: Cluster) -> None:
    first, second = await cluster.worker(), await cluster.worker(known=2)
    first.store(1, 2, 3)
    await until(lambda: second.value("dynamo_kvbm_peer_unnoted_blocks_total") == 1)
    assert second.value("dynamo_kvbm_peer_known_blocks") == 2


def test_a_directory_keeps_every_holder_apart() -> None:
    directory = PeerDirectory(10, KvbmMetrics(Metrics()))
    one, two = Peer(1, "a"), Peer(2, "b")
    directory.add(one, [1, 2, 2])
    directory.add(two, [1, 2, 3])
    assert directory.best([1, 2, 3]) == (two, 3)
    directory.forget(two)
    directory.remove(one, [9])
    assert (directory.best([1, 2, 3]), directory.best([3]), directory.best([])) == ((one, 2), None, None)
    directory.forget(one)
    assert directory.contains([1, 2, 3]) == [False] * 3


async def test_a_slow_follower_gets_changes_merged(cluster: Cluster) -> None:
    first = await cluster.worker()
    seen: list[bytes] = []
    ended = asyncio.Event()

    class Slow:
        def on_items(self, items: Sequence[bytes]) -> None:
            seen.extend(items)

        def on_end(self, error: object) -> None:
            ended.set()

    endpoint = EndpointId("test", "kvbm", "peer_inventory")
    (address,) = [served.address for served in first.node._served[:1]]
    options = CallOptions(credit_items=1, schema="dynamo_kvbm.peer_inventory.v1")
    call = await cluster.plane.open(address, endpoint, b"", Slow(), options)
    await until(lambda: len(seen) == 1)
    for item in range(100):
        first.node.server.note([item], [item - 1])
    call.grant(1)
    await until(lambda: len(seen) == 2)
    call.cancel()
    await asyncio.wait_for(ended.wait(), DEADLINE_S)
    assert b"\x63" in seen[1]
    assert len(seen[1]) < 16
