"""Watches of etcd: each lists its records at one revision, then follows from the next."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Mapping
from typing import Any

import structlog

from dynamo_core.discovery import Record, RecordDeleted, RecordPut
from dynamo_core.errors import DynamoError, UnavailableError
from dynamo_runtime._discovery.etcd_client import (
    CLOSE_TIMEOUT_S,
    DENIED,
    OUT_OF_RANGE,
    EtcdClient,
    EtcdError,
    as_discovery_error,
    record,
    revision,
    scope,
    text,
)
from dynamo_runtime._discovery.etcd_connection import EtcdConnection
from dynamo_runtime._discovery.feed import Feed
from dynamo_runtime._plane.timers import cancelled_within

logger = structlog.get_logger(__name__)

PAGE_RECORDS = 1000
"""Records of one listing that come in one answer; a server has a limit on an answer's bytes."""

_LIST_ATTEMPTS = 5


class EtcdWatches:
    """All watches of one client.

    Args:
        connection: What the client's parts share.
    """

    def __init__(self, connection: EtcdConnection) -> None:
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

    async def _keep_following(self, feed: Feed) -> None:
        lost = False
        while True:
            try:
                lost = await self._follow(feed, lost=lost)
            except UnavailableError as error:
                lost = True
                await self._connection.note_failure(error)
                await self._connection.recovered.wait()
            except EtcdError as error:
                feed.close(as_discovery_error(error))
                return
            except DynamoError as error:
                feed.close(error)
                return

    async def _follow(self, feed: Feed, *, lost: bool) -> bool:
        """Bring a feed up to date and keep it there until the watch ends; False: because of a compaction."""
        connection = self._connection
        records, present = await listing(connection.client, feed.prefix)
        connection.note_reached()
        if feed.revision:
            connection.metrics.resynced()
        feed.replace(records, present, hold_removals=lost and feed.looks_reset(records, present))
        if feed.held:
            logger.warning("discovery.store_reset", prefix=feed.prefix, grace_s=connection.options.reset_grace_s)
            self._spawn(self._release(feed))
        request = {"create_request": {**scope(feed.prefix), "start_revision": str(present + 1)}}
        async with contextlib.aclosing(connection.client.stream("watch", request)) as answers:
            async for answer in answers:
                if answer.get("canceled"):
                    if not int(answer.get("compact_revision", 0)):
                        raise EtcdError(DENIED, str(answer.get("cancel_reason") or "the watch was cancelled"))
                    return False
                feed.apply([_event(event) for event in answer.get("events", [])], revision(answer))
        raise UnavailableError("etcd ended a watch", reason="discovery.unavailable")

    async def _release(self, feed: Feed) -> None:
        await self._connection.clock.sleep(self._connection.options.reset_grace_s)
        feed.release()

    def _leave(self, feed: Feed) -> None:
        task = self._feeds.pop(feed, None)
        if task is not None and task is not asyncio.current_task():
            task.cancel()
            self._keep(task)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._keep(asyncio.get_running_loop().create_task(work))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def listing(client: EtcdClient, prefix: str) -> tuple[dict[str, Record], int]:
    """Return the records under a prefix as they were at one revision, in key order, and that revision.

    Raises:
        EtcdError: the server refuses.
        UnavailableError: if no server answers.
    """
    for _ in range(_LIST_ATTEMPTS):
        try:
            return await _pages(client, prefix)
        except EtcdError as error:
            # The revision of the first page may be compacted before the last one is read.
            if error.code != OUT_OF_RANGE:
                raise
    raise UnavailableError("etcd is compacted faster than it can be listed", reason="discovery.unavailable")


async def _pages(client: EtcdClient, prefix: str) -> tuple[dict[str, Record], int]:
    records: dict[str, Record] = {}
    present = 0
    body: dict[str, Any] = {**scope(prefix), "limit": str(PAGE_RECORDS)}
    while True:
        answer = await client.call("kv/range", body)
        present = present or revision(answer)
        for found in map(record, answer.get("kvs", [])):
            records[found.key] = found
        if not answer.get("more"):
            return records, present
        body |= {"key": text(f"{next(reversed(records))}\0"), "revision": str(present)}


def _event(event: Mapping[str, Any]) -> RecordPut | RecordDeleted:
    found = record(event["kv"])
    if event.get("type") == "DELETE":
        return RecordDeleted(found.key, found.revision)
    return RecordPut(found.key, found.value, found.revision)
