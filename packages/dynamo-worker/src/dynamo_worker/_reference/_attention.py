"""Causal grouped-query attention over a paged KV cache.

What does not differ between layers (which rows belong together, their block tables, their masks) is worked out once
per step, in an ``AttentionPlan``; each layer then runs two products and a softmax per group of rows. Rows that decode
find their keys and values in the cache's workspace, others gather them from blocks. What a row gives depends on its
own position alone, to the last bit, as far as the BLAS allows (``_invariance``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dynamo_worker._reference._decode_workspace import LANES, DecodeRow, DenseBatch, Pages, round_up
from dynamo_worker._reference._kv_cache import KVCache
from dynamo_worker._reference._lora import LoraAdapter

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

QUERY_TILE = 128
"""Most query rows of one prefill that are scored at once; bounds the score matrix."""

KEY_TILE = 128
"""Most weights that are summed at once. A longer sum adds the sums of tiles one after the other: so the masked keys
behind a row's own position, of which the batch decides how many there are, add zeros and move nothing."""

_SMALL_SCORES = 1280
"""Below this many scores OpenBLAS takes kernels that sum over the columns of a transposed right-hand side in another
order than its large ones; a copy that lies straight is summed in the same order by all."""


class Segment(NamedTuple):
    """What one sequence computes in a step.

    Attributes:
        token_ids: Tokens to compute.
        start: Position of the first of them; the KV of all earlier positions is in the cache.
        block_ids: Block table that covers ``start + len(token_ids)`` tokens.
        adapter: Low-rank adapter it is computed with.
        media: Positions, and the vectors that are added to their tokens' embeddings.
        owner: Whose tokens they are; by it the workspace knows a sequence again in its next step. None for a pass
            that no other one continues.
    """

    token_ids: Sequence[int]
    start: int
    block_ids: Sequence[int]
    adapter: LoraAdapter | None = None
    media: tuple[tuple[int, Floats], ...] = ()
    owner: object | None = None


@dataclass(frozen=True)
class _DenseGroup:
    """Single rows of sequences that the workspace holds.

    Attributes:
        batch: Where they lie.
        rows: Their indices in the batch of the step.
        hidden: True where a row must not look, ``[sequences, 1, 1, tokens]``.
    """

    batch: DenseBatch
    rows: Ints | slice
    hidden: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Group:
    """Rows that attend together: single rows of many sequences, or a tile of rows of one.

    Attributes:
        rows: Their indices in the batch.
        tables: Block tables, ``[sequences, blocks]``.
        hidden: True where a row must not look, ``[sequences, 1, rows a sequence, tokens]``.
    """

    rows: Ints | slice
    tables: Ints
    hidden: npt.NDArray[np.bool_]


class AttentionPlan:
    """Where the rows of a batch write, and what each may look at.

    Args:
        segments: The batch; rows of a segment are consecutive, segments in order.
        cache: Where earlier tokens are.
        group_size: Query heads per KV head.
    """

    def __init__(self, segments: Sequence[Segment], cache: KVCache, group_size: int) -> None:
        block_size = cache.layout.block_size
        positions = [position for segment in segments for position in _positions(segment)]
        self.positions: Ints = np.array(positions, dtype=np.int64)
        self._blocks = np.array([block for segment in segments for block in _block_of_rows(segment, block_size)])
        self._offsets = self.positions % block_size
        self._data = cache.data
        last_rows = [end - 1 for end in accumulate(len(segment.token_ids) for segment in segments)]
        rows = list(_decode_rows(segments, last_rows))
        batches, left = cache.workspace.arrange([row for row in rows if row.owner is not None], cache.data)
        self._dense = [_dense_group(batch, len(positions)) for batch in batches]
        self._groups = [*_decode_groups([*left, *(row for row in rows if row.owner is None)], block_size)]
        for segment, last in zip(segments, last_rows, strict=True):
            if len(segment.token_ids) > 1:
                self._groups.extend(_prefill_groups(segment, last, block_size, group_size))

    def attend(self, layer: int, query: Floats, key: Floats, value: Floats) -> Floats:
        """Write the rows' KV, then attend each row to its own sequence up to its own position.

        Args:
            layer: Which layer.
            query: ``[rows, heads, head_dim]``.
            key: ``[rows, kv_heads, head_dim]``.
            value: As ``key``.

        Returns:
            ``[rows, heads * head_dim]``.
        """
        pages = self._data[layer]
        written = np.empty((len(key), *pages.shape[2:]), dtype=pages.dtype)
        written[:, :, 0], written[:, :, 1] = key, value
        pages[self._blocks, self._offsets] = written
        rows, heads, head_dim = query.shape
        grouped = (query * np.float32(head_dim**-0.5)).reshape(rows, pages.shape[2], -1, head_dim)
        out = np.empty_like(grouped)
        for dense in self._dense:
            dense.batch.append(layer, written[dense.rows])
            out[dense.rows] = _softmax_average(grouped[dense.rows], *dense.batch.layer(layer), dense.hidden)
        for group in self._groups:
            out[group.rows] = _attend_group(grouped[group.rows], pages, group)
        return out.reshape(rows, heads * head_dim)


