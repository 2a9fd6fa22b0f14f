"""Engine events into reports for a ``KvEventSink``: our local hashes beside the engine's own block names."""

from __future__ import annotations

from dynamo_core.engine import KvEventSink
from dynamo_core.errors import BackendProtocolError
from dynamo_core.kv import BlockDescriptor
from dynamo_core.tokens import BlockHasher, pack_tokens, unpack_hashes
from dynamo_worker._kv_relay.events import EngineBatch, Removed, Stored


class EventTranslator:
    """State of one dp rank: at which position each known block stands, bounded by what the engine holds.

    Args:
        sink: Where reports go.
        block_size: Tokens a block that the worker's card names.
    """

    def __init__(self, sink: KvEventSink, block_size: int) -> None:
        self._sink = sink
        self._block_size = block_size
        self._positions: dict[int, int] = {}
        self._hashers: dict[str, BlockHasher] = {}

    def apply(self, batch: EngineBatch) -> None:
        """Report a message's events in order.

        Raises:
            BackendProtocolError: if a block has another size than the card says, or lacks tokens.
        """
        for event in batch.events:
            if isinstance(event, Stored):
                self._store(event)
            elif isinstance(event, Removed):
                self._remove(event)
            else:
                self.clear()

    def clear(self) -> None:
        """Report that everything is gone: the engine said so, or events were lost for good."""
        self._positions.clear()
        self._sink.cleared()

    def _store(self, event: Stored) -> None:
        if event.block_size != self._block_size:
            raise BackendProtocolError(
                f"the engine stores blocks of {event.block_size} tokens, the model card says {self._block_size}; "
                f"start the worker with --kv-block-size {event.block_size}"
            )
        if len(event.token_ids) != len(event.hashes) * event.block_size:
            raise BackendProtocolError(
                f"a stored event has {len(event.hashes)} blocks of {event.block_size} but {len(event.token_ids)} tokens"
            )
        hasher = self._hashers.setdefault(event.lora, BlockHasher(self._block_size, lora=event.lora))
        local = unpack_hashes(hasher.hash_tokens(pack_tokens(event.token_ids)).local)
        first = 0 if event.parent is None else self._positions.get(event.parent, -1) + 1
        parent = event.parent
        blocks: list[BlockDescriptor] = []
        for offset, (name, content) in enumerate(zip(event.hashes, local, strict=True)):
            blocks.append(BlockDescriptor(name, content, parent, first + offset))
            self._positions[name] = first + offset
            parent = name
        self._sink.stored(blocks, tier=event.tier, lora=event.lora)

    def _remove(self, event: Removed) -> None:
        for name in event.hashes:
            self._positions.pop(name, None)
        self._sink.removed(event.hashes, tier=event.tier)
