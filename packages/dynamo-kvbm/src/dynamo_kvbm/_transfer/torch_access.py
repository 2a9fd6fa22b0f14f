"""Block access over the KV tensors of an engine that uses PyTorch, on a GPU or on the CPU. Needs the extra ``torch``.

A batch of blocks moves as one: on the device a gather brings it together, one copy takes it to pinned host memory, and
the other way round. There are two staging buffers, so that the host takes a batch out of one while the device fills the
other. On a GPU all of it runs on a stream of its own: it waits for what the engine has queued before it reads, and the
engine's stream waits for it before it computes on what came in.
"""

from __future__ import annotations

import importlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dynamo_core.errors import ConfigurationError, InvalidRequestError
from dynamo_core.kv import DTYPE_BYTES, BlockLayout

STAGING_BLOCKS = 32

try:
    # Types are checked where PyTorch is not installed, so its objects are Any here.
    torch: Any = importlib.import_module("torch")
except ImportError as import_error:
    raise ConfigurationError("KV tensors need PyTorch: pip install 'dynamo-kvbm[torch]'") from import_error

Tensor: TypeAlias = Any


@dataclass(frozen=True)
class _Staging:
    """One batch on its way.

    Attributes:
        device: Where the device gathers it; the same memory as ``host`` without a GPU.
        host: Pinned memory.
        view: The same as an array, a row a block.
        ids: Where the device finds which blocks; the same memory as the next without a GPU.
        host_ids: Pinned memory: from other memory the copy would wait for all that is queued before it.
        ready: When the device is done with it; None without a GPU.
    """

    device: Tensor
    host: Tensor
    view: NDArray[np.uint8]
    ids: Tensor
    host_ids: Tensor
    ready: Any

    def wait(self) -> None:
        """Return once the device has done what was queued with it; at once if that is nothing."""
        if self.ready is not None:
            self.ready.synchronize()

    def name_blocks(self, block_ids: Sequence[int]) -> Tensor:
        """Queue a copy of the ids to the device and return them there; after ``wait``."""
        count = len(block_ids)
        self.host_ids.numpy()[:count] = block_ids
        if self.ready is not None:
            self.ids[:count].copy_(self.host_ids[:count], non_blocking=True)
        return self.ids[:count]


