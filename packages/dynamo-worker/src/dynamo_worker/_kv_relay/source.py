"""The KV events of an engine in this process, from its ZMQ sockets: addresses, one relay a rank, and their end."""

from __future__ import annotations

import shutil
import tempfile

from dynamo_core.clock import Clock
from dynamo_core.engine import KvEventSink
from dynamo_worker._kv_relay.relay import KvEventRelay, rank_endpoint


class KvEventSource:
    """Where an engine publishes, and the relays that listen there.

    Args:
        endpoint: Address of the first rank's publisher; a private one is made if empty.
        replay_endpoint: Address of its replay socket; made along with a private endpoint.
        topic: Topic to subscribe to; empty for all.
    """

    def __init__(self, endpoint: str, replay_endpoint: str, *, topic: str = "") -> None:
        self._given = (endpoint, replay_endpoint)
        self._topic = topic
        self._endpoints: tuple[str, str] | None = None
        self._folder = ""
        self._relays: list[KvEventRelay] = []

    def open(self) -> tuple[str, str]:
        """Return the addresses that the engine shall bind: of its publisher, and of its replay socket or empty."""
        self._endpoints = self._given
        if not self._given[0]:
            self._folder = tempfile.mkdtemp(prefix="dynamo-kv-events-")
            self._endpoints = (f"ipc://{self._folder}/events", f"ipc://{self._folder}/replay")
        return self._endpoints

    def relay(self, sink: KvEventSink, *, dp_rank: int, block_size: int, clock: Clock) -> None:
        """Relay a rank's events to ``sink``; nothing comes of it before ``open``.

        Raises:
            ConfigurationError: if the address has no port to count ranks from, or cannot be used.
        """
        if self._endpoints is None:
            return
        endpoint, replay = (rank_endpoint(address, dp_rank) for address in self._endpoints)
        relay = KvEventRelay(
            endpoint, replay_endpoint=replay, topic=self._topic, block_size=block_size, sink=sink, clock=clock
        )
        relay.start()
        self._relays.append(relay)

    async def close(self) -> None:
        """End the relays and remove private sockets. Idempotent."""
        for relay in self._relays:
            await relay.close()
        self._relays = []
        self._endpoints = None
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = ""
