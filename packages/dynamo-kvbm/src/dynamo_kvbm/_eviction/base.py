"""What an eviction order is, and the books that every one of them keeps.

A block whose child is still held must not go first: the child could never be matched again, since a prefix match ends
at the first hole. So every order evicts leaves only, whatever its rule of preference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from dynamo_core.errors import InternalError


@runtime_checkable
class EvictionOrder(Protocol):
    """Decides which block of a tier goes next. Not thread-safe; its owner holds the lock."""

    def __len__(self) -> int:
        """Blocks held."""
        ...

    def __contains__(self, sequence_hash: int) -> bool:
        """Whether a block is held."""
        ...

    def insert(self, blocks: Sequence[tuple[int, int | None]]) -> None:
        """Add blocks, each with its parent, none of them held, in sequence order; the caller has made room."""
        ...

    def touch(self, sequence_hashes: Sequence[int]) -> None:
        """Note a use of held blocks, in sequence order. Their ancestors count as used with them."""
        ...

    def pin(self, sequence_hashes: Iterable[int]) -> None:
        """Keep blocks from eviction until unpinned; pins add up."""
        ...

    def unpin(self, sequence_hashes: Iterable[int]) -> None:
        """Take back one pin of each block. Raises ``InternalError`` if there is none."""
        ...

    def discard(self, sequence_hash: int) -> bool:
        """Remove a block; return whether it was held and not pinned."""
        ...

    def evict(self) -> int | None:
        """Remove and return the next unpinned leaf; None if every leaf is pinned."""
        ...

    def check_integrity(self) -> None:
        """Verify the books. Raises ``InternalError`` with what is wrong."""
        ...


@dataclass(slots=True)
class Node:
    """Books of one block."""

    parent: int | None
    pins: int = 0


class Lineage:
    """Who descends from whom, and what is pinned."""

    def __init__(self) -> None:
        self._nodes: dict[int, Node] = {}
        # Children are counted by parent hash, held or not: a parent may come back after its children.
        self._children: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, sequence_hash: int) -> bool:
        return sequence_hash in self._nodes

    def add(self, sequence_hash: int, parent: int | None) -> None:
        """Add a block that is not held."""
        self._nodes[sequence_hash] = Node(parent)
        if parent is not None:
            self._children[parent] = self._children.get(parent, 0) + 1

    def remove(self, sequence_hash: int) -> None:
        """Forget a block."""
        parent = self._nodes.pop(sequence_hash).parent
        if parent is None:
            return
        left = self._children[parent] - 1
        if left:
            self._children[parent] = left
        else:
            del self._children[parent]

    def evictable(self, sequence_hash: int) -> bool:
        """Whether a held block is an unpinned leaf."""
        return sequence_hash not in self._children and not self._nodes[sequence_hash].pins

    def pinned(self, sequence_hash: int) -> bool:
        """Whether a held block is pinned."""
        return self._nodes[sequence_hash].pins > 0

    def pin(self, sequence_hashes: Iterable[int]) -> None:
        """Add one pin to each block."""
        for sequence_hash in sequence_hashes:
            self._nodes[sequence_hash].pins += 1

    def unpin(self, sequence_hashes: Iterable[int]) -> None:
        """Take one pin from each block."""
        for sequence_hash in sequence_hashes:
            node = self._nodes[sequence_hash]
            if node.pins == 0:
                raise InternalError(f"block {sequence_hash:#x} is unpinned more often than pinned")
            node.pins -= 1

    def upward(self, sequence_hashes: Sequence[int]) -> Iterator[int]:
        """Yield the blocks and all their held ancestors, every child before its parent.

        A block that hangs on several of the given ones comes once for each, so the last time it comes it is behind
        all of its descendants.
        """
        seen: set[int] = set()
        for start in reversed(sequence_hashes):
            if start in seen:
                continue
            block: int | None = start
            while block is not None and (node := self._nodes.get(block)) is not None:
                seen.add(block)
                yield block
                block = node.parent

    def check_integrity(self) -> None:
        """Verify the child counts."""
        counts: dict[int, int] = {}
        for node in self._nodes.values():
            if node.parent is not None:
                counts[node.parent] = counts.get(node.parent, 0) + 1
        if counts != self._children:
            wrong = min(set(counts.items()) ^ set(self._children.items()))[0]
            raise InternalError(
                f"block {wrong:#x} counts {self._children.get(wrong)} children, has {counts.get(wrong)}"
            )
