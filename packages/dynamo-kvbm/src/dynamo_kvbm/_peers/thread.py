"""Runs a peer node on an event loop in a thread, for the engine's thread, which has none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from dynamo_core import plugins
from dynamo_core.clock import Clock
from dynamo_core.discovery import Discovery
from dynamo_core.errors import ConfigurationError, DynamoError
from dynamo_core.kv import BlockLayout
from dynamo_core.planes import RequestPlane
from dynamo_kvbm._metrics import KvbmMetrics
from dynamo_kvbm._peers.node import Found, PeerNode
from dynamo_kvbm._peers.server import ReadBlocks

T = TypeVar("T")
START_LIMIT_S = 30.0
STOP_LIMIT_S = 5.0
GRACE_S = 0.1


@dataclass(frozen=True)
class PeerAddress:
    """Where peers meet.

    Attributes:
        discovery: URL of the discovery plane.
        plane: URL of the request plane.
        namespace: Whose peers.
    """

    discovery: str
    plane: str
    namespace: str


class PeerThread:
    """Starts a node and its planes, and asks it from other threads.

    Args:
        open_node: Builds and starts the node on the loop; what it enters into the stack is closed with it.

    Raises:
        DynamoError: if the node cannot start.
    """

    def __init__(self, open_node: Callable[[AsyncExitStack], Coroutine[Any, Any, PeerNode]]) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="kvbm-peers", daemon=True)
        self._thread.start()
        self._exit = AsyncExitStack()
        self._closed = False
        try:
            self._node = self._call(open_node(self._exit), START_LIMIT_S)
        except BaseException:
            self.close()
            raise

    def contains(self, sequence_hashes: Sequence[int]) -> list[bool]:
        """Whether some peer is known to hold each block. Asks nobody."""
        return self._node.directory.contains(sequence_hashes)

    def fetch(self, sequence_hashes: Sequence[int], limit_s: float) -> Found:
        """Return what a peer sends whole within the time; empty if none does."""
        try:
            return self._call(self._node.fetch(sequence_hashes, limit_s), limit_s + GRACE_S)
        except (DynamoError, FutureTimeoutError):
            return {}

    def note(self, stored: Sequence[int], removed: Sequence[int]) -> None:
        """Take in a change of this worker's host tier, from any thread."""
        if not self._closed:
            self._loop.call_soon_threadsafe(self._node.server.note, stored, removed)

    def close(self) -> None:
        """Leave and end the thread. Idempotent."""
        if self._closed:
            return
        self._closed = True
        # If that fails, peers notice by the lease; this process must not wait for them.
        with suppress(DynamoError, FutureTimeoutError):
            self._call(self._exit.aclose(), STOP_LIMIT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work: Coroutine[Any, Any, T], limit_s: float) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(limit_s)
        except FutureTimeoutError:
            future.cancel()
            raise


def open_peers(  # noqa: PLR0913 - called in one place, every argument by name
    address: PeerAddress,
    *,
    layout: BlockLayout,
    fingerprint: str,
    read: ReadBlocks,
    max_blocks: int,
    clock: Clock,
    metrics: KvbmMetrics,
) -> PeerThread:
    """Return a started thread on the planes that the URLs name.

    Raises:
        ConfigurationError: if a plane is not installed or refuses its URL.
        DynamoError: if it cannot start.
    """

    async def open_node(stack: AsyncExitStack) -> PeerNode:
        discovery: Discovery = _plane("discoveries", address.discovery, clock)
        plane: RequestPlane = _plane("request_planes", address.plane, clock)
        for part in (discovery, plane):
            stack.push_async_callback(part.close)
            await part.start()
        node = PeerNode(
            discovery=discovery,
            plane=plane,
            namespace=address.namespace,
            layout=layout,
            fingerprint=fingerprint,
            read=read,
            max_blocks=max_blocks,
            clock=clock,
            metrics=metrics,
        )
        stack.push_async_callback(node.close)
        await node.start()
        return node

    return PeerThread(open_node)


def _plane(kind: str, url: str, clock: Clock) -> Any:
    scheme, found, _ = url.partition("://")
    if not found:
        raise ConfigurationError(f"peer address {url!r} has no scheme; give a URL such as tcp://127.0.0.1:0")
    return plugins.load(kind, scheme)(url, clock=clock, options={})
