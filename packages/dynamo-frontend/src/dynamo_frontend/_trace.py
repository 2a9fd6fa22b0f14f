"""Request trace: one JSON line a request, written by a thread to a file that rolls over. Prompts only if asked for."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import structlog

from dynamo_core.errors import ConfigurationError
from dynamo_core.tokens import BlockHasher, PackedTokens, token_count, unpack_hashes
from dynamo_frontend._metrics import TraceMetrics

SCHEMA = "dynamo.request.trace.v1"
_CLOSE_TIMEOUT_S = 5.0
_BATCH_LINES = 256
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """What is traced, and where to.

    Attributes:
        path: File to append to.
        payloads: Whether request bodies are written too; they hold what people wrote.
        roll_bytes: Size at which the file is put aside.
        files: Files kept, the present one included.
        capacity: Lines that may wait to be written; more are dropped and counted.
    """

    path: Path
    payloads: bool = False
    roll_bytes: int = 256 << 20
    files: int = 4
    capacity: int = 1024


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """One request that is over.

    Attributes:
        fields: What the line shows of it.
        ended_at_s: Unix time.
        prompts: Token ids, of which only hashes are written.
        block_size: Tokens of a block of those hashes; 0 for none.
        body: The request's body.
    """

    fields: dict[str, Any]
    ended_at_s: float
    prompts: Sequence[PackedTokens] = ()
    block_size: int = 0
    body: bytes = b""


class TraceLog:
    """Writes traced requests. ``note`` never waits and never raises; what cannot be written is counted.

    Args:
        options: What and where to.
        metrics: Counts what was written and dropped.
    """

    def __init__(self, options: TraceOptions, metrics: TraceMetrics) -> None:
        self._options = options
        self._metrics = metrics
        self._waiting: queue.Queue[TracedRequest | None] = queue.Queue(options.capacity)
        self._thread: threading.Thread | None = None
        self._size = 0

    def start(self) -> None:
        """Open the file and start the thread.

        Raises:
            ConfigurationError: if the file cannot be written.
        """
        path = self._options.path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Whoever may read what people ask must be told so by the operator.
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
            self._size = path.stat().st_size
        except OSError as error:
            raise ConfigurationError(
                f"request_trace_file {path} cannot be written: {error.strerror}", param="request_trace_file"
            ) from error
        self._thread = threading.Thread(target=self._run, name="request-trace", daemon=True)
        self._thread.start()

    def note(self, request: TracedRequest) -> None:
        """Take a request; drop it if too many wait."""
        try:
            self._waiting.put_nowait(request)
        except queue.Full:
            self._metrics.dropped.inc()

    def close(self) -> None:
        """Write what waits, and end the thread. Blocks for as long as that takes, within a limit. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is not None:
            try:
                self._waiting.put(None, timeout=_CLOSE_TIMEOUT_S)
            except queue.Full:
                return
            thread.join(_CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        going_on = True
        while going_on:
            batch = [self._waiting.get()]
            while len(batch) < _BATCH_LINES and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            going_on = None not in batch
            self._write([item for item in batch if item is not None])

    def _write(self, batch: list[TracedRequest]) -> None:
        data = b"".join(self._lines(item) for item in batch)
        try:
            if self._size and self._size + len(data) > self._options.roll_bytes:
                self._roll()
            with self._options.path.open("ab") as file:
                file.write(data)
        except OSError as error:
            self._metrics.dropped.inc(len(batch))
            _log.error("request trace could not be written", path=str(self._options.path), reason=str(error))
            return
        self._size += len(data)
        self._metrics.written.inc(len(batch))

    def _roll(self) -> None:
        """Put the file aside: ``NAME.1`` is the youngest of the older ones."""
        path, count = self._options.path, self._options.files
        for number in range(count - 1, 0, -1):
            older = path if number == 1 else path.with_name(f"{path.name}.{number - 1}")
            if older.exists():
                older.replace(path.with_name(f"{path.name}.{number}"))
        if count == 1:
            path.unlink(missing_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        self._size = 0

    def _lines(self, item: TracedRequest) -> bytes:
        fields = {**item.fields, "replay": _replay(item)}
        lines = _line("request_end", item, {"request": fields})
        if self._options.payloads:
            payload = {"request_id": item.fields["request_id"], "request": item.body.decode(errors="replace")}
            lines += _line("request_payload", item, {"payload": payload})
        return lines


def _line(kind: str, item: TracedRequest, rest: dict[str, Any]) -> bytes:
    head = {"schema": SCHEMA, "event_type": kind, "event_time_unix_ms": int(item.ended_at_s * 1e3)}
    return msgspec.json.encode({**head, **rest}) + b"\n"


def _replay(item: TracedRequest) -> dict[str, Any] | None:
    """Return what a simulator needs of one prompt: its length, and hashes that tell which prompts share a beginning."""
    if not item.block_size or len(item.prompts) != 1:
        return None
    (prompt,) = item.prompts
    hashes = BlockHasher(item.block_size).hash_tokens(prompt)
    return {
        "trace_block_size": item.block_size,
        "input_length": token_count(prompt),
        "input_sequence_hashes": list(unpack_hashes(hashes.sequence)),
    }
