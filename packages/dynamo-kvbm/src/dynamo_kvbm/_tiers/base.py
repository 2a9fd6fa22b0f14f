"""What a tier may do beyond ``BlockStore``, detected one ability at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from dynamo_core.errors import InvalidRequestError
from dynamo_core.kv import BlockDescriptor, BlockStore
from dynamo_kvbm._eviction.hints import HintBook
from dynamo_kvbm._tiers.arena import Pages

Spill = Callable[[Sequence[BlockDescriptor], Sequence[bytes | memoryview]], None]
"""Receives blocks that are about to leave a tier. The data is valid during the call only."""


@runtime_checkable
class SupportsSpill(Protocol):
    """A tier that hands its victims on."""

    def spill_to(self, receive: Spill) -> None:
        """Call ``receive`` with every batch of victims, before their room is reused."""
        ...


@runtime_checkable
class SupportsHeld(Protocol):
    """A tier that can name what it holds."""

    def held(self) -> list[BlockDescriptor]:
        """Return every block held."""
        ...


@runtime_checkable
class SupportsDescribe(Protocol):
    """A tier that knows more of its blocks than their hashes."""

    def describe(self, sequence_hashes: Sequence[int]) -> list[BlockDescriptor]:
        """Return the descriptors of those of these blocks that are present."""
        ...


@runtime_checkable
class SupportsTouch(Protocol):
    """A tier that keeps recency."""

    def touch(self, prefix: Sequence[int]) -> None:
        """Mark the blocks of a prefix, root first, as used now; absent ones are ignored."""
        ...


@runtime_checkable
class SupportsLend(Protocol):
    """A tier whose bytes can be read in place."""

    def lend(self, sequence_hashes: Sequence[int]) -> AbstractContextManager[Mapping[int, memoryview]]:
        """Lend views of those blocks that are present, pinned while the context lasts."""
        ...


@runtime_checkable
class SupportsForeignChanges(Protocol):
    """A tier that others change too."""

    def drain_changes(self) -> list[int] | None:
        """Return the blocks that others stored or removed since the last call; None if they were too many to note."""
        ...


@runtime_checkable
class SupportsHintBook(Protocol):
    """A tier whose eviction order hears what is known of the future."""

    def hints(self, apply: Callable[[HintBook], None]) -> None:
        """Let ``apply`` write into the book of hints, under the tier's lock."""
        ...


@runtime_checkable
class SupportsQuotas(Protocol):
    """A tier that counts the blocks of tenants."""

    def used_by(self, tenant: str) -> int:
        """Blocks of a tenant that has a quota."""
        ...


@runtime_checkable
class SupportsArena(Protocol):
    """A tier in memory, that can say what memory it is."""

    @property
    def arena_bytes(self) -> int:
        """Bytes of all slots."""
        ...

    @property
    def pages(self) -> Pages:
        """Which pages they lie on."""
        ...


def described(store: BlockStore, sequence_hashes: Sequence[int]) -> list[BlockDescriptor]:
    """Return what a tier knows of those of these blocks that are present, parents before children."""
    known = store.describe(sequence_hashes) if isinstance(store, SupportsDescribe) else []
    return sorted(known, key=lambda block: block.position)


def require_pieces(blocks: Sequence[BlockDescriptor], data: Sequence[bytes | memoryview], block_bytes: int) -> None:
    """Check what ``put`` is given.

    Raises:
        InvalidRequestError: if there are more or fewer pieces than blocks, or a piece has another size than a block.
    """
    if len(blocks) != len(data):
        raise InvalidRequestError(f"{len(blocks)} blocks came with {len(data)} pieces of data", param="data")
    for piece in data:
        if len(piece) != block_bytes:
            raise InvalidRequestError(
                f"a block has {len(piece)} bytes, this tier stores blocks of {block_bytes}", param="data"
            )
