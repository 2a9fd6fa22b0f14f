"""What a gate reports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, order=True)
class Finding:
    """One line of a gate's report.

    Attributes:
        path: File, relative to the workspace's root.
        line: Line number from 1.
        gate: Name of the gate.
        message: What is wrong, and the remedy.
        fails: False for a note, which is shown and does not fail the gate.
    """

    path: str
    line: int
    gate: str
    message: str
    fails: bool = True

    def __str__(self) -> str:
        """Return the line that is printed."""
        note = "" if self.fails else "note: "
        return f"{self.path}:{self.line}: {self.gate}: {note}{self.message}"


def findings_at(root: Path, gate: str, path: Path, found: list[tuple[int, str]]) -> list[Finding]:
    """Turn (line, message) pairs of one file into findings."""
    name = path.relative_to(root).as_posix()
    return [Finding(name, line, gate, message) for line, message in found]
