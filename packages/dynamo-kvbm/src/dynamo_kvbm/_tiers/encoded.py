"""A tier behind a codec: what goes in is encoded, what comes out is decoded."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from dynamo_core.enums import Tier
from dynamo_core.kv import BlockDescriptor, BlockStore
from dynamo_kvbm._codecs import BlockCodec
from dynamo_kvbm._tiers.base import (
    Spill,
    SupportsDescribe,
    SupportsForeignChanges,
    SupportsHeld,
    SupportsSpill,
    SupportsTouch,
    require_pieces,
)

_log = structlog.get_logger(__name__)


class EncodedStore:
    """A ``BlockStore`` that keeps encoded blocks in another.

    Args:
        store: Where they are kept.
        codec: How.
        block_bytes: Size of a block before it is encoded.
    """

    def __init__(self, store: BlockStore, codec: BlockCodec, block_bytes: int) -> None:
        self._store = store
        self._codec = codec
        self._block_bytes = block_bytes

    @property
    def tier(self) -> Tier:
        """The inner store's tier."""
        return self._store.tier

    @property
    def capacity_blocks(self) -> int:
        """The inner store's capacity."""
        return self._store.capacity_blocks

    def contains(self, sequence_hashes: Sequence[int]) -> list[bool]:
        """Whether each block is present."""
        return self._store.contains(sequence_hashes)

    def put(self, blocks: Sequence[BlockDescriptor], data: Sequence[bytes | memoryview]) -> list[int]:
        """Encode and store blocks that are not present; see ``BlockStore.put``."""
        require_pieces(blocks, data, self._block_bytes)
        return self._store.put(blocks, [self._codec.encode(piece) for piece in data])

    def get(self, sequence_hashes: Sequence[int]) -> list[bytes | memoryview | None]:
        """Return the decoded bytes of each block, None for those that are absent or cannot be decoded."""
        found = self._store.get(sequence_hashes)
        pieces = [self._decoded(piece) for piece in found]
        pairs = zip(sequence_hashes, found, pieces, strict=True)
        damaged = [item for item, stored, piece in pairs if stored is not None and piece is None]
        if damaged:
            self._store.remove(damaged)
        return pieces

    def remove(self, sequence_hashes: Sequence[int]) -> None:
        """Drop blocks; absent ones are ignored."""
        self._store.remove(sequence_hashes)

    def close(self) -> None:
        """Close the inner store. Idempotent."""
        self._store.close()

    def held(self) -> list[BlockDescriptor]:
        """Return every block held, as far as the inner store can name them."""
        return self._store.held() if isinstance(self._store, SupportsHeld) else []

    def describe(self, sequence_hashes: Sequence[int]) -> list[BlockDescriptor]:
        """Return the descriptors of those of these blocks that the inner store can name."""
        return self._store.describe(sequence_hashes) if isinstance(self._store, SupportsDescribe) else []

    def drain_changes(self) -> list[int] | None:
        """Return what others changed in the inner store, if others can."""
        return self._store.drain_changes() if isinstance(self._store, SupportsForeignChanges) else []

    def touch(self, prefix: Sequence[int]) -> None:
        """Renew blocks in the inner store, if it keeps recency."""
        if isinstance(self._store, SupportsTouch):
            self._store.touch(prefix)

    def spill_to(self, receive: Spill) -> None:
        """Hand the inner store's victims on, decoded."""

        def decode(blocks: Sequence[BlockDescriptor], data: Sequence[bytes | memoryview]) -> None:
            pairs = [(block, self._decoded(piece)) for block, piece in zip(blocks, data, strict=True)]
            whole = [(block, piece) for block, piece in pairs if piece is not None]
            receive([block for block, _ in whole], [piece for _, piece in whole])

        if isinstance(self._store, SupportsSpill):
            self._store.spill_to(decode)

    def _decoded(self, stored: bytes | memoryview | None) -> bytes | memoryview | None:
        if stored is None:
            return None
        try:
            return self._codec.decode(stored)
        except ValueError as error:
            _log.warning("stored block cannot be decoded", tier=self.tier.value, error=str(error))
            return None
