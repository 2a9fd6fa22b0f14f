"""Elements of tensors from their packed bytes, and back."""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Sequence
from typing import Any

from dynamo_core.errors import InvalidRequestError

_LENGTH = struct.Struct("<I")
_CODES = {"BOOL": "b", "INT32": "i", "INT64": "q", "UINT32": "I", "UINT64": "Q", "FP32": "f", "FP64": "d"}


def unpack_tensor(name: str, datatype: str, data: bytes) -> Sequence[Any]:
    """Return the elements of a tensor given as bytes: little-endian numbers, or BYTES each with its length before it.

    Raises:
        InvalidRequestError: naming the tensor, if the bytes do not fit the type.
    """
    if datatype == "BYTES":
        return _unpack_bytes(name, data)
    code = _CODES.get(datatype)
    if code is None:
        raise InvalidRequestError(f"The input {name[:100]} has the unknown type {datatype[:20]!r}.", param=name)
    found = array(code)
    if len(data) % found.itemsize:
        raise InvalidRequestError(f"The input {name} has {len(data)} bytes, no whole number of {datatype}.", param=name)
    found.frombytes(data)
    if sys.byteorder == "big":
        found.byteswap()
    return found


def pack_bytes(elements: Sequence[bytes]) -> bytes:
    """Return a BYTES tensor as bytes."""
    return b"".join([part for element in elements for part in (_LENGTH.pack(len(element)), element)])


def _unpack_bytes(name: str, data: bytes) -> list[bytes]:
    found: list[bytes] = []
    place = 0
    while place < len(data):
        end = place + _LENGTH.size
        size = _LENGTH.unpack_from(data, place)[0] if end <= len(data) else len(data)
        if end + size > len(data):
            raise InvalidRequestError(
                f"The input {name} breaks off: each element needs its length in four bytes before it.", param=name
            )
        found.append(data[end : end + size])
        place = end + size
    return found
