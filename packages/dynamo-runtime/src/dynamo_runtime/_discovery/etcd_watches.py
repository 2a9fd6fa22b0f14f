"""Watches of etcd: each lists its records at one revision, then follows from the next."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import structlog

from dynamo_core.discovery import Record, RecordDeleted, RecordPut
from dynamo_core.errors import BackendProtocolError, UnavailableError
from dynamo_runtime._discovery._metrics import DiscoveryMetrics
from dynamo_runtime._discovery.connection import StoreConnection
from dynamo_runtime._discovery.etcd_client import (
    DENIED,
    OUT_OF_RANGE,
    EtcdClient,
    EtcdError,
    as_discovery_error,
    next_key,
    record,
    revision,
    scope,
)
from dynamo_runtime._discovery.feed import Feed
from dynamo_runtime._discovery.followers import Followers

logger = structlog.get_logger(__name__)

PAGE_RECORDS = 1000
"""Records of one listing that come in one answer; a server has a limit on an answer's bytes."""

_LIST_ATTEMPTS = 5


class EtcdWatches(Followers):
    """All watches of one client.

    Args:
        connection: What the client's parts share.
        client: Calls.
    """

    def __init__(self, connection: StoreConnection, client: EtcdClient) -> None:
        super().__init__(connection)
        self._client = client

    async def follow(self, feed: Feed, *, lost: bool) -> None:
        """Bring a feed up to date and keep it there; return after a compaction.

        Raises:
            UnavailableError: when the server is lost.
            DynamoError: why the feed cannot go on.
        """
        try:
            await self._follow(feed, lost=lost)
        except EtcdError as error:
            raise as_discovery_error(error) from error

    async def _follow(self, feed: Feed, *, lost: bool) -> None:
        records, present = await listing(self._client, feed.prefix, self._connection.metrics)
        self.begin_anew(feed, records, present, lost=lost)
        request = {"create_request": {**scope(feed.prefix), "start_revision": str(present + 1)}}
        async with contextlib.aclosing(self._client.stream("watch", request)) as answers:
            async for answer in answers:
                if answer.get("canceled"):
                    if not int(answer.get("compact_revision", 0)):
                        raise EtcdError(DENIED, str(answer.get("cancel_reason") or "the watch was cancelled"))
                    return
                changes = [_event(event, self._connection.metrics) for event in answer.get("events", [])]
                feed.apply([change for change in changes if change is not None], revision(answer))
        raise UnavailableError("etcd ended a watch", reason="discovery.unavailable")


async def listing(client: EtcdClient, prefix: str, metrics: DiscoveryMetrics) -> tuple[dict[str, Record], int]:
    """Return the records under a prefix as they were at one revision, in key order, and that revision.

    What others wrote there and is no record is left out and counted.

    Raises:
        EtcdError: the server refuses.
        UnavailableError: if no server answers.
    """
    for _ in range(_LIST_ATTEMPTS):
        try:
            return await _pages(client, prefix, metrics)
        except EtcdError as error:
            # The revision of the first page may be compacted before the last one is read.
            if error.code != OUT_OF_RANGE:
                raise
    raise UnavailableError("etcd is compacted faster than it can be listed", reason="discovery.unavailable")


async def _pages(client: EtcdClient, prefix: str, metrics: DiscoveryMetrics) -> tuple[dict[str, Record], int]:
    records: dict[str, Record] = {}
    present = 0
    body: dict[str, Any] = {**scope(prefix), "limit": str(PAGE_RECORDS)}
    while True:
        answer = await client.call("kv/range", body)
        present = present or revision(answer)
        pairs = answer.get("kvs", [])
        for found in (_readable(pair, metrics) for pair in pairs):
            if found is not None:
                records[found.key] = found
        if not answer.get("more"):
            return records, present
        body |= {"key": next_key(pairs[-1]), "revision": str(present)}


def _readable(pair: Mapping[str, Any], metrics: DiscoveryMetrics) -> Record | None:
    try:
        return record(pair)
    except BackendProtocolError as error:
        metrics.garbled(1)
        logger.warning("discovery.garbled_record", error=error.message)
        return None


def _event(event: Mapping[str, Any], metrics: DiscoveryMetrics) -> RecordPut | RecordDeleted | None:
    found = _readable(event["kv"], metrics)
    if found is None:
        return None
    if event.get("type") == "DELETE":
        return RecordDeleted(found.key, found.revision)
    return RecordPut(found.key, found.value, found.revision)
