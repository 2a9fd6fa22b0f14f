"""Reader of the key-value part of a GGUF file: what a model says of itself, without its tensors."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from dynamo_core.errors import ConfigurationError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_ENTRIES = 1 << 24
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a GGUF file: keys as llama.cpp names them.

    Raises:
        ConfigurationError: if the file is not GGUF, of an unknown version, or cut off.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(data, path).metadata()
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--model: {path} cannot be read as GGUF: {error}; download it again") from error


class _Cursor:
    """A place in the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._path = path
        self._at = 0

    def metadata(self) -> dict[str, Any]:
        if self._data[:4] != _MAGIC:
            raise ConfigurationError(f"--model: {self._path} is not a GGUF file; give one, or use another engine")
        self._at = 4
        version = self._scalar("<I")
        if version not in _VERSIONS:
            raise ConfigurationError(f"--model: {self._path} is GGUF version {version}; convert it to 3")
        _tensors, count = self._scalar("<Q"), self._count("<Q")
        return {self._string(): self._value(self._scalar("<I")) for _ in range(count)}

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(self._format(kind))
        item, count = self._scalar("<I"), self._count("<Q")
        if item in _SCALARS:
            return list(self._scalars(item, count))
        return [self._value(item) for _ in range(count)]

    def _scalars(self, kind: int, count: int) -> tuple[Any, ...]:
        code = f"<{count}{self._format(kind)[1]}"
        return struct.unpack(code, self._take(struct.calcsize(code)))

    def _scalar(self, code: str) -> Any:
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _string(self) -> str:
        return self._take(self._scalar("<Q")).decode("utf-8", "replace")

    def _count(self, code: str) -> int:
        count = int(self._scalar(code))
        if count > _MAX_ENTRIES:
            raise ValueError(f"it claims {count} entries")
        return count

    def _format(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"value type {kind} is not known")
        return _SCALARS[kind]

    def _take(self, length: int) -> bytes:
        end = self._at + length
        if end > len(self._data):
            raise ValueError("it ends in the middle of its metadata")
        piece = self._data[self._at : end]
        self._at = end
        return piece
