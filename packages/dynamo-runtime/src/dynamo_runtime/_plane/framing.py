"""Frames of the request plane: what they mean, how they become bytes, how bytes become frames again.

A connection starts with eight bytes from each side, ``PREFACE``: a magic that no text protocol starts with, and a
version. After it come frames: a 32-bit big-endian length, then a msgpack array whose first element says the kind.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TypeAlias

import msgspec

from dynamo_core.errors import BackendProtocolError, ErrorRecord

MAGIC = b"\x89DYNRP"
VERSION = 1
PREFACE = MAGIC + bytes((VERSION, 0))
HEADER_BYTES = 4
_HEADER = struct.Struct(">I")


class Hello(msgspec.Struct, array_like=True, tag=0):
    """First frame of each side: the largest frame it takes."""

    max_frame_bytes: int


class Open(msgspec.Struct, array_like=True, tag=1):
    """A caller opens a call; ``credit`` is the number of items it takes unasked."""

    call: int
    endpoint: str
    payload: bytes
    credit: int
    request_id: str = ""
    deadline_s: float | None = None
    headers: dict[str, str] = {}
    schema: str = ""


class Batch(msgspec.Struct, array_like=True, tag=2):
    """What a server has for all its callers this tick; items of a call come before its end.

    Attributes:
        calls: Calls that have items.
        items: The items of each of them, in order.
        ended: Calls that ended cleanly.
        failed: Calls that ended with an error.
    """

    calls: list[int]
    items: list[list[bytes]]
    ended: list[int]
    failed: list[tuple[int, ErrorRecord]]


class Grant(msgspec.Struct, array_like=True, tag=3):
    """More credit for calls, position by position."""

    calls: list[int]
    counts: list[int]


class Cancel(msgspec.Struct, array_like=True, tag=4):
    """The caller wants no more of a call; with ``kill`` it already forgot it."""

    call: int
    kill: bool


class Ping(msgspec.Struct, array_like=True, tag=5):
    """Asks for a ``Pong``."""


class Pong(msgspec.Struct, array_like=True, tag=6):
    """Answers a ``Ping``."""


class Fault(msgspec.Struct, array_like=True, tag=7):
    """Why the sender closes the connection; the last frame on it."""

    error: ErrorRecord


Frame: TypeAlias = Hello | Open | Batch | Grant | Cancel | Ping | Pong | Fault
"""Any frame."""

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Frame)


def encode(frame: Frame) -> bytearray:
    """Return a frame with its length before it."""
    buffer = bytearray(HEADER_BYTES)
    _encoder.encode_into(frame, buffer, HEADER_BYTES)
    _HEADER.pack_into(buffer, 0, len(buffer) - HEADER_BYTES)
    return buffer


class FrameReader:
    """Cuts a byte stream into frames. Holds at most one incomplete frame.

    Args:
        max_frame_bytes: Longest frame taken.
    """

    def __init__(self, max_frame_bytes: int) -> None:
        self._limit = max_frame_bytes
        self._buffer = bytearray()
        self._greeted = False

    @property
    def buffered_bytes(self) -> int:
        """Bytes of the incomplete frame."""
        return len(self._buffer)

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield the frames that ``data`` completes.

        Raises:
            BackendProtocolError: if the stream is not of this protocol; it cannot be read on.
        """
        if self._buffer:
            self._buffer += data
            held = bytes(self._buffer) if self._has_whole_unit() else b""
            if not held:
                return
            self._buffer.clear()
            data = held
        position = 0
        if not self._greeted:
            if not self._read_preface(data):
                return
            position = len(PREFACE)
        yield from self._cut(data, position)

    def _has_whole_unit(self) -> bool:
        if not self._greeted:
            # A wrong magic is reported on its first byte, so there is no minimum to wait for.
            return True
        if len(self._buffer) < HEADER_BYTES:
            return False
        return len(self._buffer) >= HEADER_BYTES + self._length_at(self._buffer, 0)

    def _read_preface(self, data: bytes) -> bool:
        seen = data[: len(PREFACE)]
        if not seen.startswith(MAGIC[: len(seen)]):
            raise BackendProtocolError(f"peer speaks another protocol: it began with {seen!r}, not {MAGIC!r}")
        if len(seen) < len(PREFACE):
            self._buffer += data
            return False
        version = seen[len(MAGIC)]
        if version != VERSION:
            raise BackendProtocolError(
                f"peer speaks version {version} of the request plane, this process {VERSION}; upgrade the older one"
            )
        self._greeted = True
        return True

    def _cut(self, data: bytes, position: int) -> Iterator[Frame]:
        view = memoryview(data)
        size = len(data)
        while size - position >= HEADER_BYTES:
            end = position + HEADER_BYTES + self._length_at(data, position)
            if end > size:
                break
            yield _decode(view[position + HEADER_BYTES : end])
            position = end
        if position < size:
            self._buffer += view[position:]

    def _length_at(self, data: bytes | bytearray, position: int) -> int:
        length: int = _HEADER.unpack_from(data, position)[0]
        if length > self._limit:
            raise BackendProtocolError(f"frame of {length} bytes exceeds max_frame_bytes {self._limit}")
        return length


def _decode(body: memoryview) -> Frame:
    try:
        return _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BackendProtocolError(f"frame cannot be read: {error}") from error
    except RecursionError as error:
        raise BackendProtocolError("frame cannot be read: it nests too deep") from error
