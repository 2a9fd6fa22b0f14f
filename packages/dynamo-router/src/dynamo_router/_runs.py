"""Blocks of one tier as runs: consecutive blocks of a sequence that the very same workers hold.

A dictionary finds a block's run, and the run says who holds it. Caches grow and shrink by stretches of a sequence, so
one run serves many blocks: storing one more block costs one entry of the dictionary, and a look-up compares a prompt
with whole runs, byte by byte, instead of blocks. Runs are cut where their holders begin to differ and joined where they
agree again.

A block's key identifies everything before it, so a prompt that has the key at a place of a run has all keys of the run
before that place. Whoever lacks a block is not in its run: prefixes with holes need no special care.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat

from dynamo_core.tokens import HASH_BYTES, pack_hashes, unpack_hashes

MOST_BLOCKS = 512
"""Blocks of the longest run, so that cutting one or going through it is never slow."""

Packed = bytes | bytearray


class Run:
    """Consecutive blocks of one sequence.

    Attributes:
        number: Its name in the table.
        keys: Sequence hashes, packed, first block first.
        parent: What the first one continues; None at the start of a sequence.
        holders: Slots that hold all of them, as a bit set.
        after: The run that probably goes on where this one ends; may be out of date.
    """

    __slots__ = ("after", "holders", "keys", "number", "parent")

    def __init__(
        self, number: int, keys: bytearray, parent: int | None, holders: int, after: Run | None = None
    ) -> None:
        self.number = number
        self.keys = keys
        self.parent = parent
        self.holders = holders
        self.after = after

    def __len__(self) -> int:
        return len(self.keys) // HASH_BYTES

    @property
    def last(self) -> int:
        """Sequence hash of the last block."""
        return int.from_bytes(self.keys[-HASH_BYTES:], "little")

    def place(self, key: Packed) -> int:
        """Return where a block of this run is."""
        keys = self.keys
        if keys.startswith(key):
            return 0
        if keys.endswith(key):
            return len(self) - 1
        at = keys.index(key)
        while at % HASH_BYTES:
            at = keys.index(key, at + 1)
        return at // HASH_BYTES


class RunTable:
    """The runs of one tier. Not thread-safe."""

    __slots__ = ("_made", "_of", "_runs")

    def __init__(self) -> None:
        # Block -> number of its run. A dictionary of plain integers is nothing to Python's garbage collector, which
        # would visit millions of references to runs, and stop the process for as long.
        self._of: dict[int, int] = {}
        # In the order of their making, so that a snapshot of the same history is the same.
        self._runs: dict[int, Run] = {}
        self._made = 0

    def __len__(self) -> int:
        """Return the number of distinct blocks."""
        return len(self._of)

    # -- questions ---------------------------------------------------------------------------------------------------

    def holds(self, bit: int, key: int) -> bool:
        """Whether a slot, given as a bit set of one, holds a block."""
        number = self._of.get(key)
        return number is not None and bool(self._runs[number].holders & bit)

    def holds_any(self, bit: int, keys: list[int]) -> bool:
        """Whether a slot holds any of some blocks."""
        return not self._of.keys().isdisjoint(keys) and any(self.holds(bit, key) for key in keys)

    def held_by(self, bit: int) -> Iterator[Run]:
        """Iterate over the runs that a slot holds. The table must not change meanwhile."""
        return (run for run in self._runs.values() if run.holders & bit)

    def stretch(self, hashes: Sequence[int], packed: Packed, depth: int) -> tuple[int, int]:
        """Return who holds a prompt's block at a depth, and for how many blocks from there on that stays so.

        Args:
            hashes: The prompt's blocks.
            packed: The same, packed.
            depth: Which block.
        """
        number = self._of.get(hashes[depth])
        if number is None:
            return 0, 1
        run = self._runs[number]
        start = run.place(packed[depth * HASH_BYTES : (depth + 1) * HASH_BYTES])
        return run.holders, _common(run.keys, start, packed, depth)

    def depths(self, hashes: Sequence[int], packed: Packed, among: int) -> list[tuple[int, int]]:
        """Return ``(leading blocks held, slots)`` for each distinct depth above zero, each slot once.

        Args:
            hashes: The prompt's blocks. Only the first of each run is touched: pass a view rather than a list.
            packed: The same, packed.
            among: Slots to consider.
        """
        found: list[tuple[int, int]] = []
        depth, alive, blocks = 0, among, len(hashes)
        while depth < blocks:
            holders, length = self.stretch(hashes, packed, depth)
            held = holders & alive
            if held != alive:
                if depth:
                    found.append((depth, alive & ~held))
                if not held:
                    return found
                alive = held
            depth += length
        if depth:
            found.append((depth, alive))
        return found

    def problems(self) -> list[str]:
        """Return every broken invariant in words; empty if there is none."""
        found = [f"run of {len(run)} blocks has no holders" for run in self._runs.values() if not run.holders]
        found += [f"a run has {len(run)} blocks" for run in self._runs.values() if not 0 < len(run) <= MOST_BLOCKS]
        found += [
            f"run {run.number} is filed as {number}" for number, run in self._runs.items() if run.number != number
        ]
        expected = {key: run.number for run in self._runs.values() for key in unpack_hashes(bytes(run.keys))}
        if expected != self._of:
            found.append("runs and the table of blocks differ")
        if sum(map(len, self._runs.values())) != len(self._of):
            found.append("a block is in two runs")
        return found

    # -- changes -----------------------------------------------------------------------------------------------------

    def add(self, bit: int, parent: int | None, keys: list[int], packed: Packed) -> int:
        """Let a slot hold a chain of blocks; returns how many of them it did not hold before.

        Args:
            bit: The slot, as a bit set of one.
            parent: What the first one continues.
            keys: Sequence hashes, first block first; at least one.
            packed: The same, packed.
        """
        if len(keys) <= MOST_BLOCKS:
            return self._add_part(bit, parent, keys, packed)
        added = 0
        for start in range(0, len(keys), MOST_BLOCKS):
            stop = start + MOST_BLOCKS
            part = keys[start:stop]
            added += self._add_part(bit, parent, part, packed[start * HASH_BYTES : stop * HASH_BYTES])
            parent = part[-1]
        return added

    def remove(self, bit: int, keys: Sequence[int], packed: Packed) -> int:
        """Let a slot hold some blocks no more, in any order; returns how many of them it held."""
        of = self._of
        gone = place = 0
        while place < len(keys):
            number = of.get(keys[place])
            if number is None or not self._runs[number].holders & bit:
                place += 1
                continue
            run = self._runs[number]
            start = run.place(packed[place * HASH_BYTES : (place + 1) * HASH_BYTES])
            length = _common(run.keys, start, packed, place)
            if length == 1:
                # Caches are emptied from the end of a sequence.
                length = _common_backwards(run.keys, start, packed, place)
                start -= length - 1
            self._drop(bit, run, start, start + length)
            gone += length
            place += length
        return gone

    def clear(self, bit: int) -> None:
        """Let a slot hold nothing."""
        for run in list(self.held_by(bit)):
            self._drop(bit, run, 0, len(run))

    # -- internals ---------------------------------------------------------------------------------------------------

    def _add_part(self, bit: int, parent: int | None, keys: list[int], packed: Packed) -> int:
        of = self._of
        if of.keys().isdisjoint(keys):
            return self._append(bit, parent, keys, packed)
        added = place = 0
        while place < len(keys):
            number = of.get(keys[place])
            if number is None:
                stop = place + 1
                while stop < len(keys) and keys[stop] not in of:
                    stop += 1
                part = packed[place * HASH_BYTES : stop * HASH_BYTES]
                added += self._append(bit, parent, keys[place:stop], part)
            else:
                run = self._runs[number]
                start = run.place(packed[place * HASH_BYTES : (place + 1) * HASH_BYTES])
                stop = place + _common(run.keys, start, packed, place)
                if not run.holders & bit:
                    run = self._isolate(run, start, start + stop - place)
                    run.holders |= bit
                    self._join(run)
                    added += stop - place
            place = stop
            parent = keys[place - 1]
        return added

    def _append(self, bit: int, parent: int | None, keys: list[int], packed: Packed) -> int:
        """Enter blocks that nobody holds, behind the parent's run where that is the slot's alone."""
        of = self._of
        run = before = self._ending_in(parent)
        if run is None or run.holders != bit or len(run) + len(keys) > MOST_BLOCKS:
            run = self._make(bytearray(), parent, bit)
            if before is not None:
                before.after = run
        size = len(of)
        of.update(zip(keys, repeat(run.number)))
        added = len(of) - size
        # A broken engine may name a block twice.
        run.keys += packed if added == len(keys) else pack_hashes(dict.fromkeys(keys))
        return added

    def _ending_in(self, key: int | None) -> Run | None:
        """Return the run whose last block this is, if it is one's."""
        number = None if key is None else self._of.get(key)
        if number is None:
            return None
        run = self._runs[number]
        return run if run.last == key else None

    def _make(self, keys: bytearray, parent: int | None, holders: int, after: Run | None = None) -> Run:
        self._made += 1
        run = self._runs[self._made] = Run(self._made, keys, parent, holders, after)
        return run

    def _isolate(self, run: Run, start: int, stop: int) -> Run:
        """Cut a run so that some of its blocks are one of their own; returns that one."""
        if stop < len(run):
            run = self._split(run, stop)[0]
        return self._split(run, start)[1] if start else run

    def _split(self, run: Run, at: int) -> tuple[Run, Run]:
        """Cut a run in two. The longer part stays the object that it was, so that fewer blocks change theirs."""
        keys, cut = run.keys, at * HASH_BYTES
        if at * 2 < len(run):
            other = self._make(keys[:cut], run.parent, run.holders, run)
            del keys[:cut]
            run.parent = other.last
            parts = other, run
        else:
            other = self._make(keys[cut:], None, run.holders, run.after)
            del keys[cut:]
            other.parent = run.last
            run.after = other
            parts = run, other
        self._point(other.keys, other)
        return parts

    def _join(self, run: Run) -> None:
        """Join a run with its neighbours if they have the same holders."""
        before = self._ending_in(run.parent)
        if before is not None and _fit(before, run):
            before.keys += run.keys
            before.after = run.after
            self._point(run.keys, before)
            self._discard(run)
            run, before = before, None
        after = run.after
        if after is not None and after.number in self._runs and after.parent == run.last and _fit(run, after):
            after.keys[:0] = run.keys
            after.parent = run.parent
            self._point(run.keys, after)
            self._discard(run)
            if before is not None and before.after is run:
                before.after = after

    def _point(self, keys: Packed, run: Run) -> None:
        self._of.update(zip(unpack_hashes(bytes(keys)), repeat(run.number)))

    def _discard(self, run: Run) -> None:
        del self._runs[run.number]
        # Others may still name it as what comes after them.
        run.after = None

    def _drop(self, bit: int, run: Run, start: int, stop: int) -> None:
        """Take a slot off some blocks of a run."""
        if run.holders != bit:
            run = self._isolate(run, start, stop)
            run.holders &= ~bit
            self._join(run)
            return
        if start and stop < len(run):
            run = self._split(run, stop)[0]
        for key in unpack_hashes(bytes(run.keys[start * HASH_BYTES : stop * HASH_BYTES])):
            del self._of[key]
        if stop - start == len(run):
            self._discard(run)
        elif start:
            del run.keys[start * HASH_BYTES :]
        else:
            run.parent = int.from_bytes(run.keys[(stop - 1) * HASH_BYTES : stop * HASH_BYTES], "little")
            del run.keys[: stop * HASH_BYTES]


def _fit(first: Run, second: Run) -> bool:
    return first is not second and first.holders == second.holders and len(first) + len(second) <= MOST_BLOCKS


def _common(keys: Packed, start: int, others: Packed, place: int) -> int:
    """Return how many blocks are the same in both from a place in each on; the first ones are."""
    here, there = start * HASH_BYTES, place * HASH_BYTES
    high = min(len(keys) - here, len(others) - there) // HASH_BYTES
    size = high * HASH_BYTES
    if keys[here : here + size] == others[there : there + size]:
        return high
    low = 1
    while high - low > 1:
        middle = (low + high) >> 1
        size = middle * HASH_BYTES
        if keys[here : here + size] == others[there : there + size]:
            low = middle
        else:
            high = middle
    return low


def _common_backwards(keys: Packed, start: int, others: Packed, place: int) -> int:
    """Return how many blocks are the same, going back from a place in the first and on from one in the second."""
    most = min(start + 1, len(others) // HASH_BYTES - place)
    part = unpack_hashes(bytes(keys[(start + 1 - most) * HASH_BYTES : (start + 1) * HASH_BYTES]))
    return _common(pack_hashes(part[::-1]), 0, others, place)
