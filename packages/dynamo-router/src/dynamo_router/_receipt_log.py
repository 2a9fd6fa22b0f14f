"""Receipts as JSON lines: every recorded decision with its outcome, on disk, bounded. Never prompt text.

A thread writes, so neither a decision nor its outcome waits for a disk. Files rotate by size: ``NAME.jsonl`` is the
newest, ``NAME.1.jsonl`` the one before. ``dynamo-router replay`` reads them as a trace.
"""

from __future__ import annotations

import fcntl
import queue
import re
import threading
from pathlib import Path
from typing import BinaryIO

import msgspec
import structlog

from dynamo_core.errors import ConfigurationError
from dynamo_core.routing import RequestOutcome, RoutingDecision
from dynamo_core.tokens import PackedHashes
from dynamo_router._settings import RouterSettings

MAX_WAITING = 8192
_NOT_A_NAME = re.compile(r"[^A-Za-z0-9._-]+")
_log = structlog.get_logger(__name__)


class LoggedReceipt(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line.

    Attributes:
        decision: The receipt.
        block_size: Tokens a block.
        prompt_tokens: Length of the prompt.
        hashes: Sequence hashes of its blocks, packed (base64 in JSON).
        outcome: What became of it; None if its booking was dropped for lack of progress.
        regret_tokens: Prefill tokens that the worker with most of the prompt would have saved.
    """

    decision: RoutingDecision
    block_size: int
    prompt_tokens: int
    hashes: PackedHashes
    outcome: RequestOutcome | None = None
    regret_tokens: int = 0


class ReceiptLog:
    """Writes receipts below a folder; one router per name.

    Args:
        folder: Where; made if it is missing.
        name: Names the files; characters that file systems dislike become ``_``.
        max_bytes: Size from which a file is rotated.
        max_files: Files kept, the newest included.

    Raises:
        ConfigurationError: if the folder cannot be written, or another router writes under this name there.
    """

    def __init__(self, folder: Path, name: str, *, max_bytes: int, max_files: int) -> None:
        self.dropped = 0
        self._stem = folder / (_NOT_A_NAME.sub("_", name) or "router")
        self._max_bytes = max_bytes
        self._max_files = max_files
        self._waiting: queue.Queue[LoggedReceipt | None] = queue.Queue(MAX_WAITING)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self._stem.with_name(f"{self._stem.name}.lock"))
            self._file = self._open()
        except BlockingIOError as error:
            raise ConfigurationError(
                f"another router writes receipts to {self._stem}.jsonl; give each its own receipts_dir"
            ) from error
        except OSError as error:
            raise ConfigurationError(f"receipts_dir {str(folder)!r} cannot be written: {error}") from error
        self._thread: threading.Thread | None = threading.Thread(
            target=self._run, name=f"receipts-{self._stem.name}", daemon=True
        )
        self._thread.start()

    def add(self, receipt: LoggedReceipt) -> None:
        """Hand a receipt to the writer; if too many wait, it is dropped and counted."""
        try:
            self._waiting.put_nowait(receipt)
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Write what waits and close the file. Blocks until it is on its way to the disk. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._waiting.put(None)
            thread.join()
            self._file.close()
            self._lock.close()

    def _run(self) -> None:
        encode = msgspec.json.encode
        while (receipt := self._waiting.get()) is not None:
            try:
                self._file.write(encode(receipt) + b"\n")
                if self._waiting.empty():
                    self._file.flush()
                if self._file.tell() >= self._max_bytes:
                    self._rotate()
            except OSError as error:
                self.dropped += 1
                _log.warning("receipt_not_written", file=str(self._path(0)), error=str(error))

    def _rotate(self) -> None:
        self._file.close()
        for number in range(self._max_files - 1, 0, -1):
            older = self._path(number - 1)
            if older.exists():
                older.replace(self._path(number))
        if self._max_files == 1:
            self._path(0).unlink()
        self._file = self._open()

    def _open(self) -> BinaryIO:
        return self._path(0).open("ab")

    def _path(self, number: int) -> Path:
        return self._stem.with_name(f"{self._stem.name}.{number}.jsonl" if number else f"{self._stem.name}.jsonl")


def open_log(settings: RouterSettings, model: str) -> ReceiptLog | None:
    """Return the log that the settings ask for, or None.

    Raises:
        ConfigurationError: as ``ReceiptLog`` does.
    """
    if not settings.receipts_dir or settings.receipts == "off":
        return None
    return ReceiptLog(
        Path(settings.receipts_dir),
        model,
        max_bytes=settings.receipts_max_bytes,
        max_files=settings.receipts_max_files,
    )


def _locked(path: Path) -> BinaryIO:
    file = path.open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file
