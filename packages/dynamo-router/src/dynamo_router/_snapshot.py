"""The whole index as a value, so that a new router begins with what another one knows."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from dynamo_core.enums import Tier
from dynamo_core.errors import InvalidRequestError
from dynamo_core.ids import WorkerId
from dynamo_core.tokens import XXH3_1337_V1, PackedHashes, pack_hashes, require_algorithm, unpack_hashes
from dynamo_router._index import BlockIndex
from dynamo_router._indexer import Indexer, StreamState
from dynamo_router._match import TIERS

_NONE = PackedHashes(b"")


class ShelfSnapshot(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one worker holds in one tier.

    Attributes:
        tier: Which.
        keys: Sequence hashes, packed; those without a parent first.
        parents: Parents of the others, packed, in their order.
        names: Engine hashes, packed; empty if the engine names blocks by their sequence hashes.
        named: The sequence hash that each of ``names`` stands for, packed.
    """

    tier: Tier
    keys: PackedHashes
    parents: PackedHashes
    names: PackedHashes = _NONE
    named: PackedHashes = _NONE


class WorkerSnapshot(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one worker holds, and how far its events had been applied."""

    worker: WorkerId
    shelves: tuple[ShelfSnapshot, ...] = ()
    last_event_id: int | None = None


class IndexSnapshot(msgspec.Struct, frozen=True, omit_defaults=True):
    """An index. Only workers whose stream was whole are in it.

    Attributes:
        block_size: Tokens a block.
        workers: What each holds.
        algorithm: Hash algorithm.
    """

    block_size: int
    workers: tuple[WorkerSnapshot, ...] = ()
    algorithm: str = XXH3_1337_V1


def take_snapshot(indexer: Indexer) -> IndexSnapshot:
    """Return the index as a value. O(blocks)."""
    found = [
        WorkerSnapshot(
            worker,
            tuple(
                _shelf_snapshot(indexer.index, worker, tier) for tier in TIERS if indexer.index.blocks_of(worker, tier)
            ),
            stream.last_id,
        )
        for worker, stream in indexer.streams().items()
        if stream.state is StreamState.LIVE
    ]
    return IndexSnapshot(indexer.block_size, tuple(found))


def restore_worker(indexer: Indexer, snapshot: IndexSnapshot, worker: WorkerSnapshot) -> None:
    """Make a worker's part of the index what a snapshot says; events after its last id go on from there.

    Raises:
        InvalidRequestError: if the snapshot has another block size or hash algorithm.
    """
    require_algorithm(snapshot.algorithm)
    if snapshot.block_size != indexer.block_size:
        raise InvalidRequestError(
            f"the snapshot has blocks of {snapshot.block_size} tokens, this router's have {indexer.block_size}; "
            "take it from a router with the same block size",
            reason="request.block_size_mismatch",
            param="block_size",
        )
    indexer.begin_restored(worker.worker, worker.last_event_id)
    for shelf in worker.shelves:
        indexer.index.hold(worker.worker, shelf.tier, _entries(shelf), named=bool(shelf.names))


def _shelf_snapshot(index: BlockIndex, worker: WorkerId, tier: Tier) -> ShelfSnapshot:
    roots: list[int] = []
    others: list[int] = []
    parents: list[int] = []
    for key, parent in index.blocks(worker, tier):
        if parent is None:
            roots.append(key)
        else:
            others.append(key)
            parents.append(parent)
    names = index.names(worker, tier)
    return ShelfSnapshot(
        tier,
        pack_hashes([*roots, *others]),
        pack_hashes(parents),
        pack_hashes(names),
        pack_hashes(names.values()),
    )


def _entries(shelf: ShelfSnapshot) -> Iterator[tuple[int, int | None, int]]:
    """Yield ``(sequence hash, parent, engine hash)`` for every name of every block."""
    keys, parents = unpack_hashes(shelf.keys), unpack_hashes(shelf.parents)
    roots = len(keys) - len(parents)
    parent_of = {key: parents[place - roots] if place >= roots else None for place, key in enumerate(keys)}
    if not shelf.names:
        for key, parent in parent_of.items():
            yield key, parent, key
        return
    for name, key in zip(unpack_hashes(shelf.names), unpack_hashes(shelf.named), strict=True):
        yield key, parent_of[key], name
