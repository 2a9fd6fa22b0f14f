"""KV events: numbering, batching, gaps, dumps, tiers, and engines that report from their own threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_core.engine import EngineConfig, KvEventSink
from dynamo_core.enums import Tier
from dynamo_core.errors import NotFoundError
from dynamo_core.events import BlockRemoved, BlocksCleared, BlockStored, KvEvent, KvEventBatch
from dynamo_core.ids import WorkerId
from dynamo_core.kv import (
    BlockDescriptor,
    BlockHints,
    MatchResult,
    SupportsBlockHints,
    SupportsPrefetch,
    TierChange,
)
from dynamo_core.planes import KV_EVENTS
from dynamo_core.tokens import unpack_hashes
from dynamo_core.wire import KV_EVENT_BATCH
from dynamo_worker._kv_index import KvIndex
from dynamo_worker._tier_events import PublishingConnector


def chain(*hashes: int, parent: int | None = None, start: int = 0) -> list[BlockDescriptor]:
    made: list[BlockDescriptor] = []
    for position, sequence_hash in enumerate(hashes, start):
        made.append(BlockDescriptor(sequence_hash, sequence_hash + 1000, parent, position))
        parent = sequence_hash
    return made


class Replica:
    """Applies events as a router would, and minds their order."""

    def __init__(self) -> None:
        self.present: set[tuple[int, Tier]] = set()
        self.last = 0

    def apply(self, batch: KvEventBatch) -> None:
        if batch.full_dump:
            self.present.clear()
            self.last = batch.events[-1].event_id
        for event in batch.events:
            if not batch.full_dump:
                assert event.event_id == self.last + 1
                self.last = event.event_id
            self._apply(event)

    def _apply(self, event: KvEvent) -> None:
        if isinstance(event, BlockStored):
            known = {sequence_hash for sequence_hash, _ in self.present}
            assert event.parent_hash is None or event.parent_hash in known
            self.present |= {(sequence_hash, event.tier) for sequence_hash in unpack_hashes(event.engine_hashes)}
        elif isinstance(event, BlockRemoved):
            self.present -= {(sequence_hash, event.tier) for sequence_hash in unpack_hashes(event.engine_hashes)}
        else:
            self.present.clear()


@pytest.fixture
async def reporting(process: Any, kit: Any) -> Any:
    class Reporting(kit.ScriptedEngine):
        def __init__(self) -> None:
            super().__init__(config=EngineConfig("scripted", kv_block_size=4))
            self.sink: KvEventSink | None = None

        def set_kv_event_sink(self, sink: KvEventSink, *, dp_rank: int = 0) -> None:
            self.sink = sink

    return Reporting()


async def test_reports_of_one_tick_travel_in_one_batch(process: Any, kit: Any, reporting: Any) -> None:
    worker = await process.worker(reporting)
    events = await process.subscribe(KV_EVENTS, worker.endpoint)
    reporting.sink.stored(chain(1, 2, 3))
    reporting.sink.removed([3])
    reporting.sink.cleared()
    batch = KV_EVENT_BATCH.decode((await kit.next_event(events)).payload)
    assert (batch.worker, batch.block_size) == (WorkerId(worker.instance_id, 0), 4)
    assert [event.event_id for event in batch.events] == [1, 2, 3]
    stored = batch.events[0]
    assert isinstance(stored, BlockStored)
    assert list(unpack_hashes(stored.engine_hashes)) == [1, 2, 3]
    assert list(unpack_hashes(stored.local_hashes)) == [1001, 1002, 1003]
    assert (stored.parent_hash, stored.start_block, stored.tier) == (None, 0, Tier.DEVICE)
    assert [type(event) for event in batch.events[1:]] == [BlockRemoved, BlocksCleared]


async def test_only_changes_are_published(process: Any, reporting: Any) -> None:
    worker = await process.worker(reporting)
    reporting.sink.stored(chain(1, 2))
    reporting.sink.stored(chain(1, 2, 3))
    reporting.sink.removed([9])
    batch = await process.query(WorkerId(worker.instance_id), 1)
    assert [len(event) for event in batch.events if isinstance(event, BlockStored)] == [2, 1]
    assert batch.events[-1].event_id == 2


async def test_a_reader_that_missed_events_gets_the_range(process: Any, reporting: Any) -> None:
    worker = await process.worker(reporting)
    for number in range(1, 8):
        reporting.sink.stored(chain(number))
    identity = WorkerId(worker.instance_id)
    assert [event.event_id for event in (await process.query(identity, 3, 5)).events] == [3, 4, 5]
    assert [event.event_id for event in (await process.query(identity, 6)).events] == [6, 7]
    ahead = await process.query(identity, 8, 9)
    assert (ahead.events, ahead.full_dump) == ((), False)


async def test_events_that_left_the_ring_are_answered_with_everything(process: Any, reporting: Any) -> None:
    worker = await process.worker(reporting, kv_event_ring_events=16)
    for number in range(1, 41):
        reporting.sink.stored(chain(number))
    batch = await process.query(WorkerId(worker.instance_id), 2, 5)
    assert batch.full_dump
    replica = Replica()
    replica.apply(batch)
    assert replica.last == 40
    assert replica.present == {(number, Tier.DEVICE) for number in range(1, 41)}


async def test_an_empty_cache_dumps_its_event_id(process: Any, reporting: Any) -> None:
    worker = await process.worker(reporting)
    reporting.sink.stored(chain(1))
    reporting.sink.removed([1])
    batch = await process.query(WorkerId(worker.instance_id))
    assert batch.full_dump
    assert batch.events == (BlocksCleared(2),)


async def test_queries_for_others_are_refused(process: Any, reporting: Any) -> None:
    worker = await process.worker(reporting)
    with pytest.raises(NotFoundError, match="dp ranks"):
        await process.query(WorkerId(worker.instance_id, 1))
    with pytest.raises(NotFoundError, match="is not served here"):
        await process.query(WorkerId(worker.instance_id + 1))


async def test_threads_may_report_and_their_order_is_kept(process: Any, kit: Any, reporting: Any) -> None:
    worker = await process.worker(reporting)
    events = await process.subscribe(KV_EVENTS, worker.endpoint)

    def report() -> None:
        for number in range(1, 501):
            reporting.sink.stored(chain(number))
            if number % 2:
                reporting.sink.removed([number])

    thread = threading.Thread(target=report)
    thread.start()
    await asyncio.to_thread(thread.join)
    replica = Replica()
    while replica.last < 750:
        replica.apply(KV_EVENT_BATCH.decode((await kit.next_event(events)).payload))
    assert replica.present == {(number, Tier.DEVICE) for number in range(2, 501, 2)}


async def test_blocks_beyond_the_bound_are_not_advertised(process: Any, reporting: Any) -> None:
    worker = await process.worker(reporting, kv_index_blocks=2)
    reporting.sink.stored(chain(1, 2, 3))
    reporting.sink.removed([3])
    batch = await process.query(WorkerId(worker.instance_id), 1)
    (stored,) = batch.events
    assert isinstance(stored, BlockStored)
    assert list(unpack_hashes(stored.engine_hashes)) == [1, 2]
    assert process.metric("dynamo_worker_kv_events_dropped_total", reason="index_full") == 1
    assert process.metric("dynamo_worker_kv_index_blocks", dp_rank="0") == 2


async def test_blocks_whose_parent_is_unknown_are_not_advertised(process: Any, reporting: Any) -> None:
    worker = await process.worker(reporting, kv_index_blocks=2)
    reporting.sink.stored(chain(1, 2, 3))
    reporting.sink.removed([2])
    reporting.sink.stored(chain(4, parent=3, start=3))
    batch = await process.query(WorkerId(worker.instance_id), 1)
    assert [type(event) for event in batch.events] == [BlockStored, BlockRemoved]
    assert process.metric("dynamo_worker_kv_events_dropped_total", reason="unknown_parent") == 1


async def test_without_kv_events_there_is_no_query_endpoint(process: Any, reporting: Any) -> None:
    await process.worker(reporting, kv_events=False)
    assert reporting.sink is None
    assert [instance.endpoint.endpoint for instance in await process.instances()] == ["generate"]


class Connector:
    """A block manager that only remembers who listens."""

    def __init__(self) -> None:
        self.on_change: Callable[[TierChange], None] | None = None
        self.calls: list[str] = []

    def start(self, access: Any, on_change: Callable[[TierChange], None]) -> None:
        self.on_change = on_change
        on_change(TierChange(Tier.DISK, stored=tuple(chain(50))))

    def match(self, sequence_hashes: Sequence[int]) -> MatchResult:
        return MatchResult(len(sequence_hashes))

    def onboard(self, sequence_hashes: Sequence[int], block_ids: Sequence[int]) -> int:
        return len(block_ids)

    def on_register(self, blocks: Sequence[BlockDescriptor], block_ids: Sequence[int]) -> None:
        self.calls.append("register")

    def on_evict(self, blocks: Sequence[BlockDescriptor], block_ids: Sequence[int]) -> None:
        self.calls.append("evict")

    def clear(self) -> None:
        self.calls.append("clear")

    def close(self) -> None:
        self.calls.append("close")


async def test_tier_changes_become_events_once(process: Any, reporting: Any) -> None:
    worker = await process.worker(reporting)
    inner = Connector()
    connector = PublishingConnector(inner)
    engine_heard: list[TierChange] = []

    def also_reported_by_the_engine(change: TierChange) -> None:
        engine_heard.append(change)
        if change.stored:
            reporting.sink.stored(change.stored, tier=change.tier)

    connector.start(None, also_reported_by_the_engine)  # type: ignore[arg-type]  # no block is moved here
    connector.bind(reporting.sink)
    assert inner.on_change is not None
    inner.on_change(TierChange(Tier.HOST, stored=tuple(chain(1, 2))))
    inner.on_change(TierChange(Tier.HOST, removed=(2,)))
    batch = await process.query(WorkerId(worker.instance_id), 1)
    assert [(type(event).__name__, getattr(event, "tier", None)) for event in batch.events] == [
        ("BlockStored", Tier.DISK),
        ("BlockStored", Tier.HOST),
        ("BlockRemoved", Tier.HOST),
    ]
    assert len(engine_heard) == 3
    connector.on_register([], [])
    connector.on_evict([], [])
    connector.clear()
    connector.close()
    assert inner.calls == ["register", "evict", "clear", "close"]
    assert (connector.match([1, 2]).blocks, connector.onboard([1], [0])) == (2, 1)


class ListeningConnector(Connector):
    """One that takes hints and prefetches too."""

    def hint(self, sequence_hashes: Sequence[int], hints: BlockHints) -> None:
        self.calls.append(f"hint {list(sequence_hashes)} {hints.tenant}")

    def prefetch(self, sequence_hashes: Sequence[int]) -> None:
        self.calls.append(f"prefetch {list(sequence_hashes)}")


@pytest.mark.parametrize(
    ("inner", "heard"), [(Connector(), []), (ListeningConnector(), ["hint [1, 2] a", "prefetch [3]"])]
)
def test_hints_and_prefetches_go_through_to_whoever_listens(inner: Connector, heard: list[str]) -> None:
    connector = PublishingConnector(inner)
    assert isinstance(connector, SupportsBlockHints)
    assert isinstance(connector, SupportsPrefetch)
    connector.hint([1, 2], BlockHints(tenant="a"))
    connector.prefetch([3])
    assert inner.calls == heard


def test_a_dump_has_one_event_per_leaf_and_tier_set() -> None:
    index = KvIndex(100)
    index.store(chain(1, 2, 3, 4), Tier.DEVICE, "")
    index.store(chain(5, 6, parent=2, start=2), Tier.DEVICE, "")
    index.store(chain(1, 2), Tier.HOST, "")
    events = index.dump(9)
    stored = [event for event in events if isinstance(event, BlockStored)]
    shape = [(list(unpack_hashes(e.engine_hashes)), e.parent_hash, e.start_block, e.tier) for e in stored]
    assert shape == [
        ([1, 2], None, 0, Tier.DEVICE),
        ([1, 2], None, 0, Tier.HOST),
        ([3, 4], 2, 2, Tier.DEVICE),
        ([5, 6], 2, 2, Tier.DEVICE),
    ]
    assert {event.event_id for event in events} == {9}


def test_a_dump_leaves_out_blocks_whose_parents_are_gone() -> None:
    index = KvIndex(100)
    index.store(chain(1, 2, 3), Tier.DEVICE, "")
    index.remove([2], Tier.DEVICE)
    replica = Replica()
    replica.apply(KvEventBatch(WorkerId(1), index.dump(1), full_dump=True))
    assert replica.present == {(1, Tier.DEVICE)}


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 12), st.sampled_from([Tier.DEVICE, Tier.HOST]))))
def test_any_history_and_its_dump_agree(history: list[tuple[bool, int, Tier]]) -> None:
    # Block n has parent n // 2: a binary tree. Leaves go first, as pools evict.
    index = KvIndex(100)
    held: dict[Tier, set[int]] = {Tier.DEVICE: set(), Tier.HOST: set()}
    for store, number, tier in history:
        path = []
        while number:
            path.append(number)
            number //= 2
        blocks = [BlockDescriptor(n, n, n // 2 or None, i) for i, n in enumerate(reversed(path))]
        if store:
            index.store(blocks, tier, "")
            held[tier] |= set(path)
        elif not any(n // 2 == path[0] for tiers in held.values() for n in tiers):
            index.remove([path[0]], tier)
            held[tier].discard(path[0])
    replica = Replica()
    replica.apply(KvEventBatch(WorkerId(1), index.dump(1), full_dump=True))
    assert replica.present == {(n, tier) for tier, numbers in held.items() for n in numbers}
