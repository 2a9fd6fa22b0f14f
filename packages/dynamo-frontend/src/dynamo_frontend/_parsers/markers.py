"""Scanning for markers across piece borders."""

from __future__ import annotations


class MarkerScanner:
    """Cuts text at markers, holding back only what may be the beginning of one."""

    __slots__ = ("held",)

    def __init__(self) -> None:
        self.held = ""

    def scan(self, text: str, marker: str) -> tuple[str, bool]:
        """Return the text before the marker and whether the marker was found.

        With a marker found, ``held`` is the text after it; else ``held`` is the end that may begin one.
        """
        if not self.held and marker[0] not in text:
            return text, False
        text = self.held + text
        place = text.find(marker)
        if place >= 0:
            self.held = text[place + len(marker) :]
            return text[:place], True
        keep = partial_suffix(text, marker)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def take(self) -> str:
        """Return what is held back and forget it."""
        held, self.held = self.held, ""
        return held


def partial_suffix(text: str, marker: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``marker``."""
    for size in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:size]):
            return size
    return 0
