"""Leaf-first least-recently-used order over content-addressed blocks.

A block whose child is still held must not go first: the child could never be matched again, since a prefix match ends
at the first hole. The order keeps every parent behind its children by touching a prefix deepest block first, so the
oldest entry is a leaf and eviction is O(1). A touch that could not reach all ancestors may leave a parent in front of
its child; eviction then moves that parent to the recent end, which restores the order and is paid for by that touch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dynamo_core.errors import InternalError


@dataclass(slots=True)
class _Entry:
    parent: int | None
    pins: int = 0


class LeafFirstLru:
    """Eviction order of one tier. Not thread-safe; its owner holds the lock."""

    def __init__(self) -> None:
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        # Children are counted by parent hash, held or not: a parent may come back after its children.
        self._children: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, sequence_hash: int) -> bool:
        return sequence_hash in self._entries

    def add(self, sequence_hash: int, parent: int | None) -> None:
        """Add a block, which must not be held, as the most recent one; its held parent is touched with it."""
        self._entries[sequence_hash] = _Entry(parent)
        if parent is None:
            return
        self._children[parent] = self._children.get(parent, 0) + 1
        if parent in self._entries:
            self._entries.move_to_end(parent)

    def touch(self, prefix: Sequence[int]) -> None:
        """Mark the blocks of a prefix, root first, as used now."""
        move = self._entries.move_to_end
        for sequence_hash in reversed(prefix):
            move(sequence_hash)

    def pin(self, sequence_hashes: Iterable[int]) -> None:
        """Keep blocks from eviction until unpinned; pins add up."""
        for sequence_hash in sequence_hashes:
            self._entries[sequence_hash].pins += 1

    def unpin(self, sequence_hashes: Iterable[int]) -> None:
        """Take back one pin of each block."""
        for sequence_hash in sequence_hashes:
            entry = self._entries[sequence_hash]
            if entry.pins == 0:
                raise InternalError(f"block {sequence_hash:#x} is unpinned more often than pinned")
            entry.pins -= 1

    def discard(self, sequence_hash: int) -> bool:
        """Remove a block; return whether it was held and not pinned."""
        entry = self._entries.get(sequence_hash)
        if entry is None or entry.pins:
            return False
        self._forget(sequence_hash, entry)
        return True

    def evict(self) -> int | None:
        """Remove and return the oldest unpinned leaf; None if every block is pinned or has a pinned descendant."""
        for _ in range(len(self._entries)):
            sequence_hash, entry = next(iter(self._entries.items()))
            if sequence_hash not in self._children and not entry.pins:
                self._forget(sequence_hash, entry)
                return sequence_hash
            self._entries.move_to_end(sequence_hash)
        return None

    def check_integrity(self) -> None:
        """Verify the child counts.

        Raises:
            InternalError: naming the first block whose count is wrong.
        """
        counts: dict[int, int] = {}
        for entry in self._entries.values():
            if entry.parent is not None:
                counts[entry.parent] = counts.get(entry.parent, 0) + 1
        if counts != self._children:
            wrong = sorted(set(counts.items()) ^ set(self._children.items()))[0][0]
            raise InternalError(
                f"block {wrong:#x} counts {self._children.get(wrong)} children, has {counts.get(wrong)}"
            )

    def _forget(self, sequence_hash: int, entry: _Entry) -> None:
        del self._entries[sequence_hash]
        if entry.parent is None:
            return
        left = self._children[entry.parent] - 1
        if left:
            self._children[entry.parent] = left
        else:
            del self._children[entry.parent]
