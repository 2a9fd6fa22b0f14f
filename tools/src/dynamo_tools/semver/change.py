"""Levels, and one change of the public surface."""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass


class Level(enum.IntEnum):
    """The part of a version that a change needs."""

    NONE = 0
    PATCH = 1
    MINOR = 2
    MAJOR = 3

    def __str__(self) -> str:
        """Return the word."""
        return self.name.lower()


@dataclass(frozen=True, order=True)
class Change:
    """One difference.

    Attributes:
        subject: Dotted name, or kind and name of what changed.
        message: What happened to it, as a verb phrase.
        level: How big it is.
    """

    subject: str
    message: str
    level: Level

    @property
    def fingerprint(self) -> str:
        """What a waiver names; it covers this change of this thing and no other."""
        return hashlib.sha256(f"{self.subject}|{self.message}".encode()).hexdigest()[:12]

    def __str__(self) -> str:
        """Return the line that is shown."""
        return f"{self.level}: {self.subject} {self.message} [{self.fingerprint}]"
