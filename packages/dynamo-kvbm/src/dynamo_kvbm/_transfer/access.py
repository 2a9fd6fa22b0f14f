"""Block access over memory that a layout describes: the CPU side of what ``torch_access`` does on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from dynamo_core.kv import BlockLayout
from dynamo_kvbm._transfer.copier import gather, scatter
from dynamo_kvbm._transfer.layout import KvArena


@runtime_checkable
class SupportsReadViews(Protocol):
    """Block access that can copy blocks out without making bytes of them."""

    def read_views(self, block_ids: Sequence[int]) -> list[memoryview]:
        """Copy blocks out; the views are valid until the next call of any method."""
        ...


class ArenaBlockAccess:
    """A ``BlockAccess`` of an arena.

    Args:
        arena: The blocks.
    """

    def __init__(self, arena: KvArena) -> None:
        self._arena = arena

    @property
    def layout(self) -> BlockLayout:
        """Shape of every block."""
        return self._arena.layout.block

    def read_blocks(self, block_ids: Sequence[int]) -> list[bytes]:
        """Copy blocks out.

        Raises:
            InvalidRequestError: if a block does not exist.
        """
        return gather(self._arena, block_ids)

    def write_blocks(self, block_ids: Sequence[int], data: Sequence[bytes | memoryview]) -> None:
        """Copy blocks in.

        Raises:
            InvalidRequestError: if a piece has another size than a block, or a block does not exist.
        """
        scatter(self._arena, block_ids, data)
