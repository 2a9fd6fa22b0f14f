"""An eviction order: the block that came first goes first, leaves before what they grew from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from dynamo_core.errors import InternalError


class OldestLeaf:
    """First in, first out, among blocks that no other held block continues."""

    def __init__(self, capacity_blocks: int) -> None:
        self._parents: dict[int, int | None] = {}  # in the order of arrival
        self._children: Counter[int] = Counter()
        self._pins: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._parents)

    def __contains__(self, sequence_hash: int) -> bool:
        return sequence_hash in self._parents

    def insert(self, blocks: Sequence[tuple[int, int | None]]) -> None:
        """Add blocks with their parents."""
        for sequence_hash, parent in blocks:
            self._parents[sequence_hash] = parent
            if parent is not None:
                self._children[parent] += 1

    def touch(self, sequence_hashes: Sequence[int]) -> None:
        """Uses do not count here."""

    def pin(self, sequence_hashes: Iterable[int]) -> None:
        """Keep blocks until unpinned."""
        self._pins.update(sequence_hashes)

    def unpin(self, sequence_hashes: Iterable[int]) -> None:
        """Take back one pin of each."""
        for sequence_hash in sequence_hashes:
            if not self._pins[sequence_hash]:
                raise InternalError(f"block {sequence_hash:#x} has no pin to take back")
            self._pins[sequence_hash] -= 1

    def discard(self, sequence_hash: int) -> bool:
        """Remove a block that is held and not pinned."""
        if sequence_hash not in self._parents or self._pins[sequence_hash]:
            return False
        parent = self._parents.pop(sequence_hash)
        if parent is not None:
            self._children[parent] -= 1
        return True

    def evict(self) -> int | None:
        """Remove and return the oldest leaf that is not pinned."""
        for sequence_hash in self._parents:
            if not self._children[sequence_hash] and self.discard(sequence_hash):
                return sequence_hash
        return None

    def check_integrity(self) -> None:
        """Verify that children are counted as they are."""
        counted = Counter(parent for parent in self._parents.values() if parent is not None)
        if counted != +self._children:
            raise InternalError("children are counted wrongly")
