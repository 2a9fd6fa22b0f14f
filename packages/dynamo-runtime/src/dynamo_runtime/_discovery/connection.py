"""Whether a store can be reached, and for how long not: what the parts of one client share."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

import structlog

from dynamo_core.clock import Clock
from dynamo_core.discovery import DiscoveryStatus
from dynamo_core.errors import DynamoError, UnavailableError
from dynamo_runtime._discovery._metrics import DiscoveryMetrics

logger = structlog.get_logger(__name__)
T = TypeVar("T")


class StoreClient(Protocol):
    """What talks to the store."""

    @property
    def server(self) -> str:
        """Base URL of the server in use."""
        ...

    async def close(self) -> None:
        """Drop all connections; streams end as lost. Idempotent."""
        ...


class StoreTimes(Protocol):
    """Times of a client's options."""

    @property
    def startup_timeout_s(self) -> float:
        """How long ``start`` tries to reach a server."""
        ...

    @property
    def retry_interval_s(self) -> float:
        """First pause between attempts to come back."""
        ...

    @property
    def max_retry_interval_s(self) -> float:
        """Longest such pause."""
        ...

    @property
    def probe_interval_s(self) -> float:
        """Silence after which the connection is tried."""
        ...

    @property
    def reset_grace_s(self) -> float:
        """How long records stay in watches after a store came back without any of them."""
        ...


class StoreConnection:
    """A client with what is known of its servers.

    Args:
        name: What the store is, for messages.
        client: What talks to it.
        clock: Time.
        times: Pauses and limits.

    Attributes:
        metrics: Counts; set by the owner.
        recovered: Set while servers answer.
        disturbed: Set when something happened that whoever tends the connection should look at now.
    """

    def __init__(self, name: str, client: StoreClient, clock: Clock, times: StoreTimes) -> None:
        self.clock = clock
        self.times = times
        self.metrics = DiscoveryMetrics(None, self.status, lambda: 0)
        self.recovered = asyncio.Event()
        self.disturbed = asyncio.Event()
        self.failure = "not started"
        self.reached_at_s = clock.monotonic()
        self._name = name
        self._client = client
        self._retry_s = times.retry_interval_s

    def status(self) -> DiscoveryStatus:
        """Return whether a server answered the last time."""
        if not self.failure:
            return DiscoveryStatus(connected=True, detail=f"{self._name} at {self._client.server}")
        return DiscoveryStatus(False, self.failure, self.clock.monotonic() - self.reached_at_s)

    async def reaching(self, work: Coroutine[Any, Any, T]) -> T:
        """Await calls to the store and note whether they reached it."""
        try:
            result = await work
        except UnavailableError as error:
            await self.note_failure(error)
            raise
        except DynamoError:
            self.note_reached()
            raise
        self.note_reached()
        return result

    def note_reached(self) -> None:
        """A server answered."""
        self.reached_at_s = self.clock.monotonic()
        self._retry_s = self.times.retry_interval_s
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
        await self._client.close()

    def next_retry_s(self) -> float:
        """Return the pause before the next attempt to come back; each is twice the last, to a limit."""
        retry_s = self._retry_s
        self._retry_s = min(self.times.max_retry_interval_s, retry_s * 2)
        return retry_s
