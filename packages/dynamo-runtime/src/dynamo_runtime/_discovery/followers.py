"""Watches of a server: each lists its records, then follows from there, and begins again when the server was lost."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Mapping
from typing import Any

import structlog

from dynamo_core.discovery import Record
from dynamo_core.errors import DynamoError, UnavailableError
from dynamo_runtime._discovery.connection import StoreConnection
from dynamo_runtime._discovery.feed import Feed
from dynamo_runtime._discovery.http import CLOSE_TIMEOUT_S
from dynamo_runtime._plane.timers import cancelled_within

logger = structlog.get_logger(__name__)


class Followers(ABC):
    """All watches of one client.

    Args:
        connection: What the client's parts share.
    """

    def __init__(self, connection: StoreConnection) -> None:
        self._connection = connection
        self._feeds: dict[Feed, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def records(self) -> int:
        """Records in all views."""
        return sum(len(feed.records) for feed in self._feeds)

    def open(self, prefix: str) -> Feed:
        """Return a watch, which begins when it is first read."""
        feed: Feed

        async def begin() -> None:
            self._feeds[feed] = asyncio.get_running_loop().create_task(self._keep_following(feed))

        feed = Feed(prefix, begin, self._leave)
        return feed

    async def close(self) -> None:
        """End all watches."""
        for feed in list(self._feeds):
            feed.close()
        await cancelled_within(self._connection.clock, CLOSE_TIMEOUT_S, list(self._tasks))

    @abstractmethod
    async def follow(self, feed: Feed, *, lost: bool) -> None:
        """Bring a feed up to date and keep it there; return when its place in the history is gone.

        Raises:
            UnavailableError: when the server is lost.
            DynamoError: why the feed cannot go on.
        """

    def begin_anew(self, feed: Feed, records: Mapping[str, Record], revision: int, *, lost: bool) -> None:
        """Give a feed a new listing; after a loss, removals are held back if the store itself has begun anew."""
        connection = self._connection
        connection.note_reached()
        if feed.revision:
            connection.metrics.resynced()
        feed.replace(records, revision, hold_removals=lost and feed.looks_reset(records, revision))
        if feed.held:
            logger.warning("discovery.store_reset", prefix=feed.prefix, grace_s=connection.times.reset_grace_s)
            self.spawn(self._release(feed))

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something until it ends or the client closes."""
        self._keep(asyncio.get_running_loop().create_task(work))

    async def _keep_following(self, feed: Feed) -> None:
        lost = False
        while True:
            try:
                await self.follow(feed, lost=lost)
                lost = False
            except UnavailableError as error:
                lost = True
                await self._connection.note_failure(error)
                await self._connection.recovered.wait()
            except DynamoError as error:
                feed.close(error)
                return

    async def _release(self, feed: Feed) -> None:
        await self._connection.clock.sleep(self._connection.times.reset_grace_s)
        feed.release()

    def _leave(self, feed: Feed) -> None:
        task = self._feeds.pop(feed, None)
        if task is not None and task is not asyncio.current_task():
            task.cancel()
            self._keep(task)

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
