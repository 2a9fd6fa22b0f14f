"""Product files speak of the product: no paths of a machine, no package hosts, no notes left for later."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from dynamo_tools.finding import Finding
from dynamo_tools.workspace import Workspace

GATE = "words"
# Square brackets keep these patterns from matching themselves.
_LATER = r"TO[D]O|FIX[M]E|XX[X]|HAC[K]"
_HOSTS = r"py[p]i\.org|python[h]osted\.org|npm[j]s\.org|index[-]url"
_RULES = (
    (re.compile(r"(?<![\w.~}/-])/(?:work|home|root|Users|mnt)/[\w.][\w./-]*"), "names a path of one machine"),
    (re.compile(r"(?<![\w/])(?:\.\./)+shared/\w*"), "names a path outside the repository"),
    (re.compile(rf"\b(?:[\w-]+\.)*(?:{_HOSTS})\b"), "names a package host"),
    (re.compile(rf"\b(?:{_LATER})\b"), "leaves a note for later; do it or describe the present"),
    (re.compile(r"\bNot[I]mplementedError\b"), "raises on a missing implementation; write it"),
)
_LOCK_HOST = re.compile(r"py[p]i\.org|files\.python[h]osted\.org")
_URL = re.compile(r"https?://([^/\"\s]+)")
_TEXT = {".py", ".md", ".toml", ".yml", ".yaml", ".json", ".txt", ".sh", ".cfg", ".ini", ".jinja", ""}
_LARGE_BYTES = 1_000_000


def check(workspace: Workspace) -> Iterator[Finding]:
    """Report forbidden words with the word itself."""
    for path in workspace.files:
        if path.name == "uv.lock":
            yield from _lock(workspace, path)
        elif path.suffix in _TEXT and path.name != "LICENSE" and path.stat().st_size < _LARGE_BYTES:
            yield from _file(workspace, path)


def _file(workspace: Workspace, path: Path) -> Iterator[Finding]:
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        for pattern, message in _RULES:
            found = pattern.search(line)
            if found:
                yield Finding(workspace.relative(path), number, GATE, f"{found.group()!r} {message}")


def _lock(workspace: Workspace, path: Path) -> Iterator[Finding]:
    """Package URLs of the lock must be the public index's, or a stranger cannot install it."""
    seen: set[str] = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        for host in _URL.findall(line):
            if host not in seen and not _LOCK_HOST.fullmatch(host):
                seen.add(host)
                yield Finding(
                    workspace.relative(path), number, GATE, f"{host!r} is no public package index; lock again"
                )
