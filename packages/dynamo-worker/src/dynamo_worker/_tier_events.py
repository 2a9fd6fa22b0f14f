"""Wraps a block manager so that what moves between its tiers is published as KV events."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from dynamo_core.engine import KvEventSink
from dynamo_core.kv import (
    BlockAccess,
    BlockDescriptor,
    BlockHints,
    KvConnector,
    MatchResult,
    SupportsBlockHints,
    SupportsPrefetch,
    TierChange,
)


class PublishingConnector:
    """A ``KvConnector`` that also reports each tier change to a KV event sink.

    It takes hints and prefetches for every connector; one that has no use for them never hears of them. Changes made
    before the sink is bound, for example blocks found on disk at start, are kept for it.
    """

    def __init__(self, connector: KvConnector) -> None:
        self._connector = connector
        self._sink: KvEventSink | None = None
        self._early: list[TierChange] = []
        # An engine may report the same change to the same sink, which drops repeats; a change of another thread must
        # not come between the two reports.
        self._order = threading.Lock()

    def bind(self, sink: KvEventSink) -> None:
        """Report to ``sink`` from now on."""
        with self._order:
            self._sink = sink
            early, self._early = self._early, []
            for change in early:
                _report(change, sink)

    def start(self, access: BlockAccess, on_change: Callable[[TierChange], None]) -> None:
        """Bind to an engine; its own listener hears of every change too."""

        def publish(change: TierChange) -> None:
            with self._order:
                self._publish(change)
                on_change(change)

        self._connector.start(access, publish)

    def match(self, sequence_hashes: Sequence[int]) -> MatchResult:
        """Return what lower tiers hold."""
        return self._connector.match(sequence_hashes)

    def onboard(self, sequence_hashes: Sequence[int], block_ids: Sequence[int]) -> int:
        """Copy blocks into the device."""
        return self._connector.onboard(sequence_hashes, block_ids)

    def on_register(self, blocks: Sequence[BlockDescriptor], block_ids: Sequence[int]) -> None:
        """Device blocks became shareable."""
        self._connector.on_register(blocks, block_ids)

    def on_evict(self, blocks: Sequence[BlockDescriptor], block_ids: Sequence[int]) -> None:
        """Device blocks are about to be reused."""
        self._connector.on_evict(blocks, block_ids)

    def hint(self, sequence_hashes: Sequence[int], hints: BlockHints) -> None:
        """Pass on what is known of the future of blocks."""
        if isinstance(self._connector, SupportsBlockHints):
            self._connector.hint(sequence_hashes, hints)

    def prefetch(self, sequence_hashes: Sequence[int]) -> None:
        """Have blocks brought near."""
        if isinstance(self._connector, SupportsPrefetch):
            self._connector.prefetch(sequence_hashes)

    def clear(self) -> None:
        """Forget everything."""
        self._connector.clear()

    def close(self) -> None:
        """Release storage."""
        self._connector.close()

    def _publish(self, change: TierChange) -> None:
        if self._sink is None:
            self._early.append(change)
        else:
            _report(change, self._sink)


def _report(change: TierChange, sink: KvEventSink) -> None:
    if change.removed:
        sink.removed(change.removed, tier=change.tier)
    if change.stored:
        sink.stored(change.stored, tier=change.tier)
