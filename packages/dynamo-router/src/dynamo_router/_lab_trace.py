"""Traces: recorded requests to replay. Mooncake JSONL, one's own receipts and Azure CSV, plain or gzipped."""

from __future__ import annotations

import csv
import gzip
import itertools
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TextIO

import msgspec

from dynamo_core.errors import ConfigurationError
from dynamo_core.tokens import PackedHashes, chain_hashes, pack_hashes, unpack_hashes
from dynamo_router._receipt_log import LoggedReceipt

MOONCAKE_BLOCK_SIZE = 512
_PRIVATE = 1 << 63
_AZURE_TIME = "%Y-%m-%d %H:%M:%S.%f"


class TraceRequest(msgspec.Struct, frozen=True):
    """One recorded request.

    Attributes:
        at_s: Arrival in seconds from the start of the trace.
        prompt_tokens: Length of the prompt.
        output_tokens: Tokens generated.
        local: Content hashes of its full blocks, packed.
        sequence: Chained hashes of the same, packed.
        name: Name within its workload, if that needs one.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    local: PackedHashes
    sequence: PackedHashes
    name: str = ""


class _MooncakeLine(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


_MOONCAKE = msgspec.json.Decoder(_MooncakeLine)
_RECEIPT = msgspec.json.Decoder(LoggedReceipt)


def read_trace(path: Path, *, block_size: int = MOONCAKE_BLOCK_SIZE, limit: int | None = None) -> list[TraceRequest]:
    """Read a trace, its format told by the file name (``.jsonl`` or ``.csv``, with or without ``.gz``).

    Args:
        path: The file.
        block_size: Tokens a block, which must be the trace's own if it carries hashes; Mooncake's are of 512 tokens.
        limit: Most requests to read; None for all.

    Raises:
        ConfigurationError: if it cannot be read or is of neither format, naming the line.
    """
    suffixes = [suffix for suffix in path.suffixes if suffix in (".jsonl", ".csv", ".gz")]
    kind = suffixes[0] if suffixes else ""
    if kind not in (".jsonl", ".csv"):
        raise ConfigurationError(f"trace {path}: give a .jsonl (Mooncake, receipts) or .csv (Azure) file, plain or .gz")
    try:
        with _open(path) as lines:
            found = list(_hashed(lines, block_size, limit) if kind == ".jsonl" else _azure(lines, block_size, limit))
    except OSError as error:
        raise ConfigurationError(f"trace {path} cannot be read: {error.strerror or error}") from error
    if not found:
        raise ConfigurationError(f"trace {path} holds no request")
    return sorted(found, key=lambda request: request.at_s)


def scale_rate(trace: Sequence[TraceRequest], factor: float) -> list[TraceRequest]:
    """Return the trace with arrivals ``factor`` times as dense."""
    return [msgspec.structs.replace(request, at_s=request.at_s / factor) for request in trace]


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _hashed(lines: TextIO, block_size: int, limit: int | None) -> list[TraceRequest]:
    found: list[TraceRequest] = []
    start_s = float("inf")
    for number, line in enumerate(itertools.islice(lines, limit), start=1):
        own = line.startswith('{"decision":')
        try:
            size, request = _receipt(line) if own else _mooncake(line)
        except msgspec.MsgspecError as error:
            raise ConfigurationError(f"line {number} of the trace is no Mooncake record or receipt: {error}") from error
        if size != block_size:
            raise ConfigurationError(
                f"the trace has blocks of {size} tokens, not {block_size}; give --block-size {size}"
            )
        start_s = min(start_s, request.at_s if own else 0.0)
        found.append(request)
    # Receipts carry Unix times and are in the order in which requests ended.
    return [msgspec.structs.replace(request, at_s=request.at_s - start_s) for request in found]


def _mooncake(line: str) -> tuple[int, TraceRequest]:
    entry = _MOONCAKE.decode(line)
    # The last id may stand for a block that is not full, which no cache keeps.
    local = entry.hash_ids[: entry.input_length // MOONCAKE_BLOCK_SIZE]
    return MOONCAKE_BLOCK_SIZE, _request(entry.timestamp / 1000.0, entry.input_length, entry.output_length, local)


def _receipt(line: str) -> tuple[int, TraceRequest]:
    entry = _RECEIPT.decode(line)
    output = 0 if entry.outcome is None else entry.outcome.output_tokens
    arrived_s = entry.decision.decided_at_s - entry.decision.queued_s
    # Sequence hashes stand for the blocks' contents: prompts that share a prefix share them, and no others.
    return entry.block_size, _request(arrived_s, entry.prompt_tokens, output, unpack_hashes(entry.hashes))


def _azure(lines: TextIO, block_size: int, limit: int | None) -> Iterator[TraceRequest]:
    start: datetime | None = None
    for number, row in enumerate(csv.DictReader(lines), start=2):
        if limit is not None and number > limit + 1:
            return
        try:
            at = datetime.strptime(row["TIMESTAMP"][:26], _AZURE_TIME)
            prompt, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
        except (KeyError, ValueError) as error:
            raise ConfigurationError(f"line {number} of the trace is no Azure record: {error!r}") from error
        start = start or at
        # Azure's traces carry no content: every prompt is private.
        local = [_PRIVATE | number << 20 | block for block in range(prompt // block_size)]
        yield _request((at - start).total_seconds(), prompt, output, local)


def _request(at_s: float, prompt: int, output: int, local: Sequence[int]) -> TraceRequest:
    return TraceRequest(at_s, prompt, max(output, 1), pack_hashes(local), pack_hashes(chain_hashes(local)))