class TorchBlockAccess:
    """A ``BlockAccess`` of KV tensors. Methods belong to one thread.

    Args:
        layers: One tensor a layer, ``[blocks, 2, block_size, kv_heads, head_dim]``. Any strides will do as long as
            heads and elements of a token lie side by side, as in ``kv.transpose(0, 1)`` of ``[2, blocks, ...]``.
        layout: Shape of one block.
        staging_blocks: Most blocks of one batch; memory for two batches is taken once, here.

    Raises:
        ConfigurationError: if a tensor does not fit the layout.
    """

    def __init__(self, layers: Sequence[Tensor], layout: BlockLayout, *, staging_blocks: int = STAGING_BLOCKS) -> None:
        if staging_blocks < 1:
            raise ConfigurationError(f"staging of {staging_blocks} blocks moves nothing; give at least 1")
        self._layout = layout
        self._layers = [_as_bytes(layer, layout) for layer in layers]
        if len(layers) != layout.num_layers or len({layer.device for layer in layers}) != 1:
            raise ConfigurationError(
                f"{len(layers)} KV tensors were given for {layout.num_layers} layers; give one a layer, on one device"
            )
        self._device = layers[0].device
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._staging = [self._make_staging(staging_blocks) for _ in range(2)]
        self._staging_blocks = staging_blocks

    @property
    def layout(self) -> BlockLayout:
        """Shape of every block."""
        return self._layout

    @property
    def num_blocks(self) -> int:
        """Blocks on the device."""
        return self._layers[0].shape[0]

    def read_blocks(self, block_ids: Sequence[int]) -> list[bytes]:
        """Copy blocks out; when it returns the engine may reuse them.

        Raises:
            InvalidRequestError: if a block does not exist.
        """
        self._require_blocks(block_ids)
        found: list[bytes] = []
        waiting: list[tuple[_Staging, int]] = []
        for number, ids in enumerate(self._batches(block_ids)):
            waiting.append((self._gather(self._staging[number % 2], ids), len(ids)))
            if len(waiting) == len(self._staging):
                found += _taken(*waiting.pop(0))
        for batch in waiting:
            found += _taken(*batch)
        return found

    def read_views(self, block_ids: Sequence[int]) -> list[memoryview]:
        """Copy blocks out; the views are valid until the next call of any method.

        Raises:
            InvalidRequestError: if a block does not exist.
        """
        if len(block_ids) > self._staging_blocks:
            return [memoryview(piece) for piece in self.read_blocks(block_ids)]
        self._require_blocks(block_ids)
        if not block_ids:
            return []
        staging = self._gather(self._staging[0], block_ids)
        staging.wait()
        return [staging.view[row].data for row in range(len(block_ids))]

    def write_blocks(self, block_ids: Sequence[int], data: Sequence[bytes | memoryview]) -> None:
        """Copy blocks in. The data may be reused when it returns; what the engine queues after it sees the blocks.

        Raises:
            InvalidRequestError: if a piece has another size than a block, or a block does not exist.
        """
        self._require_blocks(block_ids)
        if len(block_ids) != len(data):
            raise InvalidRequestError(f"{len(data)} pieces of data for {len(block_ids)} blocks", param="data")
        for piece in data:
            if memoryview(piece).nbytes != self._layout.block_bytes:
                raise InvalidRequestError(
                    f"a piece has {memoryview(piece).nbytes} bytes, a block {self._layout.block_bytes}", param="data"
                )
        start = 0
        for number, ids in enumerate(self._batches(block_ids)):
            self._scatter(self._staging[number % 2], ids, data[start : start + len(ids)])
            start += len(ids)
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _gather(self, staging: _Staging, block_ids: Sequence[int]) -> _Staging:
        count = len(block_ids)
        staging.wait()
        with self._on_stream():
            ids = staging.name_blocks(block_ids)
            for number, layer in enumerate(self._layers):
                staging.device[:count, number] = layer.index_select(0, ids)
            if staging.ready is not None and self._stream is not None:
                staging.host[:count].copy_(staging.device[:count], non_blocking=True)
                staging.ready.record(self._stream)
        return staging

    def _scatter(self, staging: _Staging, block_ids: Sequence[int], data: Sequence[bytes | memoryview]) -> None:
        count = len(block_ids)
        staging.wait()
        for row, piece in enumerate(data):
            staging.view[row] = np.frombuffer(piece, dtype=np.uint8)
        with self._on_stream():
            ids = staging.name_blocks(block_ids)
            if staging.ready is not None:
                staging.device[:count].copy_(staging.host[:count], non_blocking=True)
            for number, layer in enumerate(self._layers):
                layer.index_copy_(0, ids, staging.device[:count, number])
            if staging.ready is not None and self._stream is not None:
                staging.ready.record(self._stream)

    @contextmanager
    def _on_stream(self) -> Generator[None]:
        """Queue on the own stream, behind what the engine has queued so far."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def _batches(self, block_ids: Sequence[int]) -> Generator[Sequence[int]]:
        for start in range(0, len(block_ids), self._staging_blocks):
            yield block_ids[start : start + self._staging_blocks]

    def _require_blocks(self, block_ids: Sequence[int]) -> None:
        if len(block_ids) and not (min(block_ids) >= 0 and max(block_ids) < self.num_blocks):
            raise InvalidRequestError(
                f"there are blocks 0 to {self.num_blocks - 1}, not {min(block_ids)} to {max(block_ids)}",
                param="block_ids",
            )

    def _make_staging(self, blocks: int) -> _Staging:
        shape = (blocks, self._layout.num_layers, *self._layers[0].shape[1:])
        on_gpu = self._stream is not None
        host = torch.empty(shape, dtype=torch.uint8, pin_memory=on_gpu)
        device = torch.empty(shape, dtype=torch.uint8, device=self._device) if on_gpu else host
        view: NDArray[np.uint8] = host.numpy().reshape(blocks, -1)
        host_ids = torch.empty(blocks, dtype=torch.int64, pin_memory=on_gpu)
        ids = torch.empty(blocks, dtype=torch.int64, device=self._device) if on_gpu else host_ids
        return _Staging(device, host, view, ids, host_ids, torch.cuda.Event() if on_gpu else None)


def _taken(staging: _Staging, count: int) -> list[bytes]:
    staging.wait()
    return [staging.view[row].tobytes() for row in range(count)]


def _as_bytes(layer: Tensor, layout: BlockLayout) -> Tensor:
    """Return a view ``[blocks, 2, block_size, bytes of a token]`` without a copy."""
    expected = (2, layout.block_size, layout.kv_heads, layout.head_dim)
    fits = tuple(layer.shape[1:]) == expected and layer.element_size() == DTYPE_BYTES[layout.dtype]
    if not fits or layer.stride()[-2:] != (layout.head_dim, 1):
        raise ConfigurationError(
            f"a KV tensor is {tuple(layer.shape)} of {layer.dtype} with strides {layer.stride()}, "
            f"not [blocks, {', '.join(map(str, expected))}] of {layout.dtype} with heads side by side"
        )
    return layer.flatten(-2).view(torch.uint8)
