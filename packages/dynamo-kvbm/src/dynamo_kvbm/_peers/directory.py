"""Which peers hold which blocks, within a bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dynamo_kvbm._metrics import KvbmMetrics


@dataclass(eq=False)
class Peer:
    """One peer.

    Attributes:
        instance_id: Its identity.
        address: Where its blocks are asked for.
        held: Its blocks.
    """

    instance_id: int
    address: str
    held: set[int] = field(default_factory=set[int])


class PeerDirectory:
    """Written on the event loop, read on any thread: each step is one operation on a dictionary.

    Args:
        max_blocks: Most blocks known of all peers together; what comes beyond is not noted, and counted.
        metrics: Where counts go.
    """

    def __init__(self, max_blocks: int, metrics: KvbmMetrics) -> None:
        self._max_blocks = max_blocks
        self._metrics = metrics
        self._holders: dict[int, tuple[Peer, ...]] = {}
        self._known = 0

    def contains(self, sequence_hashes: Sequence[int]) -> list[bool]:
        """Whether some peer holds each block."""
        return [item in self._holders for item in sequence_hashes]

    def best(self, sequence_hashes: Sequence[int]) -> tuple[Peer, int] | None:
        """Return the peer that holds the longest prefix of these blocks, and how long that is."""
        first = self._holders.get(sequence_hashes[0], ()) if sequence_hashes else ()
        found: tuple[Peer, int] | None = None
        for peer in first:
            length = next((i for i, item in enumerate(sequence_hashes) if item not in peer.held), len(sequence_hashes))
            if found is None or length > found[1]:
                found = peer, length
        return found

    def add(self, peer: Peer, sequence_hashes: Sequence[int]) -> None:
        """Note blocks of a peer."""
        for item in sequence_hashes:
            if item in peer.held:
                continue
            if self._known >= self._max_blocks:
                self._metrics.peer_unnoted.inc()
                continue
            peer.held.add(item)
            self._holders[item] = (*self._holders.get(item, ()), peer)
            self._known += 1
        self._metrics.peer_known.set(self._known)

    def remove(self, peer: Peer, sequence_hashes: Sequence[int]) -> None:
        """Forget blocks of a peer."""
        for item in sequence_hashes:
            if item not in peer.held:
                continue
            peer.held.discard(item)
            self._known -= 1
            left = tuple(other for other in self._holders.get(item, ()) if other is not peer)
            if left:
                self._holders[item] = left
            else:
                self._holders.pop(item, None)
        self._metrics.peer_known.set(self._known)

    def forget(self, peer: Peer) -> None:
        """Forget all blocks of a peer."""
        self.remove(peer, list(peer.held))
