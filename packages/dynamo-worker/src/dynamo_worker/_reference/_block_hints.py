"""What requests say of the future of their blocks, and which of them wait, told to a block manager that listens."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import msgspec

from dynamo_core.kv import BlockHints, KvConnector, SupportsBlockHints, SupportsPrefetch
from dynamo_core.requests import GenerateRequest
from dynamo_worker._reference._block_pool import BlockPool
from dynamo_worker._reference._sequence import Sequence, sequence_hashes

LOOKAHEAD_SEQUENCES = 8
_NOTHING = BlockHints()


class BlockHinter:
    """Calls a connector's ``hint`` and ``prefetch`` on the step thread.

    Args:
        connector: A block manager; one that has neither ability is spared.
        pool: Device blocks; what they hold need not be brought near.
        block_size: Tokens a block.
    """

    def __init__(self, connector: KvConnector | None, pool: BlockPool, block_size: int) -> None:
        self._hints = connector if isinstance(connector, SupportsBlockHints) else None
        self._prefetches = connector if isinstance(connector, SupportsPrefetch) else None
        self._pool = pool
        self._block_size = block_size

    def on_arrival(self, sequence: Sequence) -> None:
        """Say whose the blocks of a request are and what they are worth, before any of them moves.

        When its session goes on, or that it has ended, holds from its own end on: said now, it would push out the
        blocks that the request itself waits to use.
        """
        if (hints := _said(sequence.request)) is not None:
            self._hint(sequence, msgspec.structs.replace(hints, session_ended=False, next_turn_s=None))

    def on_end(self, sequence: Sequence) -> None:
        """Say all that is known of the blocks of a request, those of its answer too."""
        if (hints := _said(sequence.request)) is not None:
            self._hint(sequence, hints)

    def on_wait(self, waiting: Iterable[Sequence]) -> None:
        """Have the blocks of the requests that are next in the queue brought near, once for each."""
        if self._prefetches is None:
            return
        for sequence in islice(waiting, LOOKAHEAD_SEQUENCES):
            if not sequence.is_looked_ahead:
                sequence.is_looked_ahead = True
                # The newest token is computed whatever the tiers hold, so its block is not needed.
                hashes = self._hashes(sequence, len(sequence.tokens) - 1)
                missing = hashes[len(self._pool.get_computed_blocks(hashes)) :]
                if missing:
                    self._prefetches.prefetch(missing)

    def _hint(self, sequence: Sequence, hints: BlockHints) -> None:
        hashes = self._hashes(sequence, len(sequence.tokens))
        if self._hints is not None and hashes and hints != _NOTHING:
            self._hints.hint(hashes, hints)

    def _hashes(self, sequence: Sequence, num_tokens: int) -> list[int]:
        return sequence_hashes(sequence.descriptors(num_tokens // self._block_size))


def _said(request: GenerateRequest) -> BlockHints | None:
    """Return what a request says of its blocks. They count to the tenant it is routed for unless it names another."""
    tenant = request.routing.tenant
    hints = request.block_hints
    if hints is None:
        return BlockHints(tenant=tenant) if tenant else None
    return msgspec.structs.replace(hints, tenant=tenant) if tenant and not hints.tenant else hints
