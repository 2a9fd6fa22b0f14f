"""How a tier stores the bytes of a block: as they are, compressed, or quantised."""

from __future__ import annotations

import enum
import functools
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dynamo_core.errors import ConfigurationError
from dynamo_core.kv import BlockLayout

E4M3_MAX = 448.0
INT8_MAX = 127.0


class CodecName(enum.Enum):
    """Codecs by the names that options use."""

    NONE = "none"
    LZ4 = "lz4"
    ZSTD = "zstd"
    INT8 = "int8"
    FP8 = "fp8"


@runtime_checkable
class BlockCodec(Protocol):
    """Turns the bytes of a block into what a tier stores, and back."""

    @property
    def stored_bytes(self) -> int | None:
        """Size of every stored block; None if it varies."""
        ...

    def encode(self, data: bytes | memoryview) -> bytes | memoryview:
        """Return what to store."""
        ...

    def decode(self, stored: bytes | memoryview) -> bytes | memoryview:
        """Return the block.

        Raises:
            ValueError: if the bytes were not made by ``encode``.
        """
        ...


class PlainCodec:
    """Stores bytes as they are.

    Args:
        block_bytes: Size of a block.
    """

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes

    @property
    def stored_bytes(self) -> int | None:
        """The size of a block."""
        return self._block_bytes

    def encode(self, data: bytes | memoryview) -> bytes | memoryview:
        """Return the data."""
        return data

    def decode(self, stored: bytes | memoryview) -> bytes | memoryview:
        """Return the data."""
        if len(stored) != self._block_bytes:
            raise ValueError(f"{len(stored)} bytes are no block of {self._block_bytes}")
        return stored


class CompressedCodec:
    """Compresses without loss, by LZ4 (fast) or Zstandard (smaller).

    Args:
        name: ``LZ4`` or ``ZSTD``.
        block_bytes: Size of a block.

    Raises:
        ConfigurationError: if the extra ``compression`` is not installed.
    """

    def __init__(self, name: CodecName, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        try:
            self._compress, self._decompress, self._failure = _lz4() if name is CodecName.LZ4 else _zstd(block_bytes)
        except ImportError as error:
            raise ConfigurationError(
                f"codec {name.value} needs a library: pip install 'dynamo-kvbm[compression]'"
            ) from error

    @property
    def stored_bytes(self) -> int | None:
        """None: it depends on the content."""
        return None

    def encode(self, data: bytes | memoryview) -> bytes | memoryview:
        """Return a compressed frame."""
        return self._compress(data)

    def decode(self, stored: bytes | memoryview) -> bytes | memoryview:
        """Return the block."""
        try:
            data = self._decompress(stored)
        except self._failure as error:
            raise ValueError(f"no compressed block: {error}") from error
        if len(data) != self._block_bytes:
            raise ValueError(f"{len(data)} bytes are no block of {self._block_bytes}")
        return data


class QuantisedCodec:
    """Stores each head's vector as one byte an element and one scale, with loss.

    The scale maps the largest magnitude ``m`` of the vector to the largest code. So no element is off by more than
    ``m / 254`` (int8), or by more than the larger of 1/16 of itself and ``m / 458752`` (fp8, e4m3), beyond the rounding
    of the element type. Elements must be finite.

    Args:
        name: ``INT8`` or ``FP8``.
        layout: Shape and element type of a block.

    Raises:
        ConfigurationError: if the elements are no floats of 2 or 4 bytes.
    """

    def __init__(self, name: CodecName, layout: BlockLayout) -> None:
        if layout.dtype not in {"f32", "f16", "bf16"}:
            raise ConfigurationError(
                f"codec {name.value} takes f32, f16 or bf16, not {layout.dtype}; use another codec"
            )
        self._fp8 = name is CodecName.FP8
        self._dtype = layout.dtype
        self._width = layout.head_dim
        self._rows = layout.num_layers * 2 * layout.block_size * layout.kv_heads

    @property
    def stored_bytes(self) -> int | None:
        """Four bytes of scale and one byte an element, for each vector."""
        return self._rows * (4 + self._width)

    def encode(self, data: bytes | memoryview) -> bytes | memoryview:
        """Return scales and codes."""
        rows = _as_f32(data, self._dtype).reshape(self._rows, self._width)
        top = E4M3_MAX if self._fp8 else INT8_MAX
        scales = np.max(np.abs(rows), axis=1) / np.float32(top)
        unit = rows / np.where(scales > 0, scales, 1)[:, None]
        codes = _to_e4m3(unit.astype(np.float32)) if self._fp8 else np.rint(unit).astype(np.int8).view(np.uint8)
        return scales.astype("<f4").tobytes() + codes.tobytes()

    def decode(self, stored: bytes | memoryview) -> bytes | memoryview:
        """Return the block, rounded."""
        if len(stored) != self.stored_bytes:
            raise ValueError(f"{len(stored)} bytes are no quantised block of {self.stored_bytes}")
        scales = np.frombuffer(stored, "<f4", self._rows)
        codes = np.frombuffer(stored, np.uint8, offset=4 * self._rows).reshape(self._rows, self._width)
        unit = _e4m3_values()[codes] if self._fp8 else codes.view(np.int8).astype(np.float32)
        return _from_f32(unit * scales[:, None], self._dtype)


def make_codec(name: CodecName, layout: BlockLayout) -> BlockCodec:
    """Return a codec for blocks of a layout.

    Raises:
        ConfigurationError: if its library is not installed, or it does not take the layout's element type.
    """
    if name is CodecName.NONE:
        return PlainCodec(layout.block_bytes)
    if name in {CodecName.LZ4, CodecName.ZSTD}:
        return CompressedCodec(name, layout.block_bytes)
    return QuantisedCodec(name, layout)


def _lz4() -> tuple[Any, Any, type[Exception]]:
    import lz4.frame

    return lz4.frame.compress, lz4.frame.decompress, RuntimeError


def _zstd(block_bytes: int) -> tuple[Any, Any, type[Exception]]:
    import zstandard

    def compress(data: bytes | memoryview) -> bytes:
        return zstandard.ZstdCompressor().compress(data)

    def decompress(data: bytes | memoryview) -> bytes:
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=block_bytes)

    return compress, decompress, zstandard.ZstdError


def _as_f32(data: bytes | memoryview, dtype: str) -> NDArray[np.float32]:
    if dtype == "bf16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, np.float16 if dtype == "f16" else np.float32).astype(np.float32)


def _from_f32(values: NDArray[np.float32], dtype: str) -> bytes:
    if dtype == "f32":
        return values.astype(np.float32).tobytes()
    if dtype == "f16":
        return values.astype(np.float16).tobytes()
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()


@functools.cache
def _e4m3_values() -> NDArray[np.float32]:
    """The value of each code: sign, 4 bits of exponent with bias 7, 3 bits of mantissa; no infinities."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    value = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    value[(code & 127) == 127] = E4M3_MAX  # the code of NaN; never written
    return np.where(code & 128, -value, value).astype(np.float32)


def _to_e4m3(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    positive = _e4m3_values()[:127]
    middles = (positive[1:] + positive[:-1]) / 2
    codes = np.searchsorted(middles, np.abs(values)).astype(np.uint8)
    return codes | np.where(np.signbit(values), np.uint8(128), np.uint8(0))
