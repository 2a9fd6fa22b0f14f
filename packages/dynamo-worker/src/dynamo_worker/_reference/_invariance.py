"""Whether a row's result is the same bits whatever it is computed with, found out on this machine.

Sums are laid out so that their order depends on nothing but a row's own position; what a BLAS kernel does inside one
product is its own affair. Kernels for AVX-512 keep the order, those for AVX2 do not. So the engine tries it with its
own weights when it starts, and says what it found: either output is bit for bit the same however requests are batched,
cut into chunks, cached, preempted, moved or continued, or the same up to near-ties of two tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dynamo_core.kv import BlockLayout
from dynamo_worker._reference._attention import KEY_TILE, QUERY_TILE, Segment
from dynamo_worker._reference._kv_cache import KVCache
from dynamo_worker._reference._model import Floats, LlamaModel

_LENGTH = 2 * max(KEY_TILE, QUERY_TILE) + 45
_CHUNKS = (1, 2, 3, 5, 7, 16, 31)


def is_batch_invariant(model: LlamaModel, layout: BlockLayout, max_context: int) -> bool:
    """Compute a prompt whole, then again in pieces of many sizes side by side, and compare every bit. Blocks.

    Args:
        model: The model.
        layout: Layout of its KV blocks.
        max_context: Most tokens the model takes.
    """
    length = min(_LENGTH, max_context)
    tokens = [int(token) for token in np.arange(length) * 7919 % model.config.vocab_size]
    table = range(-(-length // layout.block_size))
    scratch = KVCache(layout, len(table))
    whole = model.forward([Segment(tokens, 0, table)], scratch)
    written = scratch.data.copy()
    # The pieces read what the whole wrote and write it again: any difference in a layer shows in the next one's KV.
    for pieces in (_pieces(tokens, table), [Segment(tokens[-1:], length - 1, table)]):
        again: Floats = model.forward(pieces, scratch)
        if not (np.array_equal(again[-1], whole[0]) and np.array_equal(scratch.data, written)):
            return False
    return True


def _pieces(tokens: Sequence[int], table: Sequence[int]) -> list[Segment]:
    length = len(tokens)
    starts = {
        (length - count) * number // len(_CHUNKS): count for number, count in enumerate(_CHUNKS) if count < length
    }
    pieces = [Segment(tokens[start : start + count], start, table) for start, count in starts.items()]
    return [*pieces, Segment(tokens[-1:], length - 1, table, owner=object())]
