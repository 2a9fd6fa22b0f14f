"""Watches one discovery prefix as a map that survives lost connections."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from dynamo_core.clock import Clock
from dynamo_core.discovery import Discovery, RecordDeleted, RecordPut, WatchSynced
from dynamo_core.errors import DynamoError

_log = structlog.get_logger(__name__)
RETRY_S = 1.0


class PrefixWatch:
    """Calls back for every change under a prefix.

    Args:
        discovery: Where to watch.
        prefix: What to watch.
        on_put: Called with a record's key and value when it appears or changes.
        on_delete: Called with its key when it is gone.
        on_synced: Called when all that is present has been reported.
        clock: Time between attempts after a failure.
    """

    def __init__(
        self,
        discovery: Discovery,
        prefix: str,
        *,
        on_put: Callable[[str, bytes], None],
        on_delete: Callable[[str], None],
        on_synced: Callable[[], None],
        clock: Clock,
    ) -> None:
        self._discovery = discovery
        self._prefix = prefix
        self._on_put = on_put
        self._on_delete = on_delete
        self._on_synced = on_synced
        self._clock = clock
        self._known: set[str] = set()

    async def run(self) -> None:
        """Watch until cancelled, beginning again after a failure."""
        while True:
            try:
                await self._follow()
            except DynamoError as error:
                _log.warning("discovery_watch_failed", prefix=self._prefix, error=error.message)
            await self._clock.sleep(RETRY_S)

    async def _follow(self) -> None:
        listed: set[str] | None = set()
        async for event in self._discovery.watch(self._prefix):
            if isinstance(event, RecordPut):
                self._known.add(event.key)
                if listed is not None:
                    listed.add(event.key)
                self._on_put(event.key, event.value)
            elif isinstance(event, RecordDeleted):
                self._forget(event.key)
            else:
                listed = self._end_listing(event, listed)

    def _end_listing(self, event: WatchSynced, listed: set[str] | None) -> None:
        # A watch begun anew lists what is there; what it no longer lists went while nobody watched.
        if listed is not None:
            for key in self._known - listed:
                self._forget(key)
        self._on_synced()

    def _forget(self, key: str) -> None:
        if key in self._known:
            self._known.discard(key)
            self._on_delete(key)
