"""Copies of many blocks at once, between any two layouts of the same shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from dynamo_core.errors import InvalidRequestError
from dynamo_kvbm._transfer.layout import KvArena, KvArray


@runtime_checkable
class BlockCopier(Protocol):
    """Moves blocks between two memories. One implementation a kind of memory."""

    def copy(self, source: KvArray, source_ids: Sequence[int], target: KvArray, target_ids: Sequence[int]) -> None:
        """Copy blocks, first to first and so on; a target must not be named twice.

        Raises:
            InvalidRequestError: if the counts or shapes differ, or a block does not exist.
        """
        ...


class CpuCopier:
    """Copies with NumPy: one call for a run of neighbours, one gather for the rest."""

    def copy(self, source: KvArray, source_ids: Sequence[int], target: KvArray, target_ids: Sequence[int]) -> None:
        """Copy blocks; see ``BlockCopier.copy``."""
        _require_copy(source, source_ids, target, target_ids)
        start = 0
        while start < len(source_ids):
            count = _run(source_ids, target_ids, start)
            first, to = source_ids[start], target_ids[start]
            target[to : to + count] = source[first : first + count]
            start += count


def gather(arena: KvArena, block_ids: Sequence[int], copier: BlockCopier | None = None) -> list[bytes]:
    """Return the bytes of blocks in the order of ``BlockLayout``, whatever the arena's layout."""
    packed = np.empty((len(block_ids), *arena.layout.block.shape), dtype=arena.view.dtype)
    (copier or CpuCopier()).copy(arena.view, block_ids, packed, range(len(block_ids)))
    return [block.tobytes() for block in packed]


def scatter(
    arena: KvArena, block_ids: Sequence[int], data: Sequence[bytes | memoryview], copier: BlockCopier | None = None
) -> None:
    """Write the bytes of blocks, in the order of ``BlockLayout``, to their places.

    Raises:
        InvalidRequestError: if a piece has another size than a block, or a block does not exist.
    """
    shape = arena.layout.block.shape
    for piece in data:
        if memoryview(piece).nbytes != arena.layout.block.block_bytes:
            raise InvalidRequestError(
                f"a piece has {memoryview(piece).nbytes} bytes, a block {arena.layout.block.block_bytes}", param="data"
            )
    if len(block_ids) != len(data):
        raise InvalidRequestError(f"{len(data)} pieces of data for {len(block_ids)} blocks", param="data")
    for block_id, piece in zip(block_ids, data, strict=True):
        packed = np.frombuffer(piece, dtype=arena.view.dtype).reshape(1, *shape)
        (copier or CpuCopier()).copy(packed, (0,), arena.view, (block_id,))


def _require_copy(source: KvArray, source_ids: Sequence[int], target: KvArray, target_ids: Sequence[int]) -> None:
    if source.shape[1:] != target.shape[1:] or source.dtype != target.dtype:
        raise InvalidRequestError(
            f"blocks of {source.shape[1:]} {source.dtype} do not fit {target.shape[1:]} {target.dtype}"
        )
    if len(source_ids) != len(target_ids):
        raise InvalidRequestError(f"{len(source_ids)} blocks for {len(target_ids)} places")
    for name, ids, array in (("source", source_ids, source), ("target", target_ids, target)):
        if len(ids) and not (min(ids) >= 0 and max(ids) < len(array)):
            raise InvalidRequestError(f"{name} has blocks 0 to {len(array) - 1}, not {min(ids)} to {max(ids)}")


def _run(source_ids: Sequence[int], target_ids: Sequence[int], start: int) -> int:
    """Return how many blocks from ``start`` on lie side by side in both memories."""
    count = 1
    while (
        start + count < len(source_ids)
        and source_ids[start + count] == source_ids[start] + count
        and target_ids[start + count] == target_ids[start] + count
    ):
        count += 1
    return count
