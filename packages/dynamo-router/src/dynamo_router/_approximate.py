"""An index predicted from the router's own decisions, for workers whose events are missing or not believed.

A routed prompt counts as held by its worker for a time, within the worker's capacity. Each use of a prompt has a turn,
and a block has the turn of its last use, so a parent's is never older than its children's. Uses are looked at again in
order when they expire or room is needed, and only then is what nobody used since dropped, last block first: what goes
is a leaf, and prefixes stay closed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from dynamo_router._search import closed_depths

DEFAULT_CAPACITY_BLOCKS = 65_536
# Uses that name this many times the blocks held are gone through, so that a busy prompt's do not pile up.
_MOST_NAMED = 4
_FEW_BLOCKS = 4096
_FEW_USES = 256
_MOST_PENDING = 64


class _Use:
    """One use of a prompt: its turn and time, and its blocks still to be looked at again."""

    __slots__ = ("at_s", "hashes", "left", "turn")

    def __init__(self, turn: int, at_s: float, hashes: Sequence[int]) -> None:
        self.turn = turn
        self.at_s = at_s
        self.hashes = hashes
        self.left = len(hashes)


class _Shelf:
    """What one slot is believed to hold."""

    __slots__ = ("ends", "named", "turns", "uses")

    def __init__(self) -> None:
        # Last block -> use that ends there.
        self.ends: dict[int, _Use] = {}
        # Block -> turn of its last use.
        self.turns: dict[int, int] = {}
        self.uses: deque[_Use] = deque()
        self.named = 0


class ApproximateIndex:
    """Predicted holders of blocks.

    Args:
        ttl_s: Seconds for which a routed block counts as held; each use renews it.
    """

    def __init__(self, ttl_s: float) -> None:
        self.ttl_s = ttl_s
        self._holders: dict[int, int] = {}
        self._shelves: dict[int, _Shelf] = {}
        self._turn = 0
        # Prompts to enter before the next look: a decision need not wait for it.
        self._pending: list[tuple[int, Sequence[int], float, int]] = []
        # No use is older.
        self._oldest_s = math.inf

    def __len__(self) -> int:
        self.settle()
        return sum(len(shelf.turns) for shelf in self._shelves.values())

    def insert(self, slot: int, hashes: Sequence[int], now_s: float, *, capacity_blocks: int = 0) -> None:
        """Enter a routed prompt; beyond the capacity the least recently used blocks go."""
        self._pending.append((slot, hashes, now_s, capacity_blocks or DEFAULT_CAPACITY_BLOCKS))
        if len(self._pending) >= _MOST_PENDING:
            self.settle()

    def settle(self) -> None:
        """Do now what is put off until the next look."""
        if self._pending:
            pending, self._pending = self._pending, []
            for entry in pending:
                self._enter(*entry)

    def _enter(self, slot: int, hashes: Sequence[int], now_s: float, capacity_blocks: int) -> None:
        shelf = self._shelves.get(slot)
        if shelf is None:
            shelf = self._shelves[slot] = _Shelf()
        depth = next((depth for depth, _ in closed_depths(self._holders, hashes, 1 << slot)), 0)
        keys = list(hashes)
        if not keys:
            return
        # A use that this one repeats or goes on from has nothing of its own any more.
        earlier = shelf.ends.pop(keys[depth - 1], None) if depth else None
        if earlier is not None:
            shelf.named -= earlier.left
            earlier.left, earlier.hashes = 0, ()
        self._mark(1 << slot, keys[depth:])
        self._turn += 1
        shelf.turns.update(dict.fromkeys(keys, self._turn))
        use = shelf.ends[keys[-1]] = _Use(self._turn, now_s, hashes)
        shelf.uses.append(use)
        shelf.named += len(keys)
        self._oldest_s = min(self._oldest_s, now_s)
        self._shrink(slot, shelf, now_s - self.ttl_s, capacity_blocks or DEFAULT_CAPACITY_BLOCKS)
        if _is_crowded(shelf):
            _forget_renewed(shelf)

    def match(self, hashes: Sequence[int], among: int, now_s: float) -> list[tuple[int, int]]:
        """Return ``(blocks, slots)`` for each distinct depth above zero; what has expired is dropped first."""
        self.settle()
        if self._oldest_s < now_s - self.ttl_s:
            for slot, shelf in self._shelves.items():
                self._shrink(slot, shelf, now_s - self.ttl_s, len(shelf.turns))
            self._oldest_s = min(
                (shelf.uses[0].at_s for shelf in self._shelves.values() if shelf.uses), default=math.inf
            )
        return closed_depths(self._holders, hashes, among)

    def holds(self, slot: int, key: int) -> bool:
        """Whether a slot is believed to hold a block, expired or not."""
        self.settle()
        shelf = self._shelves.get(slot)
        return shelf is not None and key in shelf.turns

    def blocks_of(self, slot: int) -> int:
        """Return how many blocks a slot is believed to hold."""
        self.settle()
        shelf = self._shelves.get(slot)
        return 0 if shelf is None else len(shelf.turns)

    def clear(self, slot: int) -> None:
        """Forget what a slot holds."""
        self.settle()
        shelf = self._shelves.pop(slot, None)
        if shelf is not None:
            for key in shelf.turns:
                self._unmark(slot, key)

    def _mark(self, bit: int, keys: list[int]) -> None:
        holders = self._holders
        if holders.keys().isdisjoint(keys):
            holders.update(dict.fromkeys(keys, bit))
        else:
            for key in keys:
                holders[key] = holders.get(key, 0) | bit

    def _unmark(self, slot: int, key: int) -> None:
        rest = self._holders[key] & ~(1 << slot)
        if rest:
            self._holders[key] = rest
        else:
            del self._holders[key]

    def _shrink(self, slot: int, shelf: _Shelf, oldest_s: float, capacity: int) -> None:
        turns, uses = shelf.turns, shelf.uses
        while uses:
            use = uses[0]
            expired = use.at_s < oldest_s
            if not expired and len(turns) <= capacity:
                return
            hashes = use.hashes
            while use.left and (expired or len(turns) > capacity):
                use.left -= 1
                shelf.named -= 1
                key = hashes[use.left]
                if turns.get(key) == use.turn:
                    del turns[key]
                    self._unmark(slot, key)
            if not use.left:
                uses.popleft()
                if len(hashes) and shelf.ends.get(hashes[-1]) is use:
                    del shelf.ends[hashes[-1]]


def _is_crowded(shelf: _Shelf) -> bool:
    blocks, uses = _MOST_NAMED * len(shelf.turns) + _FEW_BLOCKS, _MOST_NAMED * len(shelf.ends) + _FEW_USES
    return shelf.named > blocks or len(shelf.uses) > uses


def _forget_renewed(shelf: _Shelf) -> None:
    """Drop from the uses the blocks that a later use names too."""
    turns = shelf.turns
    kept: deque[_Use] = deque()
    for use in shelf.uses:
        live = [key for key in use.hashes[: use.left] if turns.get(key) == use.turn]
        if live:
            kept.append(_Use(use.turn, use.at_s, live))
    shelf.uses, shelf.named = kept, sum(use.left for use in kept)
    shelf.ends = {use.hashes[-1]: use for use in kept}
