"""Recorded requests as lists of block ids, in the Mooncake JSONL format.

One object a line: ``timestamp`` (ms), ``input_length`` and ``output_length`` (tokens), ``hash_ids`` (one id for each
block of the prompt; equal ids mean equal prefixes up to and including the block). Files may be compressed with gzip.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import msgspec

from dynamo_core.errors import ConfigurationError, InvalidRequestError

BLOCK_TOKENS = 512


class _Line(msgspec.Struct):
    hash_ids: list[int]
    timestamp: float = 0.0
    input_length: int = 0


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request.

    Attributes:
        arrival_s: Seconds since the start of the trace.
        path: Blocks of the prompt, first block first; an id stands for the whole prefix that ends with it.
        input_tokens: Length of the prompt.
    """

    arrival_s: float
    path: tuple[int, ...]
    input_tokens: int


def read_trace(path: Path, *, limit: int | None = None) -> list[TraceRequest]:
    """Read a trace, in order of arrival.

    Args:
        path: A file of JSON lines, plain or ``.gz``.
        limit: Most requests read; all if None.

    Raises:
        ConfigurationError: if the file cannot be read or holds no request.
        InvalidRequestError: for a line that is no request, naming it.
    """
    try:
        with _open(path) as file:
            requests = [request for request, _ in zip(_requests(file, path), _count(limit), strict=False)]
    except (OSError, EOFError) as error:
        raise ConfigurationError(f"trace {path} cannot be read: {error}") from error
    if not requests:
        raise ConfigurationError(f"trace {path} holds no request; give a Mooncake JSONL file")
    return sorted(requests, key=lambda request: request.arrival_s)


def _open(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _count(limit: int | None) -> Iterator[int]:
    number = 0
    while limit is None or number < limit:
        yield number
        number += 1


def _requests(file: IO[bytes], path: Path) -> Iterator[TraceRequest]:
    decoder = msgspec.json.Decoder(_Line)
    for number, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            line = decoder.decode(text)
        except msgspec.DecodeError as error:
            raise InvalidRequestError(
                f"{path}:{number} is no request: {error}; each line needs hash_ids, and may have timestamp in ms, "
                "input_length and output_length"
            ) from error
        tokens = line.input_length or BLOCK_TOKENS * len(line.hash_ids)
        yield TraceRequest(line.timestamp / 1000, tuple(dict.fromkeys(line.hash_ids)), tokens)
