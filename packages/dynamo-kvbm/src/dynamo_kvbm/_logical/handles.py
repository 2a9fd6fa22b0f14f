"""What a holder may do with blocks, one class a state.

``Reset`` blocks are in the pool and nobody can name them. ``MutableBlocks`` are being filled, ``CompleteBlocks`` are
full and known by their hashes, ``ImmutableBlocks`` are shared. A step to the next state spends the handle and returns
one of the next class, so a step that the state does not allow cannot be written. A handle covers a run of blocks: one
lock and one check for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from dynamo_core.errors import InternalError, InvalidRequestError
from dynamo_core.kv import BlockDescriptor


class HandlePool(Protocol):
    """What handles ask of their pool."""

    def register(self, block_ids: list[int], blocks: Sequence[BlockDescriptor], tenant: str) -> ImmutableBlocks:
        """Publish complete blocks."""
        ...

    def reset(self, block_ids: list[int], tenant: str) -> None:
        """Take back blocks that were not published."""
        ...

    def hold(self, sequence_hashes: Sequence[int]) -> ImmutableBlocks | None:
        """Hold registered blocks once more; None if one is gone."""
        ...

    def let_go(self, sequence_hashes: Sequence[int], tails: Sequence[int]) -> None:
        """End one holder's claim on registered blocks."""
        ...

    def abandon(self, handle: BlocksHandle) -> None:
        """Take note of a handle that was dropped without being released."""
        ...


class BlocksHandle:
    """A claim on blocks. Leaving its context, or dropping it, gives them back."""

    def __init__(self, pool: HandlePool, block_ids: list[int]) -> None:
        self._pool = pool
        self._block_ids = block_ids
        self._spent = False

    @property
    def block_ids(self) -> list[int]:
        """Places of the blocks in the tier's storage.

        Raises:
            InternalError: if the handle was released or turned into the next state.
        """
        self._require_unspent()
        return self._block_ids

    def __len__(self) -> int:
        return 0 if self._spent else len(self._block_ids)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._spent:
            self.release()

    def __del__(self) -> None:
        # The collector may run this anywhere, inside the pool's own lock too: the pool takes it up on its next call.
        if not self._spent:
            self._pool.abandon(self)

    def release(self) -> None:
        """Give the blocks back."""
        self._spend()
        self._give_back()

    def take_back(self) -> None:
        """Give back what a dropped handle held; for the pool."""
        self._spent = True
        self._give_back()

    def _give_back(self) -> None:
        raise InternalError("a bare handle holds nothing")

    def _spend(self) -> None:
        self._require_unspent()
        self._spent = True

    def _require_unspent(self) -> None:
        if self._spent:
            raise InternalError("the handle was released, or turned into the next state, before")


class MutableBlocks(BlocksHandle):
    """Blocks being filled by one holder, in state ``Partial``.

    Args:
        pool: Where they come from.
        block_ids: Their places.
        tenant: Whose quota they count to.
    """

    def __init__(self, pool: HandlePool, block_ids: list[int], tenant: str) -> None:
        super().__init__(pool, block_ids)
        self._tenant = tenant

    def split(self, count: int) -> MutableBlocks:
        """Return a handle of the first ``count`` blocks, and keep the rest."""
        self._require_unspent()
        taken, self._block_ids = self._block_ids[:count], self._block_ids[count:]
        return MutableBlocks(self._pool, taken, self._tenant)

    def complete(self, blocks: Sequence[BlockDescriptor]) -> CompleteBlocks:
        """State what the full blocks hold.

        Raises:
            InvalidRequestError: if the counts differ; nothing changes then.
        """
        self._require_unspent()
        if len(blocks) != len(self._block_ids):
            raise InvalidRequestError(f"{len(blocks)} descriptors for {len(self._block_ids)} blocks", param="blocks")
        self._spent = True
        return CompleteBlocks(self._pool, self._block_ids, blocks, self._tenant)

    def _give_back(self) -> None:
        self._pool.reset(self._block_ids, self._tenant)


class CompleteBlocks(BlocksHandle):
    """Full blocks that nobody else can find, in state ``Complete``."""

    def __init__(self, pool: HandlePool, block_ids: list[int], blocks: Sequence[BlockDescriptor], tenant: str) -> None:
        super().__init__(pool, block_ids)
        self._blocks = blocks
        self._tenant = tenant

    def register(self) -> ImmutableBlocks:
        """Publish the blocks. Where a hash is known, that block takes the place of the given one, which is freed."""
        self._spend()
        return self._pool.register(self._block_ids, self._blocks, self._tenant)

    def _give_back(self) -> None:
        self._pool.reset(self._block_ids, self._tenant)


class ImmutableBlocks(BlocksHandle):
    """Shared blocks, in state ``Registered``, that stay while any handle holds them.

    Args:
        pool: Where they are.
        block_ids: Their places.
        sequence_hashes: Their identities, in the same order.
        tails: Those that keep the others: no block goes before a block that continues it.
    """

    def __init__(
        self, pool: HandlePool, block_ids: list[int], sequence_hashes: Sequence[int], tails: Sequence[int]
    ) -> None:
        super().__init__(pool, block_ids)
        self._hashes = sequence_hashes
        self._tails = tails

    @property
    def sequence_hashes(self) -> Sequence[int]:
        """Identities of the blocks."""
        return self._hashes

    def clone(self) -> ImmutableBlocks:
        """Return another claim on the same blocks."""
        self._require_unspent()
        held = self._pool.hold(self._hashes)
        if held is None:
            raise InternalError("a held block is gone")
        return held

    def downgrade(self) -> WeakBlocks:
        """Return a reference that keeps nothing."""
        self._require_unspent()
        return WeakBlocks(self._pool, self._hashes)

    def _give_back(self) -> None:
        self._pool.let_go(self._hashes, self._tails)


class WeakBlocks:
    """Names blocks without keeping them."""

    def __init__(self, pool: HandlePool, sequence_hashes: Sequence[int]) -> None:
        self._pool = pool
        self._hashes = sequence_hashes

    def upgrade(self) -> ImmutableBlocks | None:
        """Hold the blocks, if all of them are still there."""
        return self._pool.hold(self._hashes)
