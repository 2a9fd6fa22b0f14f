"""Reads small PNG images into an array: 8 bits a channel, not interlaced."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from dynamo_core.errors import InvalidRequestError

MAX_PIXELS = 1 << 18
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}

Pixels = npt.NDArray[np.uint8]


def read_png(data: bytes) -> Pixels:
    """Return ``[height, width, 3]``: grey becomes equal channels, transparency is left out.

    Raises:
        InvalidRequestError: if it is no such image, or one of more than ``MAX_PIXELS``.
    """
    chunks = list(_chunks(data))
    if not chunks or chunks[0][0] != b"IHDR" or len(chunks[0][1]) != 13:
        raise _refusal("has no header")
    header = chunks[0][1]
    width, height = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:8], "big")
    depth, kind, interlaced = header[8], header[9], header[12]
    if depth != 8 or kind not in _CHANNELS or interlaced:
        raise _refusal(f"has bit depth {depth}, colour type {kind} and interlace {interlaced}")
    if not 0 < width * height <= MAX_PIXELS:
        raise _refusal(f"has {width} x {height} pixels; send 1 to {MAX_PIXELS} of them")
    channels = _CHANNELS[kind]
    rows = _inflate(b"".join(body for name, body in chunks if name == b"IDAT"), height * (1 + width * channels))
    pixels = _unfilter(rows, height, width * channels, channels).reshape(height, width, channels)
    return np.repeat(pixels[..., :1], 3, axis=-1) if channels < 3 else pixels[..., :3]


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    if not data.startswith(_SIGNATURE):
        raise _refusal("does not begin as one")
    at = len(_SIGNATURE)
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        at += 12 + size


def _inflate(packed: bytes, size: int) -> bytes:
    try:
        rows = zlib.decompressobj().decompress(packed, size)
    except zlib.error as error:
        raise _refusal(f"cannot be decompressed: {error}") from error
    if len(rows) != size:
        raise _refusal(f"has {len(rows)} bytes of pixels, not {size}")
    return rows


def _unfilter(rows: bytes, height: int, stride: int, step: int) -> Pixels:
    out = np.zeros((height + 1, stride), dtype=np.uint8)
    for index in range(height):
        start = index * (stride + 1)
        line = np.frombuffer(rows, dtype=np.uint8, count=stride, offset=start + 1)
        out[index + 1] = _line(rows[start], line, out[index], step)
    return out[1:]


def _line(kind: int, line: Pixels, above: Pixels, step: int) -> Pixels:
    if kind == 0:
        return line
    if kind == 1:  # each byte is told from the one before it in its channel: a running sum
        return line.reshape(-1, step).cumsum(axis=0, dtype=np.uint64).astype(np.uint8).reshape(-1)
    if kind == 2:
        return line + above
    if kind not in (3, 4):
        raise _refusal(f"has a line of filter {kind}")
    predict = _mean if kind == 3 else _paeth
    left, upper_left = [0] * step, [0] * step
    found: list[int] = []
    for at, (value, up) in enumerate(zip(line.tolist(), above.tolist(), strict=True)):
        before, corner = left[at % step], upper_left[at % step]
        now = (value + predict(before, up, corner)) & 255
        left[at % step], upper_left[at % step] = now, up
        found.append(now)
    return np.array(found, dtype=np.uint8)


def _mean(left: int, up: int, corner: int) -> int:
    return (left + up) >> 1


def _paeth(left: int, up: int, corner: int) -> int:
    guess = left + up - corner
    by_left, by_up, by_corner = abs(guess - left), abs(guess - up), abs(guess - corner)
    if by_left <= by_up and by_left <= by_corner:
        return left
    return up if by_up <= by_corner else corner


def _refusal(problem: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"the image {problem}; send a PNG of 8 bits a channel without interlacing", param="parts"
    )
