from __future__ import annotations

from collections.abc import Sequence

import pytest

from dynamo_core.clock import SystemClock
from dynamo_core.enums import Tier
from dynamo_core.errors import ConfigurationError
from dynamo_core.kv import BlockDescriptor, BlockLayout, TierChange
from dynamo_core.telemetry import Metrics
from dynamo_core.testing import DeviceBlocks
from dynamo_kvbm import BlockManager, HostTier, create_connector
from dynamo_kvbm._admission import CostTest
from dynamo_kvbm._peers.node import Found
from dynamo_kvbm._peers.source import PeerSource

LIMIT_S = 0.5


class OnePeer:
    """A peer that holds three blocks and sends two of them."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], float]] = []
        self.closed = False

    def contains(self, sequence_hashes: Sequence[int]) -> list[bool]:
        return [item in (1, 2, 3) for item in sequence_hashes]

    def fetch(self, sequence_hashes: Sequence[int], limit_s: float) -> Found:
        self.asked.append((list(sequence_hashes), limit_s))
        blocks = [BlockDescriptor(item, 0, item - 1 or None) for item in sequence_hashes if item != 3]
        return {block.sequence_hash: (block, memoryview(bytes([block.sequence_hash]) * 4)) for block in blocks}

    def note(self, stored: Sequence[int], removed: Sequence[int]) -> None:
        raise AssertionError("a manager tells peers through the listener it was given")

    def close(self) -> None:
        self.closed = True


def manager(peer: OnePeer, changes: list[TierChange], cost: CostTest | None = None) -> BlockManager:
    return BlockManager(
        HostTier(4, 4),
        block_bytes=4,
        on_change=changes.append,
        metrics=Metrics(),
        clock=SystemClock(),
        cost_test=cost,
        peers=PeerSource(peer, LIMIT_S),
    )


def test_a_peer_is_asked_for_what_is_not_here_and_what_it_sends_is_kept() -> None:
    peer, changes = OnePeer(), list[TierChange]()
    ours = manager(peer, changes)
    assert ours.match([1, 2, 3, 4]).tiers == (Tier.EXTERNAL,) * 3
    with ours.lend([1, 2, 3]) as views:
        assert [bytes(view) for view in views] == [b"\1" * 4, b"\2" * 4]
    assert peer.asked == [([1, 2, 3], LIMIT_S)]
    assert [block.parent_hash for block in changes[0].stored] == [None, 1]
    assert ours.match([1, 2]).tiers == (Tier.HOST, Tier.HOST)
    ours.close()
    assert peer.closed


def test_a_peer_that_costs_more_than_computing_is_not_offered() -> None:
    cost = CostTest(SystemClock())
    cost.recompute_s = 0.1
    cost.fetched("peer", 1, 0.5)
    assert manager(OnePeer(), [], cost).match([1, 2]).blocks == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peer_discovery": "mem://"}, "peer_discovery needs model"),
        ({"peer_discovery": "mem", "model": "m"}, "has no scheme"),
        ({"peer_discovery": "carrier-pigeon://x", "model": "m"}, "is named 'carrier-pigeon'"),
    ],
)
def test_bad_peer_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        create_connector(options=options, clock=SystemClock(), metrics=Metrics()).start(
            DeviceBlocks(BlockLayout(1, 2, 1, 2)), lambda change: None
        )
