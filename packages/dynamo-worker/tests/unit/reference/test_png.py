"""The PNG reader: every filter, every layout of channels, and what is no image."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest

from dynamo_core.errors import InvalidRequestError
from dynamo_worker._reference._png import MAX_PIXELS, read_png

CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def encode(pixels: np.ndarray, kind: int, filters: list[int], **header: int) -> bytes:
    """Write an image, each line with the filter that the list names in turn."""
    height, width, step = pixels.shape
    lines = pixels.reshape(height, -1).astype(int)
    out = bytearray()
    for y in range(height):
        name = filters[y % len(filters)]
        out.append(name)
        for x in range(width * step):
            left = lines[y, x - step] if x >= step else 0
            up = lines[y - 1, x] if y else 0
            corner = lines[y - 1, x - step] if y and x >= step else 0
            guess = left + up - corner
            nearest = min((left, up, corner), key=lambda value: abs(guess - value))
            out.append((lines[y, x] - (0, left, up, (left + up) // 2, nearest)[name]) % 256)
    fields = struct.pack(">IIBBBBB", width, height, header.get("depth", 8), kind, 0, 0, header.get("interlace", 0))
    body = zlib.compress(bytes(out))
    half = len(body) // 2
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", fields)
        + chunk(b"IDAT", body[:half])
        + chunk(b"IDAT", body[half:])
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", sorted(CHANNELS))
@pytest.mark.parametrize("filters", [[0], [1], [2], [3], [4], [4, 3, 2, 1, 0]])
def test_pixels_survive(kind: int, filters: list[int]) -> None:
    pixels = np.random.default_rng(kind).integers(0, 256, (7, 9, CHANNELS[kind]), dtype=np.uint8)
    found = read_png(encode(pixels, kind, filters))
    expected = np.repeat(pixels[..., :1], 3, axis=-1) if CHANNELS[kind] < 3 else pixels[..., :3]
    assert np.array_equal(found, expected)


SMALL = np.zeros((2, 2, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "does not begin"),
        (b"\x89PNG\r\n\x1a\n", "no header"),
        (encode(SMALL, 2, [0], depth=16), "bit depth 16"),
        (encode(SMALL, 2, [0], interlace=1), "interlace 1"),
        (encode(SMALL, 2, [0])[:-30], "bytes of pixels"),
        (encode(SMALL, 2, [0]).replace(b"IDAT", b"IXAT"), "bytes of pixels"),
        (encode(np.zeros((1, 2, 3), dtype=np.uint8), 2, [0]).replace(b"\0\0\0\x02", b"\0\x10\0\0", 1), str(MAX_PIXELS)),
    ],
)
def test_what_is_no_image_is_refused(data: bytes, problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=problem):
        read_png(data)
