"""Host tiers of peers as one more place where the cascade finds blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dynamo_core.enums import Tier
from dynamo_core.kv import BlockDescriptor
from dynamo_kvbm._peers.node import Found


class Peers(Protocol):
    """What a source asks; ``PeerThread`` answers."""

    def contains(self, sequence_hashes: Sequence[int]) -> list[bool]:
        """Whether some peer is known to hold each block."""
        ...

    def fetch(self, sequence_hashes: Sequence[int], limit_s: float) -> Found:
        """Return what a peer sends whole within the time."""
        ...

    def note(self, stored: Sequence[int], removed: Sequence[int]) -> None:
        """Take in a change of this worker's host tier."""
        ...

    def close(self) -> None:
        """Leave."""
        ...


class PeerSource:
    """Reads from peers; nothing is written to them.

    Args:
        peers: The peers.
        limit_s: Longest wait for one fetch.
    """

    name = "peer"
    tier = Tier.EXTERNAL

    def __init__(self, peers: Peers, limit_s: float) -> None:
        self._peers = peers
        self._limit_s = limit_s
        self._last: Found = {}

    def contains(self, sequence_hashes: Sequence[int]) -> list[bool]:
        """Whether some peer is known to hold each block."""
        return self._peers.contains(sequence_hashes)

    def get(self, sequence_hashes: Sequence[int]) -> list[bytes | memoryview | None]:
        """Fetch the longest prefix that one peer sends in time; None for the others."""
        self._last = self._peers.fetch(sequence_hashes, self._limit_s)
        return [self._last[item][1] if item in self._last else None for item in sequence_hashes]

    def describe(self, sequence_hashes: Sequence[int]) -> list[BlockDescriptor]:
        """Return what the last fetch said of those of these blocks that it brought."""
        return [self._last[item][0] for item in sequence_hashes if item in self._last]

    def note_use(self, sequence_hashes: Sequence[int]) -> None:
        """Do nothing: a peer's tier keeps its own recency."""

    def close(self) -> None:
        """Leave the peers."""
        self._peers.close()
