"""What an eviction order is, and the books that every one of them keeps.

A block whose child is still held must not go first: the child could never be matched again, since a prefix match ends
at the first hole. So every order evicts leaves only, whatever its rule of preference.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
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


@runtime_checkable
class SupportsPriority(Protocol):
    """An order that weighs blocks; lower goes first."""

    def prioritise(self, priorities: Iterable[tuple[int, int]]) -> None:
        """Set the priority of held blocks."""
        ...


@runtime_checkable
class SupportsHints(Protocol):
    """An order that listens to what is known of the future."""

    def expect(self, sequence_hashes: Sequence[int], next_use_s: float | None) -> None:
        """Say when held blocks, in sequence order, will be used next on the order's clock; None for never again."""
        ...


class Lineage:
    """Who descends from whom, and what is pinned.

    Attributes:
        parents: Parent of each held block; the parent itself may be held or not. To be read only.
    """

    def __init__(self) -> None:
        self.parents: dict[int, int | None] = {}
        # Children are counted by parent hash, held or not: a parent may come back after its children.
        self._children: dict[int, int] = {}
        self._pins: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.parents)

    def __contains__(self, sequence_hash: int) -> bool:
        return sequence_hash in self.parents

    def add(self, sequence_hash: int, parent: int | None) -> None:
        """Add a block that is not held."""
        self.parents[sequence_hash] = parent
        if parent is not None:
            self._children[parent] = self._children.get(parent, 0) + 1

    def remove(self, sequence_hash: int) -> None:
        """Forget a block."""
        parent = self.parents.pop(sequence_hash)
        if parent is None:
            return
        left = self._children[parent] - 1
        if left:
            self._children[parent] = left
        else:
            del self._children[parent]

    def leaf(self, sequence_hash: int) -> bool:
        """Whether a block has no held child."""
        return sequence_hash not in self._children

    def evictable(self, sequence_hash: int) -> bool:
        """Whether a held block is an unpinned leaf."""
        return sequence_hash not in self._children and sequence_hash not in self._pins

    def pinned(self, sequence_hash: int) -> bool:
        """Whether a held block is pinned."""
        return sequence_hash in self._pins

    def pin(self, sequence_hashes: Iterable[int]) -> None:
        """Add one pin to each block."""
        for sequence_hash in sequence_hashes:
            self._pins[sequence_hash] = self._pins.get(sequence_hash, 0) + 1

    def unpin(self, sequence_hashes: Iterable[int]) -> None:
        """Take one pin from each block."""
        for sequence_hash in sequence_hashes:
            left = self._pins.get(sequence_hash, 0) - 1
            if left < 0:
                raise InternalError(f"block {sequence_hash:#x} is unpinned more often than pinned")
            if left:
                self._pins[sequence_hash] = left
            else:
                del self._pins[sequence_hash]

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
            while block is not None and block in self.parents:
                seen.add(block)
                yield block
                block = self.parents[block]

    def check_integrity(self) -> None:
        """Verify the child counts."""
        counts: dict[int, int] = {}
        for parent in self.parents.values():
            if parent is not None:
                counts[parent] = counts.get(parent, 0) + 1
        if counts != self._children:
            wrong = min(set(counts.items()) ^ set(self._children.items()))[0]
            raise InternalError(
                f"block {wrong:#x} counts {self._children.get(wrong)} children, has {counts.get(wrong)}"
            )
        if not self._pins.keys() <= self.parents.keys():
            raise InternalError("a block that is not held is pinned")


class LeafOrder(ABC):
    """What all orders do alike. A subclass says where blocks go, and which leaf is next."""

    def __init__(self) -> None:
        self._lineage = Lineage()

    def __len__(self) -> int:
        return len(self._lineage)

    def __contains__(self, sequence_hash: int) -> bool:
        return sequence_hash in self._lineage

    def pin(self, sequence_hashes: Iterable[int]) -> None:
        """Keep blocks from eviction."""
        self._lineage.pin(sequence_hashes)

    def unpin(self, sequence_hashes: Iterable[int]) -> None:
        """Take back one pin of each block."""
        self._lineage.unpin(sequence_hashes)

    def discard(self, sequence_hash: int) -> bool:
        """Remove a block unless it is pinned or not held."""
        if sequence_hash not in self._lineage or self._lineage.pinned(sequence_hash):
            return False
        self._drop(sequence_hash)
        return True

    @abstractmethod
    def _drop(self, sequence_hash: int) -> None:
        """Forget a held block."""
