"""The product's commands in shell blocks: each must be one that the command itself accepts.

A command is tried with ``--print-config``, which reads every option and starts nothing. One that has no such flag is
held to the flags that its help names.
"""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dynamo_tools.process import clean_environment, run, tool
from dynamo_tools.source import fenced_blocks
from dynamo_tools.workspace import Workspace

_SHELL = ("sh", "bash", "console", "shell")
_ASSIGNMENT = re.compile(r"[A-Z_][A-Z0-9_]*=.*")
_FLAG = re.compile(r"--[a-z][a-z0-9-]*")
_ENDS_A_COMMAND = ("|", "||", "&&", "&", ";", ">", ">>", "2>", "<")
_NO_SUCH_FLAG = "--print-config"


@dataclass(frozen=True)
class Documented:
    """A command in a document: where, and its words."""

    path: Path
    line: int
    words: tuple[str, ...]


def commands(workspace: Workspace, path: Path) -> list[Documented]:
    """The commands of a Markdown file that run a program of a published package."""
    programs = {name for package in workspace.packages for name in package.config["project"].get("scripts", {})}
    return [
        Documented(path, line, words)
        for start, body in fenced_blocks(path, _SHELL)
        for line, text in _logical_lines(start, body)
        for words in _simple_commands(text)
        if words and words[0] in programs
    ]


def problems(found: list[Documented], jobs: int = 2) -> Iterator[tuple[Documented, str]]:
    """What each command that is not accepted is told."""
    with ThreadPoolExecutor(jobs) as pool:
        for command, problem in zip(found, pool.map(_problem, found), strict=True):
            if problem:
                yield command, problem


def _logical_lines(start: int, body: str) -> Iterator[tuple[int, str]]:
    """Lines of a block with their continuations: what follows a backslash, or closes a quote."""
    pending, first = "", start
    for number, line in enumerate(body.splitlines(), start):
        first = number if not pending else first
        pending += line.removeprefix("$ ") if not pending else line
        if pending.endswith("\\"):
            pending = pending.removesuffix("\\")
        elif _is_whole(pending):
            yield first, pending
            pending = ""
        else:
            pending += "\n"


def _is_whole(text: str) -> bool:
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return False
    return True


def _simple_commands(text: str) -> Iterator[tuple[str, ...]]:
    lexer = shlex.shlex(text, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word in _ENDS_A_COMMAND:
            yield tuple(_bare(words))
            words = []
        else:
            words.append(word)


def _bare(words: list[str]) -> list[str]:
    """A command without variables before it and without ``uv run``."""
    while words and _ASSIGNMENT.fullmatch(words[0]):
        words = words[1:]
    return words[2:] if words[:2] == ["uv", "run"] else words


def _problem(command: Documented) -> str | None:
    program, *arguments = command.words
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        argv = [tool(program), *_without_file(arguments), "--print-config"]
        result = run(argv, folder, timeout_s=60, env=clean_environment())
        if result.returncode == 0:
            return None
        told = result.tail(1)
        if _NO_SUCH_FLAG not in told and "takes:" not in told:
            return told
        known = _flags_in_help(program, arguments, folder)
    unknown = sorted({flag for word in arguments for flag in _FLAG.findall(word)[:1]} - known)
    return f"{program} has no {', '.join(unknown)}" if unknown else None


def _without_file(arguments: list[str]) -> list[str]:
    """Arguments without a configuration file, which is the reader's own."""
    pairs = zip(arguments, ["", *arguments], strict=False)
    return [word for word, before in pairs if "--config" not in (word, before)]


def _flags_in_help(program: str, arguments: list[str], folder: Path) -> set[str]:
    """Flags that the help of a command names, of its subcommand, and of that one's."""
    first_flag = next((at for at, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    found: set[str] = set()
    for depth in range(min(first_flag, 2) + 1):
        argv = [tool(program), *arguments[:depth], "--help"]
        found |= set(_FLAG.findall(run(argv, folder, timeout_s=60, env=clean_environment()).text))
    return found
