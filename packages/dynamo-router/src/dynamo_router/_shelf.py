"""Blocks of one worker in one tier, with proof of whether every held block's parent is held too.

A lookup may bisect only where prefixes are closed. Keeping a child count for every block would double the memory, so
the count is kept only where it differs from the usual one: a held block has one held child unless ``_forks`` says
otherwise (leaves and branches), and an absent block has none unless ``_ghosts`` counts them. The shelf is closed
exactly when ``_ghosts`` is empty.
"""

from __future__ import annotations

from collections.abc import KeysView
from typing import TypeVar

T = TypeVar("T")

_ABSENT = object()
# An integer of 60 bits takes 32 bytes, one of 64 bits 48. Names only have to differ within one shelf; two that do not
# cost the older block, as if the engine had used its name again.
NAME_BITS = (1 << 60) - 1


class Shelf:
    """Sequence hashes held by one (worker, dp rank) in one tier, each with its parent."""

    __slots__ = ("_extra_names", "_forks", "_ghosts", "_names", "_parents")

    def __init__(self) -> None:
        self._parents: dict[int, int | None] = {}
        self._forks: dict[int, int] = {}
        self._ghosts: dict[int, int] = {}
        # Engine hash -> sequence hash; None while the engine names blocks by their sequence hashes.
        self._names: dict[int, int] | None = None
        # Sequence hash -> engine names beyond the first.
        self._extra_names: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._parents)

    def __contains__(self, sequence_hash: int) -> bool:
        return sequence_hash in self._parents

    @property
    def closed(self) -> bool:
        """Whether the parent of every held block is held."""
        return not self._ghosts

    def hashes(self) -> KeysView[int]:
        """Return the sequence hashes that are held."""
        return self._parents.keys()

    def parents(self) -> dict[int, int | None]:
        """Return a copy of held sequence hash -> parent."""
        return dict(self._parents)

    @property
    def uses_names(self) -> bool:
        """Whether engine hashes are kept apart from sequence hashes."""
        return self._names is not None

    def names(self) -> dict[int, int]:
        """Return a copy of engine hash -> sequence hash."""
        return dict(self._names) if self._names is not None else {key: key for key in self._parents}

    def resolve(self, engine_hash: int) -> int | None:
        """Return the sequence hash of a held block by its engine hash, or None."""
        if self._names is not None:
            return self._names.get(engine_hash & NAME_BITS)
        return engine_hash if engine_hash in self._parents else None

    def use_names(self) -> None:
        """Keep engine hashes apart from sequence hashes from here on."""
        if self._names is None:
            self._names = {key & NAME_BITS: key for key in self._parents}

    def leading(self, keys: list[int], engine_hashes: list[int]) -> int:
        """Return how many leading blocks are held already, under these very names."""
        parents, names = self._parents, self._names
        if keys[0] not in parents:
            return 0
        for position, key in enumerate(keys):
            if key not in parents or (names is not None and names.get(engine_hashes[position] & NAME_BITS) != key):
                return position
        return len(keys)

    def add_chain(self, parent: int | None, keys: list[int], engine_hashes: list[int], *, fresh: bool = False) -> bool:
        """Hold a chain of blocks if all its hashes are new here; else change nothing and return False.

        Args:
            parent: What the first one continues.
            keys: Sequence hashes.
            engine_hashes: What the engine calls them.
            fresh: Whether it is known that none of them is held.
        """
        if self._ghosts:
            return False
        names = [name & NAME_BITS for name in engine_hashes] if self._names is not None else []
        if self._names is not None and not _add_new(self._names, names, keys):
            return False
        if not _add_new(self._parents, keys, [parent, *keys[:-1]], fresh=fresh):
            if self._names is not None:
                for name in names:
                    del self._names[name]
            return False
        self._link(parent)
        self._forks[keys[-1]] = 0
        return True

    def add(self, key: int, parent: int | None, engine_hash: int) -> tuple[bool, int | None]:
        """Hold one block under one name.

        Returns:
            Whether the block is new here, and the sequence hash that lost its last name because the engine reused it.
        """
        lost = None
        if self._names is not None:
            name = engine_hash & NAME_BITS
            old = self._names.get(name)
            if old is not None and old != key:
                lost = self.remove(name)
            if old != key:
                self._names[name] = key
                if key in self._parents:
                    self._extra_names[key] = self._extra_names.get(key, 0) + 1
        if key in self._parents:
            return False, lost
        self._link(parent)
        children = self._ghosts.pop(key, 0)
        if children != 1:
            self._forks[key] = children
        self._parents[key] = parent
        return True, lost

    def remove(self, engine_hash: int) -> int | None:
        """Let go of one name; return the sequence hash if with it the block is gone, else None."""
        key = engine_hash
        if self._names is not None:
            found = self._names.pop(engine_hash & NAME_BITS, None)
            if found is None or self._drop_extra(found):
                return None
            key = found
        return key if self._remove_block(key) else None

    def clear(self) -> None:
        """Hold nothing."""
        for state in (self._parents, self._forks, self._ghosts, self._extra_names):
            state.clear()
        if self._names is not None:
            self._names.clear()

    def problems(self) -> list[str]:
        """Return every broken invariant in words; empty if there is none."""
        counts: dict[int, int] = {}
        for parent in self._parents.values():
            if parent is not None:
                counts[parent] = counts.get(parent, 0) + 1
        found = [
            f"block {key:x} has {counts.get(key, 0)} children, not {self._forks.get(key, 1)}"
            for key in self._parents
            if counts.get(key, 0) != self._forks.get(key, 1)
        ]
        ghosts = {key: count for key, count in counts.items() if key not in self._parents}
        if ghosts != self._ghosts:
            found.append(f"absent parents {len(ghosts)} differ from those counted {len(self._ghosts)}")
        if stray := self._forks.keys() - self._parents.keys():
            found.append(f"{len(stray)} fork counts belong to no block")
        if self._names is not None and set(self._names.values()) != set(self._parents):
            found.append("engine names and held blocks differ")
        return found

    def _remove_block(self, key: int) -> bool:
        parent = self._parents.pop(key, _ABSENT)
        if parent is _ABSENT:
            return False
        children = self._forks.pop(key, 1)
        if children:
            self._ghosts[key] = children
        if isinstance(parent, int):
            self._count(parent, -1)
        return True

    def _drop_extra(self, key: int) -> bool:
        extra = self._extra_names.pop(key, 0)
        if extra > 1:
            self._extra_names[key] = extra - 1
        return extra > 0

    def _link(self, parent: int | None) -> None:
        if parent is not None:
            self._count(parent, 1)

    def _count(self, parent: int, step: int) -> None:
        held = parent in self._parents
        table, usual = (self._forks, 1) if held else (self._ghosts, 0)
        children = table.get(parent, usual) + step
        if children == usual:
            table.pop(parent, None)
        else:
            table[parent] = children


def _add_new(table: dict[int, T], keys: list[int], values: list[T], *, fresh: bool = False) -> bool:
    """Add keys if all are new and different; else leave the table as it was and return False."""
    if not fresh and not table.keys().isdisjoint(keys):
        return False
    before = len(table)
    table.update(zip(keys, values, strict=True))
    if len(table) - before == len(keys):
        return True
    for key in set(keys):
        del table[key]
    return False
