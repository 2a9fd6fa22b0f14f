"""What the block pool and the block manager have to say, passed on to the KV event sink and the connector."""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_core.engine import KvEventSink
from dynamo_core.kv import BlockAccess, BlockDescriptor, KvConnector, TierChange
from dynamo_worker._reference._sequence import sequence_hashes


class BlockEvents:
    """Listener of a block pool. Either receiver may be absent.

    Attributes:
        sink: Where KV events go.
        connector: Block manager that may keep a copy of blocks.
    """

    def __init__(self) -> None:
        self.sink: KvEventSink | None = None
        self.connector: KvConnector | None = None

    def bind(self, connector: KvConnector | None, access: BlockAccess) -> None:
        """Start a connector, if there is one, on the step thread."""
        self.connector = connector
        if connector is not None:
            connector.start(access, self.on_tier_change)

    def unbind(self) -> None:
        """Close the connector, after the last step."""
        connector, self.connector = self.connector, None
        if connector is not None:
            connector.close()

    def on_register(self, blocks: Sequence[BlockDescriptor], block_ids: Sequence[int]) -> None:
        """Report blocks that became reusable, and offer them for offload."""
        if self.sink is not None:
            self.sink.stored(blocks)
        if self.connector is not None:
            self.connector.on_register(blocks, block_ids)

    def on_evict(self, blocks: Sequence[BlockDescriptor], block_ids: Sequence[int]) -> None:
        """Give the connector its last chance to copy blocks, then report them gone from the device."""
        if self.connector is not None:
            self.connector.on_evict(blocks, block_ids)
        self.on_drop(blocks)

    def on_drop(self, blocks: Sequence[BlockDescriptor]) -> None:
        """Report blocks gone from the device."""
        if self.sink is not None and blocks:
            self.sink.removed(sequence_hashes(blocks))

    def on_tier_change(self, change: TierChange) -> None:
        """Report what a connector's tiers gained and lost."""
        if self.sink is None:
            return
        if change.stored:
            self.sink.stored(change.stored, tier=change.tier)
        if change.removed:
            self.sink.removed(change.removed, tier=change.tier)
