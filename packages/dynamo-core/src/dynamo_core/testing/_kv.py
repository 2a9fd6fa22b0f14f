"""Conformance of block stores and KV connectors: never wrong bytes, never more than the capacity."""

from __future__ import annotations

import hashlib
import threading
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import closing
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo_core.enums import Tier
from dynamo_core.errors import InvalidRequestError
from dynamo_core.kv import BlockDescriptor, BlockLayout, BlockStore, KvConnector, TierChange
from dynamo_core.testing._suite import ConformanceSuite

_OPERATION = st.tuples(
    st.sampled_from(("put", "get", "remove")), st.lists(st.integers(1, 12), min_size=1, max_size=4, unique=True)
)


class BlockStoreConformance(ConformanceSuite, suite=True):
    """Every ``BlockStore`` must pass this.

    Attributes:
        layout: Layout of the blocks; its ``block_bytes`` is the size of each piece.
    """

    layout: ClassVar[BlockLayout] = BlockLayout(num_layers=2, block_size=4, kv_heads=1, head_dim=8)

    @abstractmethod
    def make_store(self, capacity_blocks: int) -> BlockStore:
        """Return a new empty store."""
        ...

    def content(self, sequence_hash: int) -> bytes:
        """Return the bytes of a block, a function of its identity."""
        return block_content(sequence_hash, self.layout.block_bytes)

    def put(self, store: BlockStore, *sequence_hashes: int) -> list[int]:
        """Put blocks with their content."""
        return store.put(
            [BlockDescriptor(key) for key in sequence_hashes], [self.content(key) for key in sequence_hashes]
        )

    def read(self, store: BlockStore, *sequence_hashes: int) -> list[bytes | None]:
        """Get blocks as bytes."""
        return [None if piece is None else bytes(piece) for piece in store.get(list(sequence_hashes))]

    def test_store_says_what_it_is(self) -> None:
        with closing(self.make_store(4)) as store:
            assert store.tier in Tier
            assert store.capacity_blocks == 4

    def test_put_is_read_back(self) -> None:
        with closing(self.make_store(4)) as store:
            assert self.put(store, 1, 2) == []
            assert self.read(store, 2, 1) == [self.content(2), self.content(1)]

    def test_absent_block_reads_as_none(self) -> None:
        with closing(self.make_store(4)) as store:
            self.put(store, 1)
            assert self.read(store, 9, 1) == [None, self.content(1)]
            assert store.contains([9, 1]) == [False, True]

    def test_hashes_use_all_64_bits(self) -> None:
        keys = (1, 1 << 63, (1 << 64) - 1, 1 << 32)
        with closing(self.make_store(4)) as store:
            self.put(store, *keys)
            assert self.read(store, *keys) == [self.content(key) for key in keys]

    def test_memory_views_are_copied(self) -> None:
        data = bytearray(self.content(1))
        with closing(self.make_store(4)) as store:
            store.put([BlockDescriptor(1)], [memoryview(data)])
            data[:] = bytes(len(data))
            assert self.read(store, 1) == [self.content(1)]

    def test_present_block_is_not_stored_twice(self) -> None:
        with closing(self.make_store(2)) as store:
            self.put(store, 1, 2)
            assert self.put(store, 1, 2) == []
            assert store.contains([1, 2]) == [True, True]

    def test_evicted_blocks_are_named_and_gone(self) -> None:
        with closing(self.make_store(3)) as store:
            evicted = [key for first in range(0, 10, 2) for key in self.put(store, first, first + 1)]
            present = [key for key in range(10) if store.contains([key])[0]]
            assert len(present) <= 3
            assert sorted(present + evicted) == list(range(10))
            assert self.read(store, *present) == [self.content(key) for key in present]

    def test_newest_block_is_kept(self) -> None:
        with closing(self.make_store(2)) as store:
            for key in range(5):
                self.put(store, key)
                assert store.contains([key]) == [True]

    def test_remove_drops_and_ignores_the_absent(self) -> None:
        with closing(self.make_store(4)) as store:
            self.put(store, 1, 2)
            store.remove([1, 9])
            store.remove([1])
            assert self.read(store, 1, 2) == [None, self.content(2)]

    def test_uneven_arguments_are_refused(self) -> None:
        with closing(self.make_store(4)) as store:
            with pytest.raises(InvalidRequestError):
                store.put([BlockDescriptor(1), BlockDescriptor(2)], [self.content(1)])
            assert store.contains([2]) == [False]

    def test_close_twice(self) -> None:
        store = self.make_store(4)
        self.put(store, 1)
        store.close()
        store.close()

    def test_threads_never_read_wrong_bytes(self) -> None:
        wrong: list[int] = []

        def work(store: BlockStore, seed: int) -> None:
            for step in range(60):
                key = (seed * 7 + step * 3) % 12
                self.put(store, key)
                for found, piece in zip(range(12), self.read(store, *range(12)), strict=True):
                    if piece not in (None, self.content(found)):
                        wrong.append(found)

        with closing(self.make_store(6)) as store:
            threads = [threading.Thread(target=work, args=(store, seed)) for seed in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert wrong == []
            assert sum(store.contains(list(range(12)))) <= 6

    @settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
    @given(operations=st.lists(_OPERATION, max_size=20))
    def test_any_sequence_of_operations_tells_the_truth(self, operations: Sequence[tuple[str, list[int]]]) -> None:
        present: set[int] = set()
        with closing(self.make_store(5)) as store:
            for name, keys in operations:
                if name == "put":
                    present = (present | set(keys)) - set(self.put(store, *keys))
                elif name == "remove":
                    store.remove(keys)
                    present -= set(keys)
                else:
                    expected = [self.content(key) if key in present else None for key in keys]
                    assert self.read(store, *keys) == expected
                assert len(present) <= 5
                assert {key for key in range(1, 13) if store.contains([key])[0]} == present


class DeviceBlocks:
    """Block access over plain memory, in the place of an engine's device cache."""

    def __init__(self, layout: BlockLayout) -> None:
        self._layout = layout
        self.blocks: dict[int, bytes] = {}

    @property
    def layout(self) -> BlockLayout:
        """Shape of every block."""
        return self._layout

    def read_blocks(self, block_ids: Sequence[int]) -> list[bytes]:
        """Copy blocks out."""
        return [self.blocks[block_id] for block_id in block_ids]

    def write_blocks(self, block_ids: Sequence[int], data: Sequence[bytes | memoryview]) -> None:
        """Copy blocks in.

        Raises:
            InvalidRequestError: if a piece has another size than a block.
        """
        for block_id, piece in zip(block_ids, data, strict=True):
            if len(piece) != self._layout.block_bytes:
                raise InvalidRequestError(f"{len(piece)} bytes are no block of {self._layout.block_bytes}")
            self.blocks[block_id] = bytes(piece)


class KvConnectorConformance(ConformanceSuite, suite=True):
    """Every ``KvConnector`` must pass this, the one that keeps nothing too.

    Attributes:
        layout: Layout of the device blocks.
    """

    layout: ClassVar[BlockLayout] = BlockLayout(num_layers=2, block_size=4, kv_heads=1, head_dim=8)

    @abstractmethod
    def make_connector(self) -> KvConnector:
        """Return a new connector, not started, with room for at least eight blocks if it keeps any."""
        ...

    def settle(self, connector: KvConnector) -> None:
        """Return once transfers in the background are done; the default has none."""

    def start(self, connector: KvConnector) -> tuple[DeviceBlocks, list[TierChange]]:
        """Bind to device memory; return it, and the list of changes to come."""
        device, changes = DeviceBlocks(self.layout), list[TierChange]()
        connector.start(device, changes.append)
        return device, changes

    def compute(self, connector: KvConnector, device: DeviceBlocks, hashes: Sequence[int]) -> list[BlockDescriptor]:
        """Fill device blocks 0, 1, ... with the content of a sequence, register and then evict them."""
        parents = [None, *hashes[:-1]]
        blocks = [
            BlockDescriptor(key, key, parent, i) for i, (key, parent) in enumerate(zip(hashes, parents, strict=True))
        ]
        ids = list(range(len(hashes)))
        device.write_blocks(ids, [block_content(key, self.layout.block_bytes) for key in hashes])
        connector.on_register(blocks, ids)
        self.settle(connector)
        connector.on_evict(blocks, ids)
        self.settle(connector)
        device.write_blocks(ids, [bytes(self.layout.block_bytes)] * len(ids))
        return blocks

    def test_nothing_is_matched_at_first(self) -> None:
        with closing(self.make_connector()) as connector:
            self.start(connector)
            found = connector.match([1, 2, 3])
            assert (found.blocks, found.tiers) == (0, ())
            assert connector.onboard([1, 2, 3], [0, 1, 2]) == 0

    def test_empty_lists_are_fine(self) -> None:
        with closing(self.make_connector()) as connector:
            self.start(connector)
            assert connector.match([]).blocks == 0
            assert connector.onboard([], []) == 0
            connector.on_register([], [])
            connector.on_evict([], [])

    def test_what_is_matched_comes_back_whole(self) -> None:
        hashes = [101, 102, 103, 104]
        with closing(self.make_connector()) as connector:
            device, _ = self.start(connector)
            self.compute(connector, device, hashes)
            found = connector.match(hashes)
            assert 0 <= found.blocks <= len(hashes)
            assert len(found.tiers) == found.blocks
            assert Tier.DEVICE not in found.tiers
            arrived = connector.onboard(hashes, [10, 11, 12, 13])
            assert found.blocks <= arrived <= len(hashes)
            expected = [block_content(key, self.layout.block_bytes) for key in hashes[:arrived]]
            assert device.read_blocks(range(10, 10 + arrived)) == expected
            assert not set(range(10 + arrived, 14)) & device.blocks.keys()

    def test_match_is_a_prefix(self) -> None:
        hashes = [101, 102, 103]
        with closing(self.make_connector()) as connector:
            device, _ = self.start(connector)
            self.compute(connector, device, hashes)
            whole = connector.match(hashes).blocks
            assert connector.match([999, *hashes]).blocks == 0
            assert connector.match([*hashes, 999]).blocks == whole
            assert connector.match(hashes[:1]).blocks == min(whole, 1)

    def test_changes_name_real_blocks(self) -> None:
        hashes = [101, 102, 103]
        with closing(self.make_connector()) as connector:
            device, changes = self.start(connector)
            self.compute(connector, device, hashes)
            stored = {block.sequence_hash for change in changes for block in change.stored}
            assert stored <= set(hashes)
            assert len(stored) >= connector.match(hashes).blocks
            assert all(change.tier is not Tier.DEVICE for change in changes)

    def test_clear_forgets(self) -> None:
        hashes = [101, 102]
        with closing(self.make_connector()) as connector:
            device, _ = self.start(connector)
            self.compute(connector, device, hashes)
            connector.clear()
            self.settle(connector)
            assert connector.match(hashes).blocks == 0
            assert connector.onboard(hashes, [10, 11]) == 0

    def test_close_twice(self) -> None:
        connector = self.make_connector()
        self.start(connector)
        connector.close()
        connector.close()

    def test_close_without_start(self) -> None:
        self.make_connector().close()


def block_content(sequence_hash: int, size: int) -> bytes:
    """Return bytes that only this block has."""
    return hashlib.shake_128(sequence_hash.to_bytes(8, "little")).digest(size)
