"""Reader of safetensors files: memory-mapped, so that a tensor is touched only when it is asked for."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from dynamo_core.errors import ConfigurationError

_DTYPES: dict[str, npt.DTypeLike] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_MAX_HEADER_BYTES = 100_000_000
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class SafetensorsFolder:
    """All tensors of a model folder by name, over one file or the shards of an index.

    Args:
        folder: Holds ``model.safetensors`` or ``model.safetensors.index.json`` with its shards.

    Raises:
        ConfigurationError: if neither is there, or a file is not valid safetensors; it names the file.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, SafetensorsFile] = {}
        for path in _weight_files(folder):
            opened = SafetensorsFile(path)
            for name in opened:
                self._files[name] = opened
        self._folder = folder

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """Return a tensor as float32.

        Raises:
            ConfigurationError: if it is missing or has another shape.
        """
        found = self._files.get(name)
        if found is None:
            raise ConfigurationError(f"--model {self._folder}: tensor {name!r} is missing; use a complete checkpoint")
        return found.read(name, shape)


class SafetensorsFile:
    """The tensors of one file; iterating gives their names.

    Args:
        path: The file.

    Raises:
        ConfigurationError: if it cannot be read or is not valid safetensors; it names the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"--model: {path} cannot be read: {error}; download it again") from error
        self._header, self._start = self._parse_header()

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._header if name != "__metadata__")

    def read(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """Return a tensor as float32.

        Raises:
            ConfigurationError: if it is missing or has another shape or an unknown type.
        """
        entry = self._header.get(name)
        if entry is None:
            raise self._invalid(f"tensor {name!r} is missing")
        dtype, stored = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
        if dtype not in _DTYPES:
            raise self._invalid(f"tensor {name!r} has dtype {dtype}; convert it to F32, F16 or BF16")
        if stored != shape:
            raise self._invalid(f"tensor {name!r} has shape {stored}, config.json asks for {shape}")
        begin, end = (self._start + int(offset) for offset in entry["data_offsets"])
        kind = np.dtype(_DTYPES[dtype])
        count = int(np.prod(shape))
        if not self._start <= begin <= end <= len(self._data) or end - begin != count * kind.itemsize:
            raise self._invalid(f"tensor {name!r} lies outside the file; download it again")
        raw = np.frombuffer(self._data, dtype=kind, count=count, offset=begin).reshape(shape)
        if dtype == "BF16":  # a bfloat16 is the upper half of a float32
            return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return raw.astype(np.float32)

    def _parse_header(self) -> tuple[dict[str, Any], int]:
        length = int.from_bytes(self._data[:8], "little")
        if not 2 <= length <= min(len(self._data) - 8, _MAX_HEADER_BYTES):
            raise self._invalid(f"its header length {length} is impossible; download it again")
        try:
            header = json.loads(self._data[8 : 8 + length])
        except ValueError as error:
            raise self._invalid(f"its header is not JSON ({error}); download it again") from error
        if not isinstance(header, dict):
            raise self._invalid("its header is not a JSON object; download it again")
        return cast("dict[str, Any]", header), 8 + length

    def _invalid(self, what: str) -> ConfigurationError:
        return ConfigurationError(f"--model: {self._path} is not usable: {what}")


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    index = folder / _INDEX
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"--model {folder} has neither {_SINGLE} nor {_INDEX}; give a folder with safetensors weights"
        ) from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigurationError(f"--model: {index} is not a safetensors index: {error!r}") from error
    return [folder / name for name in sorted(set(shards))]
