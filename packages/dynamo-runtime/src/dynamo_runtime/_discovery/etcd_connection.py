"""Whether etcd can be reached, and for how long not: what the parts of one client share."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import structlog

from dynamo_core.clock import Clock
from dynamo_core.discovery import DiscoveryStatus
from dynamo_core.errors import UnavailableError
from dynamo_runtime._discovery._metrics import DiscoveryMetrics
from dynamo_runtime._discovery.etcd_client import EtcdClient, EtcdError, as_discovery_error, text
from dynamo_runtime._discovery.etcd_options import EtcdOptions

logger = structlog.get_logger(__name__)
T = TypeVar("T")


class EtcdConnection:
    """The client with what is known of its servers.

    Args:
        client: Calls.
        clock: Time.
        options: Times.

    Attributes:
        metrics: Counts; set by the owner.
        recovered: Set while servers answer.
        disturbed: Set when something happened that whoever tends the connection should look at now.
    """

    def __init__(self, client: EtcdClient, clock: Clock, options: EtcdOptions) -> None:
        self.client = client
        self.clock = clock
        self.options = options
        self.metrics = DiscoveryMetrics(None, self.status, lambda: 0)
        self.recovered = asyncio.Event()
        self.disturbed = asyncio.Event()
        self.failure = "not started"
        self.reached_at_s = clock.monotonic()
        self._retry_s = options.retry_interval_s

    def status(self) -> DiscoveryStatus:
        """Return whether a server answered the last time."""
        if not self.failure:
            return DiscoveryStatus(connected=True, detail=f"etcd at {self.client.server}")
        return DiscoveryStatus(False, self.failure, self.clock.monotonic() - self.reached_at_s)

    async def reaching(self, work: Coroutine[Any, Any, T]) -> T:
        """Await calls to the store, note whether they reached it, and type their refusals."""
        try:
            result = await work
        except EtcdError as error:
            self.note_reached()
            raise as_discovery_error(error) from error
        except UnavailableError as error:
            await self.note_failure(error)
            raise
        self.note_reached()
        return result

    async def probe(self) -> None:
        """See whether a server answers. Raises ``UnavailableError`` if none does."""
        await self.reaching(self.client.call("kv/range", {"key": text("v1/"), "count_only": True}))

    def note_reached(self) -> None:
        """A server answered."""
        self.reached_at_s = self.clock.monotonic()
        self._retry_s = self.options.retry_interval_s
        if self.failure:
            self.failure = ""
            self.recovered.set()

    async def note_failure(self, error: UnavailableError) -> None:
        """No server answered, or one was lost."""
        self.metrics.failed()
        if not self.failure:
            logger.warning("discovery.unavailable", error=error.message)
            self.recovered.clear()
            self.disturbed.set()
            self.failure = error.message
        # A watch whose server is cut off would listen to a dead connection until the kernel gives up on it.
        await self.client.close()

    def next_retry_s(self) -> float:
        """Return the pause before the next attempt to come back; each is twice the last, to a limit."""
        retry_s = self._retry_s
        self._retry_s = min(self.options.max_retry_interval_s, retry_s * 2)
        return retry_s