def _attend_group(query: Floats, pages: Pages, group: _Group) -> Floats:
    sequences = len(group.tables)
    rows, kv_heads, _, head_dim = query.shape
    gathered = pages[group.tables].reshape(sequences, -1, kv_heads, 2, head_dim).astype(np.float32, copy=False)
    keys, values = gathered[..., 0, :].swapaxes(1, 2), gathered[..., 1, :].swapaxes(1, 2)
    if sequences > 1:
        return _softmax_average(query, _columns(keys, query.shape[-2]), values, group.hidden)
    # All rows are of one sequence and share its keys: one product for all of them.
    merged = query.swapaxes(0, 1).reshape(1, kv_heads, -1, head_dim)
    averaged = _softmax_average(merged, _columns(keys, merged.shape[-2]), values, group.hidden)
    return averaged.reshape(kv_heads, rows, -1, head_dim).swapaxes(0, 1)


def _columns(keys: Floats, count: int) -> Floats:
    columns = keys.swapaxes(-1, -2)
    return np.ascontiguousarray(columns) if max(count, 2) * keys.shape[-2] < _SMALL_SCORES else columns


def _softmax_average(query: Floats, columns: Floats, values: Floats, hidden: npt.NDArray[np.bool_]) -> Floats:
    count, length = query.shape[-2], values.shape[-2]
    if count == 1:
        query = np.concatenate((query, query), axis=-2)
    scores = query @ columns
    np.copyto(scores, -np.inf, where=hidden)
    scores -= np.maximum.reduce(scores, axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    weighted = scores[..., :KEY_TILE] @ values[..., :KEY_TILE, :]
    total = scores[..., :KEY_TILE].sum(axis=-1, keepdims=True)
    for first in range(KEY_TILE, length, KEY_TILE):
        part = scores[..., first : first + KEY_TILE]
        weighted += part @ values[..., first : first + KEY_TILE, :]
        total += part.sum(axis=-1, keepdims=True)
    weighted /= total
    return weighted[..., :count, :]


def _positions(segment: Segment) -> Sequence[int]:
    return range(segment.start, segment.start + len(segment.token_ids))


def _block_of_rows(segment: Segment, block_size: int) -> list[int]:
    if len(segment.token_ids) == 1:
        return [segment.block_ids[segment.start // block_size]]
    return [segment.block_ids[position // block_size] for position in _positions(segment)]


def _decode_rows(segments: Sequence[Segment], rows: Sequence[int]) -> Iterator[DecodeRow]:
    for segment, row in zip(segments, rows, strict=True):
        if len(segment.token_ids) == 1:
            yield DecodeRow(segment.owner, row, segment.start, segment.block_ids)


def _dense_group(batch: DenseBatch, num_rows: int) -> _DenseGroup:
    hidden = np.arange(batch.length) > batch.positions[:, None, None, None]
    rows = slice(None) if batch.rows == list(range(num_rows)) else np.array(batch.rows)
    return _DenseGroup(batch, rows, hidden)


def _decode_groups(rows: Sequence[DecodeRow], block_size: int) -> Iterator[_Group]:
    # Sequences of like length are computed together, so that one long context does not pad all others to its length.
    alike: dict[int, list[DecodeRow]] = {}
    for row in rows:
        alike.setdefault((row.position // block_size).bit_length(), []).append(row)
    for members in alike.values():
        positions = np.array([row.position for row in members])
        tables = np.zeros((len(members), _table_blocks(int(positions.max()), block_size)), dtype=np.int64)
        for table, row in zip(tables, members, strict=True):
            used = row.position // block_size + 1
            table[:used] = row.block_ids[:used]
        hidden = np.arange(tables.shape[1] * block_size) > positions[:, None, None, None]
        yield _Group(np.array([row.row for row in members]), tables, hidden)


def _table_blocks(position: int, block_size: int) -> int:
    """Return how many blocks reach ``position`` and make whole lanes; those too many are masked."""
    return round_up(position // block_size + 1, LANES // math.gcd(LANES, block_size))


def _prefill_groups(segment: Segment, last_row: int, block_size: int, group_size: int) -> Iterator[_Group]:
    count = len(segment.token_ids)
    for first in range(0, count, QUERY_TILE):
        stop = min(first + QUERY_TILE, count)
        positions = segment.start + np.arange(first, stop)
        table = np.zeros((1, _table_blocks(int(positions[-1]), block_size)), dtype=np.int64)
        used = int(positions[-1]) // block_size + 1
        table[0, :used] = segment.block_ids[:used]
        hidden = np.arange(table.shape[1] * block_size) > np.repeat(positions, group_size)[:, None]
        rows = slice(last_row + 1 - count + first, last_row + 1 - count + stop)
        yield _Group(rows, table, hidden)
