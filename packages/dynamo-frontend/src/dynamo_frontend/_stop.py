"""Stop strings: found across token borders, with as little text held back as can be."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Watches one choice's text for stop strings.

    Text is held back only while it may be the beginning of a stop string, so never more than the longest one.

    Args:
        stops: Non-empty stop strings.
        include: Whether the stop string itself stays in the text.
    """

    __slots__ = ("_held", "_include", "_stops", "matched")

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Return the text that is now certain to be visible; after a match, nothing more."""
        if self.matched is not None or not text:
            return ""
        text = self._held + text
        hit = self._first_match(text)
        if hit is not None:
            place, self.matched = hit
            self._held = ""
            return text[: place + len(self.matched)] if self._include else text[:place]
        keep = self._suffix_to_hold(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return what was held back; the text has ended without a match."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str] | None:
        """Return the match that ends first, as a reader token by token would see it."""
        found = [(place + len(stop), place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if not found:
            return None
        _, place, stop = min(found)
        return place, stop

    def _suffix_to_hold(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
