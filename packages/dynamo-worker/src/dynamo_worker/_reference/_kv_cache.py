"""The memory of the KV blocks, and byte access to it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dynamo_core.errors import InvalidRequestError
from dynamo_core.kv import BlockLayout
from dynamo_worker._reference._decode_workspace import DecodeWorkspace

_DTYPES: dict[str, npt.DTypeLike] = {"f32": np.float32, "f16": np.float16}


class KVCache:
    """Device blocks as one array ``[layers, num_blocks, block_size, kv_heads, 2 (K, V), head_dim]``.

    A layer's block is one contiguous piece, so attention gathers keys and values together; the bytes that leave have
    the order of ``BlockLayout``. Implements ``dynamo_core.kv.BlockAccess``; its methods run on the step thread.

    Attributes:
        data: The blocks.
        workspace: What decoding keeps beside them, of no more tokens than they have.
    """

    def __init__(self, layout: BlockLayout, num_blocks: int) -> None:
        self._layout = layout
        self._shape = (layout.num_layers, num_blocks, layout.block_size, layout.kv_heads, 2, layout.head_dim)
        self.data: npt.NDArray[np.floating] = np.zeros(self._shape, dtype=_DTYPES[layout.dtype])
        self.workspace = DecodeWorkspace(layout, num_blocks * layout.block_size)

    def release(self) -> None:
        """Give the memory back; nothing may be read or written until ``allocate``."""
        self.workspace.clear()
        self.data = np.zeros((0, *self._shape[1:]), dtype=self.data.dtype)

    def allocate(self) -> None:
        """Take the memory again, empty."""
        self.data = np.zeros(self._shape, dtype=self.data.dtype)

    @property
    def layout(self) -> BlockLayout:
        """Shape of every block."""
        return self._layout

    def read_blocks(self, block_ids: Sequence[int]) -> list[bytes]:
        """Copy blocks out."""
        return [self.data[:, block_id].transpose(0, 3, 1, 2, 4).tobytes() for block_id in block_ids]

    def read_blocks_into(self, block_ids: Sequence[int], buffer: memoryview) -> None:
        """Copy blocks to the start of a buffer, which must have room for them."""
        count = len(block_ids)
        out = np.frombuffer(buffer, dtype=self.data.dtype, count=count * self._layout.block_bytes // self.data.itemsize)
        for content, block_id in zip(out.reshape(count, *self._layout.shape), block_ids, strict=True):
            content[...] = self.data[:, block_id].transpose(0, 3, 1, 2, 4)

    def write_blocks(self, block_ids: Sequence[int], data: Sequence[bytes | memoryview]) -> None:
        """Copy blocks in.

        Raises:
            InvalidRequestError: if the counts differ, or a piece has another size than a block.
        """
        if len(block_ids) != len(data):
            raise InvalidRequestError(f"{len(data)} pieces of KV bytes for {len(block_ids)} blocks", param="data")
        for piece in data:
            size = memoryview(piece).nbytes
            if size != self._layout.block_bytes:
                raise InvalidRequestError(
                    f"a piece of KV bytes has {size} bytes, a block has {self._layout.block_bytes}; "
                    "both sides need the same model, block size and KV dtype",
                    param="data",
                )
        for block_id, piece in zip(block_ids, data, strict=True):
            content = np.frombuffer(piece, dtype=self.data.dtype).reshape(self._layout.shape)
            self.data[:, block_id] = content.transpose(0, 2, 3, 1, 4)
