"""Runs transfers in the background: a few at once, urgent ones first, and no more waiting than there is room for."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import structlog

from dynamo_core.errors import (
    CancelledRequestError,
    CapacityExhaustedError,
    ConfigurationError,
    DeadlineExceededError,
    InternalError,
    as_dynamo_error,
)

T = TypeVar("T")

_log = structlog.get_logger(__name__)


class Transfer(Generic[T]):
    """One transfer, from submission to its end."""

    def __init__(self, work: Callable[[Callable[[], bool]], T], blocks: int) -> None:
        self.blocks = blocks
        self._work = work
        self._ended = threading.Event()
        self._cancelled = threading.Event()
        self._result: list[T] = []
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self._ended.is_set()

    def cancel(self) -> None:
        """Ask it to end. If it waits, it never starts; if it runs, it ends between two batches."""
        self._cancelled.set()

    def result(self, timeout_s: float | None = None) -> T:
        """Wait for the end and return the result.

        Raises:
            DeadlineExceededError: if it has not ended in time; it goes on.
            CancelledRequestError: if it was cancelled before it was done.
            DynamoError: if it failed.
        """
        if not self._ended.wait(timeout_s):
            raise DeadlineExceededError(f"a transfer of {self.blocks} blocks has not ended within {timeout_s} s")
        if self._error is not None:
            raise as_dynamo_error(self._error) from self._error
        if not self._result:
            raise CancelledRequestError(f"a transfer of {self.blocks} blocks was cancelled")
        return self._result[0]

    def run(self) -> None:
        """Do the work, unless it is cancelled; for the engine."""
        try:
            if not self._cancelled.is_set():
                self._result.append(self._work(self._cancelled.is_set))
        except CancelledRequestError:
            pass
        except Exception as error:  # noqa: BLE001 - whoever waits for the transfer gets it
            self._error = error
            _log.warning("transfer failed", blocks=self.blocks, error=str(error))
        finally:
            self._ended.set()


class TransferEngine:
    """A bounded queue by priority before a few threads.

    Args:
        workers: Transfers that run at once.
        queue_blocks: Most blocks of all transfers that wait. A single larger transfer may wait alone.

    Raises:
        ConfigurationError: if either is below 1.
    """

    def __init__(self, workers: int = 2, queue_blocks: int = 256) -> None:
        if workers < 1 or queue_blocks < 1:
            raise ConfigurationError(f"workers {workers} and queue_blocks {queue_blocks} must both be at least 1")
        self._queue_blocks = queue_blocks
        self._waiting: list[tuple[int, int, Transfer[Any]]] = []
        self._order = itertools.count()
        self._queued = 0
        self._running = 0
        self._closing = False
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._serve, name=f"kvbm-transfer-{i}", daemon=True) for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def queued_blocks(self) -> int:
        """Blocks of the transfers that wait."""
        return self._queued

    def submit(
        self,
        work: Callable[[Callable[[], bool]], T],
        *,
        blocks: int,
        priority: int = 0,
        timeout_s: float | None = 0.0,
    ) -> Transfer[T]:
        """Queue a transfer.

        Args:
            work: Does it. It is given a question, whether it was cancelled, to ask between batches, and raises
                ``CancelledRequestError`` if so.
            blocks: Its size.
            priority: Lower runs first; equal ones in order of submission.
            timeout_s: How long to wait for room; None for as long as it takes.

        Raises:
            CapacityExhaustedError: if there is no room in time.
            InternalError: if the engine is closed.
        """
        transfer: Transfer[T] = Transfer(work, blocks)
        with self._changed:
            if not self._changed.wait_for(lambda: self._closing or self._has_room(blocks), timeout_s):
                raise CapacityExhaustedError(
                    f"{self._queued} of {self._queue_blocks} blocks wait for transfer, {blocks} more find no room"
                )
            if self._closing:
                raise InternalError("the transfer engine is closed")
            heapq.heappush(self._waiting, (priority, next(self._order), transfer))
            self._queued += blocks
            self._changed.notify_all()
        return transfer

    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing waits or runs; return whether that came in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._running, timeout_s)

    def close(self) -> None:
        """Cancel what waits, finish what runs, end the threads. Idempotent."""
        with self._changed:
            self._closing = True
            for _, _, transfer in self._waiting:
                transfer.cancel()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _has_room(self, blocks: int) -> bool:
        return not self._waiting or self._queued + blocks <= self._queue_blocks

    def _serve(self) -> None:
        while (transfer := self._next()) is not None:
            transfer.run()
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _next(self) -> Transfer[Any] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if not self._waiting:
                return None
            _, _, transfer = heapq.heappop(self._waiting)
            self._queued -= transfer.blocks
            self._running += 1
            self._changed.notify_all()
            return transfer
