"""Dense keys and values of the sequences that decode, kept from step to step.

Blocks are what sequences share and what travels; products want one straight piece per sequence. A sequence that
decodes has both: each step adds one row to its piece, where gathering its blocks again would copy all of them. A piece
follows its sequence's content alone, which never changes: so it stays right when blocks are replaced by equal ones,
and is copied again from the blocks when it does not end where the step begins (after a preemption, a failed step, a
longer bucket). The memory is bounded; sequences that find no room attend over their blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dynamo_core.kv import BlockLayout

Floats = npt.NDArray[np.float32]
Pages = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]

LANES = 16
"""Keys come in multiples of this: NumPy sums that many numbers in another order than one more."""

_MIN_TOKENS = 128
"""Shorter sequences share one bucket: padding them costs less than another round of products."""

_UNKNOWN = -1


class DecodeRow(NamedTuple):
    """One sequence that computes one token.

    Attributes:
        owner: The sequence; compared by identity.
        row: Its row in the batch.
        position: Position of the token.
        block_ids: Block table that covers ``position + 1`` tokens.
    """

    owner: object
    row: int
    position: int
    block_ids: Sequence[int]


class DenseBatch:
    """Sequences of like length, a slot each; the slots in use come first, so that a slice of them is a batch.

    Args:
        layout: Layout of the blocks.
        max_tokens: Tokens a slot, a multiple of ``LANES``.
    """

    def __init__(self, layout: BlockLayout, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.rows: list[int] = []
        self.positions: Ints = np.zeros(0, dtype=np.int64)
        self.length = 0
        self._owners: list[object] = []
        self._ends: list[int] = []
        self._key_places: Ints = self.positions
        self._value_places: Ints = self.positions
        heads = (layout.num_layers, 0, layout.kv_heads)
        # Some more than a slot's tokens: rows a power of two apart would share a few sets of the CPU's cache.
        self._keys: Floats = np.zeros((*heads, layout.head_dim, max_tokens + LANES), dtype=np.float32)
        self._values: Floats = np.zeros((*heads, max_tokens, layout.head_dim), dtype=np.float32)

    @property
    def num_slots(self) -> int:
        """Slots that memory is held for."""
        return self._keys.shape[1]

    def arrange(self, wanted: Mapping[object, DecodeRow], data: Pages, max_slots: int) -> list[DecodeRow]:
        """Make the slots those of the given sequences; return the ones there is no room for.

        Args:
            wanted: Sequences by owner.
            data: All layers of the cache, to copy what a slot lacks.
            max_slots: Most slots to hold memory for.
        """
        if self._continues(wanted):
            self._advance(wanted)
            return []
        for slot in reversed(range(len(self._owners))):
            if self._owners[slot] not in wanted:
                self._remove(slot)
        known = set(self._owners)
        fresh = [row for owner, row in wanted.items() if owner not in known]
        if fresh:
            self._reserve(len(known) + len(fresh), max_slots)
        room = self.num_slots - len(known)
        for row in fresh[:room]:
            self._owners.append(row.owner)
            self._ends.append(_UNKNOWN)
        self._lay_out([wanted[owner] for owner in self._owners], data)
        return fresh[room:]

    def append(self, layer: int, written: Pages) -> None:
        """Add a token's ``[sequences, kv_heads, 2, head_dim]`` to each slot of one layer."""
        self._keys[layer].reshape(-1)[self._key_places] = written[:, :, 0]
        self._values[layer].reshape(-1, written.shape[-1])[self._value_places] = written[:, :, 1]

    def layer(self, layer: int) -> tuple[Floats, Floats]:
        """Return keys ``[sequences, kv_heads, head_dim, length]`` and values ``[..., length, head_dim]``."""
        count, length = len(self._owners), self.length
        return self._keys[layer, :count, :, :, :length], self._values[layer, :count, :, :length]

    def _continues(self, wanted: Mapping[object, DecodeRow]) -> bool:
        if len(wanted) != len(self._owners):
            return False
        ends = zip(self._owners, self._ends, strict=True)
        return all(owner in wanted and wanted[owner].position == end for owner, end in ends)

    def _advance(self, wanted: Mapping[object, DecodeRow]) -> None:
        self.rows = [wanted[owner].row for owner in self._owners]
        self._ends = [end + 1 for end in self._ends]
        self.length = round_up(max(self._ends, default=0), LANES)
        self.positions = self.positions + 1
        self._key_places += 1
        self._value_places += 1

    def _lay_out(self, rows: Sequence[DecodeRow], data: Pages) -> None:
        for slot, row in enumerate(rows):
            if self._ends[slot] != row.position:
                self._fill(slot, row, data)
            self._ends[slot] = row.position + 1
        self.rows = [row.row for row in rows]
        self.length = round_up(max(self._ends, default=0), LANES)
        self.positions = np.array([row.position for row in rows], dtype=np.int64)
        self._place_tokens()

    def _place_tokens(self) -> None:
        # Where the step's tokens go, as indices into a layer's memory: NumPy finds them faster than by four axes.
        _, _, kv_heads, head_dim, stride = self._keys.shape
        heads = np.arange(len(self.positions) * kv_heads).reshape(-1, kv_heads)
        self._value_places = heads * self.max_tokens + self.positions[:, None]
        firsts = heads * (head_dim * stride) + self.positions[:, None]
        self._key_places = firsts[:, :, None] + np.arange(0, head_dim * stride, stride)

    def _fill(self, slot: int, row: DecodeRow, data: Pages) -> None:
        count, block_size = row.position, data.shape[2]
        table = row.block_ids[: -(-count // block_size)]
        held = data[:, table].reshape(len(data), -1, *data.shape[3:])[:, :count]
        self._keys[:, slot, :, :, :count] = held[..., 0, :].transpose(0, 2, 3, 1)
        self._values[:, slot, :, :count] = held[..., 1, :].swapaxes(1, 2)
        # Masked positions have weight zero, and zero times what another sequence left could be NaN.
        self._values[:, slot, :, count:] = 0.0

    def _remove(self, slot: int) -> None:
        last = len(self._owners) - 1
        if slot < last:
            self._owners[slot], self._ends[slot] = self._owners[last], self._ends[last]
            self._keys[:, slot] = self._keys[:, last]
            self._values[:, slot] = self._values[:, last]
        del self._owners[last], self._ends[last]

    def _reserve(self, needed: int, max_slots: int) -> None:
        wanted = min(1 << (needed - 1).bit_length(), max_slots)
        if wanted > self.num_slots:
            self._keys = _widened(self._keys, wanted)
            self._values = _widened(self._values, wanted)


class DecodeWorkspace:
    """The dense batches of one cache. Single-threaded: it belongs to the step thread.

    Args:
        layout: Layout of the blocks.
        max_tokens: Most tokens to hold memory for.
    """

    def __init__(self, layout: BlockLayout, max_tokens: int) -> None:
        self._layout = layout
        self._max_tokens = max_tokens
        self._batches: dict[int, DenseBatch] = {}

    @property
    def num_tokens(self) -> int:
        """Tokens that memory is held for."""
        return sum(batch.num_slots * batch.max_tokens for batch in self._batches.values())

    def clear(self) -> None:
        """Give the memory back."""
        self._batches.clear()

    def arrange(self, rows: Sequence[DecodeRow], data: Pages) -> tuple[list[DenseBatch], list[DecodeRow]]:
        """Lay out one step: return its batches, and the rows there is no room for.

        Memory of sequences that are not among the rows is given to others; they are copied again when they return.
        """
        alike: dict[int, dict[object, DecodeRow]] = {}
        for row in rows:
            alike.setdefault(self._bucket(row.position), {})[row.owner] = row
        for bucket in [bucket for bucket in self._batches if bucket not in alike]:
            del self._batches[bucket]
        left: list[DecodeRow] = []
        for bucket, wanted in alike.items():
            batch = self._batches.get(bucket) or DenseBatch(self._layout, bucket)
            self._batches[bucket] = batch
            others = self.num_tokens - batch.num_slots * bucket
            left += batch.arrange(wanted, data, (self._max_tokens - others) // bucket)
            if not batch.num_slots:
                del self._batches[bucket]
        return list(self._batches.values()), left

    def _bucket(self, position: int) -> int:
        # Twice as long from one bucket to the next, so that one long context does not pad all others to its length.
        return max(_MIN_TOKENS, 1 << position.bit_length())


def round_up(count: int, step: int) -> int:
    """Return the least multiple of ``step`` that is not less."""
    return -(-count // step) * step


def _widened(held: Floats, slots: int) -> Floats:
    wide = np.zeros((held.shape[0], slots, *held.shape[2:]), dtype=held.dtype)
    wide[:, : held.shape[1]] = held
    return wide
