"""Where the bytes of blocks lie in memory, as data, and NumPy views of them without a copy.

``FULLY_CONTIGUOUS`` keeps a block in one piece, which suits tiers that store or send whole blocks. ``LAYER_SEPARATE``
keeps a layer of all blocks in one piece, which suits engines that compute layer by layer. In both, element
``[block, layer, kv, token, head, dim]`` of ``KvArena.view`` is the same number.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from dynamo_core.errors import ConfigurationError, InvalidRequestError
from dynamo_core.kv import DTYPE_BYTES, BlockLayout

KvArray = NDArray[Any]

# NumPy has no bf16 and no f8. Copies need sizes only, so those are seen as unsigned integers of the same size.
_NUMPY_TYPES = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16, "f8": np.uint8, "i8": np.int8}


class SupportsDlpack(Protocol):
    """A tensor of any library that speaks DLPack."""

    def __dlpack__(self, /, *, stream: Any = None) -> Any:
        """Return a capsule."""
        ...

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return device type and number."""
        ...


class LayoutKind(enum.Enum):
    """Which axis of an arena is the outermost."""

    FULLY_CONTIGUOUS = "fully-contiguous"
    LAYER_SEPARATE = "layer-separate"


@dataclass(frozen=True)
class ArenaLayout:
    """Layout of many blocks.

    Attributes:
        block: Shape of one block.
        num_blocks: How many.
        kind: Which axis is the outermost.
        kv_first: For ``LAYER_SEPARATE``: whether all keys of a layer come before all its values.
        alignment: Bytes, a power of two, that the start of each block (fully contiguous) or layer is a multiple of.
    """

    block: BlockLayout
    num_blocks: int
    kind: LayoutKind = LayoutKind.FULLY_CONTIGUOUS
    kv_first: bool = False
    alignment: int = 1

    def __post_init__(self) -> None:
        if self.num_blocks < 1:
            raise ConfigurationError(f"an arena of {self.num_blocks} blocks holds nothing; give at least 1")
        if self.alignment < 1 or self.alignment & (self.alignment - 1):
            raise ConfigurationError(f"alignment {self.alignment} is no power of two")
        if self.alignment % DTYPE_BYTES[self.block.dtype] and self.alignment != 1:
            raise ConfigurationError(
                f"alignment {self.alignment} splits an element of {self.block.dtype}; give a multiple of its size"
            )

    @property
    def half_bytes(self) -> int:
        """Bytes of the keys, or of the values, of one layer of one block."""
        return self.block.block_bytes // (2 * self.block.num_layers)

    @property
    def block_stride(self) -> int:
        """Bytes from a block to the next, in the same layer."""
        if self.kind is LayoutKind.FULLY_CONTIGUOUS:
            return _aligned(self.block.block_bytes, self.alignment)
        return self.half_bytes if self.kv_first else 2 * self.half_bytes

    @property
    def layer_stride(self) -> int:
        """Bytes from a layer to the next, in the same block."""
        if self.kind is LayoutKind.FULLY_CONTIGUOUS:
            return 2 * self.half_bytes
        return _aligned(2 * self.half_bytes * self.num_blocks, self.alignment)

    @property
    def kv_stride(self) -> int:
        """Bytes from the keys to the values of a layer of a block."""
        separate = self.kind is LayoutKind.LAYER_SEPARATE and self.kv_first
        return self.half_bytes * self.num_blocks if separate else self.half_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of all blocks with their padding."""
        outer = self.num_blocks if self.kind is LayoutKind.FULLY_CONTIGUOUS else self.block.num_layers
        return outer * max(self.block_stride, self.layer_stride)

    def offset(self, block: int, layer: int = 0, kv: int = 0) -> int:
        """Return where the keys (0) or values (1) of a layer of a block begin."""
        return block * self.block_stride + layer * self.layer_stride + kv * self.kv_stride


class KvArena:
    """Memory with a layout.

    Args:
        layout: How it is divided.
        buffer: Memory to use, for example shared or pinned; allocated if None.

    Raises:
        InvalidRequestError: if the buffer is smaller than the layout.
    """

    def __init__(self, layout: ArenaLayout, buffer: bytearray | memoryview | KvArray | None = None) -> None:
        self.layout = layout
        memory = np.zeros(layout.total_bytes, dtype=np.uint8) if buffer is None else buffer
        flat = np.frombuffer(memory, dtype=np.uint8)
        if flat.nbytes < layout.total_bytes:
            raise InvalidRequestError(
                f"a buffer of {flat.nbytes} bytes is too small for a layout of {layout.total_bytes}", param="buffer"
            )
        self.view = _view(layout, flat)

    @classmethod
    def from_dlpack(cls, layout: ArenaLayout, producer: SupportsDlpack) -> KvArena:
        """Return an arena over the memory of a tensor on the CPU, of any library, without a copy.

        Raises:
            InvalidRequestError: if its elements do not lie side by side, or it is smaller than the layout.
        """
        array = np.from_dlpack(producer)
        if not array.flags.c_contiguous:
            raise InvalidRequestError(
                f"a tensor of {array.shape} has strides {array.strides}; its elements must lie side by side",
                param="producer",
            )
        return cls(layout, array.reshape(-1).view(np.uint8))

    def __dlpack__(self, **options: Any) -> Any:
        """Give the blocks, ``[block, layer, kv, token, head, dim]``, to another library without a copy."""
        return self.view.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Name the device: the CPU."""
        return self.view.__dlpack_device__()

    def shard(self, tp_rank: int, tp_size: int) -> KvArray:
        """Return the view of the KV heads of one of ``tp_size`` equal shards.

        Raises:
            InvalidRequestError: if the heads cannot be shared out equally, or there is no such shard.
        """
        heads = shard_heads(self.layout.block, tp_rank, tp_size)
        return self.view[..., heads, :]


def shard_layout(block: BlockLayout, tp_rank: int, tp_size: int) -> BlockLayout:
    """Return the layout of one shard of a block."""
    heads = shard_heads(block, tp_rank, tp_size)
    return msgspec.structs.replace(block, kv_heads=heads.stop - heads.start, tp_rank=tp_rank, tp_size=tp_size)


def shard_heads(block: BlockLayout, tp_rank: int, tp_size: int) -> slice:
    """Return which KV heads a shard has.

    Raises:
        InvalidRequestError: if the heads cannot be shared out equally, or there is no such shard.
    """
    if tp_size < 1 or not 0 <= tp_rank < tp_size or block.kv_heads % tp_size:
        raise InvalidRequestError(
            f"shard {tp_rank} of {tp_size} of {block.kv_heads} KV heads does not exist; tp_size must divide the heads"
        )
    count = block.kv_heads // tp_size
    return slice(tp_rank * count, (tp_rank + 1) * count)


def _view(layout: ArenaLayout, flat: NDArray[np.uint8]) -> KvArray:
    block = layout.block
    item = DTYPE_BYTES[block.dtype]
    rows = block.kv_heads * block.head_dim * item
    return np.ndarray(
        (layout.num_blocks, *block.shape),
        dtype=_NUMPY_TYPES[block.dtype],
        buffer=flat.data,
        strides=(
            layout.block_stride,
            layout.layer_stride,
            layout.kv_stride,
            rows,
            block.head_dim * item,
            item,
        ),
    )


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
