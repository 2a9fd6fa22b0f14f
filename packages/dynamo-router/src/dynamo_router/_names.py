"""What one engine calls the blocks that it holds in one tier, where it does not call them by their sequence hashes."""

from __future__ import annotations

from collections.abc import Iterable


class EngineNames:
    """Engine hash -> sequence hash of every held block. A block may have several names and goes with its last."""

    __slots__ = ("_extra", "_of")

    def __init__(self, keys: Iterable[int] = ()) -> None:
        self._of: dict[int, int] = {key: key for key in keys}
        # Sequence hash -> names beyond the first.
        self._extra: dict[int, int] = {}

    def get(self, name: int) -> int | None:
        """Return the block of a name, or None."""
        return self._of.get(name)

    def items(self) -> dict[int, int]:
        """Return a copy of name -> sequence hash."""
        return dict(self._of)

    def add_new(self, names: list[int], keys: list[int]) -> bool:
        """Name blocks that have no name yet, if all the names are new; else change nothing and return False."""
        known = self._of
        if not known.keys().isdisjoint(names):
            return False
        before = len(known)
        known.update(zip(names, keys, strict=True))
        if len(known) - before == len(keys):
            return True
        for name in set(names):
            del known[name]
        return False

    def add(self, name: int, key: int, *, held: bool) -> int | None:
        """Name one block; returns the block that thereby lost its last name, if one did.

        Args:
            name: What the engine calls it.
            key: The block.
            held: Whether it has a name already.
        """
        old = self._of.get(name)
        if old == key:
            return None
        lost = None if old is None else self.remove(name)
        self._of[name] = key
        if held:
            self._extra[key] = self._extra.get(key, 0) + 1
        return lost

    def remove(self, name: int) -> int | None:
        """Forget a name; returns the block that thereby has none any more."""
        key = self._of.pop(name, None)
        if key is None:
            return None
        extra = self._extra.pop(key, 0)
        if extra > 1:
            self._extra[key] = extra - 1
        return None if extra else key

    def clear(self) -> None:
        """Forget all."""
        self._of.clear()
        self._extra.clear()
