"""Every path and command that an ``AGENTS.md`` names exists."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from dynamo_tools.finding import Finding
from dynamo_tools.source import fenced_blocks
from dynamo_tools.workspace import Workspace

GATE = "agents"
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")
_PATH = re.compile(r"\.?[\w@+*-][\w.@+*-]*(?:/[\w.@+*-]+)*/?")
_SUFFIXES = (".py", ".md", ".toml", ".yml", ".yaml", ".txt", ".json", ".lock", ".typed")
_PLACEHOLDER = re.compile(r"[<>{}…$]|(?<![A-Za-z])(?:X|NAME|GATE|PACKAGE)(?![A-Za-z])")
_UV_VALUE_FLAGS = {"--package", "--group", "--only-group", "--with", "--python", "--extra", "--directory", "--project"}
_SHELL = ("sh", "bash", "console", "shell", "")

CommandParser = Callable[[list[str]], str | None]
"""Returns what is wrong with the arguments of ``dyn``, or None."""


def check(workspace: Workspace, parse_dyn: CommandParser) -> Iterator[Finding]:
    """Report names in ``AGENTS.md`` files that do not exist."""
    names = _names(workspace)
    for path in workspace.files:
        if path.name == "AGENTS.md":
            for line, message in _file(workspace, path, names, parse_dyn):
                yield Finding(workspace.relative(path), line, GATE, message)


def command_problem(workspace: Workspace, text: str, parse_dyn: CommandParser) -> str | None:
    """What is wrong with one command line that a document or a workflow has, or None."""
    return _command(workspace, text, _names(workspace), parse_dyn)


def _names(workspace: Workspace) -> set[str]:
    names = {workspace.relative(path) for path in workspace.files}
    return names | {parent.as_posix() for name in names for parent in Path(name).parents}


def _file(workspace: Workspace, path: Path, names: set[str], parse_dyn: CommandParser) -> Iterator[tuple[int, str]]:
    scope = path.parent.relative_to(workspace.root).as_posix()
    for line, text in _snippets(path):
        if " " in text or text.startswith("uv "):
            problem = _command(workspace, text, names, parse_dyn)
        else:
            problem = _missing_path(text, names, scope)
        if problem:
            yield line, problem


def _snippets(path: Path) -> Iterator[tuple[int, str]]:
    """Inline code, link targets, and lines of shell blocks."""
    inside = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            inside = not inside
        elif not inside:
            yield from ((number, text.strip()) for text in _CODE.findall(line))
            yield from ((number, text) for text in _LINK.findall(line))
    for start, body in fenced_blocks(path, _SHELL):
        for offset, line in enumerate(body.splitlines()):
            command = line.partition(" #")[0].strip().removeprefix("$ ")
            if command and not command.startswith("#"):
                yield start + offset, command


def _missing_path(text: str, names: set[str], scope: str) -> str | None:
    """What is wrong with a word that looks like a path; None for any other word."""
    if not _PATH.fullmatch(text) or _PLACEHOLDER.search(text):
        return None
    tops = {name.partition("/")[0] for name in names}
    looks_like_path = text.endswith(("/", *_SUFFIXES)) or ("/" in text and text.partition("/")[0] in tops)
    wanted = text.rstrip("/")
    if not looks_like_path or _matches(wanted, names, scope):
        return None
    return f"names the path {text!r}, which does not exist"


def _matches(wanted: str, names: set[str], scope: str) -> bool:
    """Whether a file or folder below the scope, or of the root, ends with the words; ``*`` stands for any."""
    pattern = re.compile(r"(?:.*/)?" + re.escape(wanted).replace(r"\*", "[^/]*"))
    inside = "" if scope == "." else scope + "/"
    if any(name.startswith(inside) and pattern.fullmatch(name) for name in names):
        return True
    exact = re.compile(re.escape(wanted).replace(r"\*", "[^/]*"))
    return any(exact.fullmatch(name) for name in names)


def _command(workspace: Workspace, text: str, names: set[str], parse_dyn: CommandParser) -> str | None:
    try:
        words = shlex.split(text)
    except ValueError:
        return None
    if words[:2] == ["uv", "run"]:
        return _uv_run(workspace, words[2:], names, parse_dyn)
    if words[:1] == ["dyn"]:
        return _dyn(words[1:], parse_dyn)
    return None


def _uv_run(workspace: Workspace, words: list[str], names: set[str], parse_dyn: CommandParser) -> str | None:
    while words and words[0].startswith("-"):
        flag, words = words[0], words[1:]
        if flag in _UV_VALUE_FLAGS and words:
            value, words = words[0], words[1:]
            known = {package.name for package in workspace.members}
            if flag == "--package" and not _PLACEHOLDER.search(value) and value not in known:
                return f"names the package {value!r}, which does not exist"
    if not words:
        return None
    program, arguments = words[0], words[1:]
    if program == "dyn":
        return _dyn(arguments, parse_dyn)
    if not _is_command(program, workspace):
        return f"names the command {program!r}, which is not installed"
    problems = (_missing_path(word.partition("::")[0], names, ".") for word in arguments)
    return next((problem for problem in problems if problem), None)


def _dyn(words: list[str], parse_dyn: CommandParser) -> str | None:
    """Check the verb, its gates and flags; a placeholder stands for whatever fits."""
    pairs = zip(words, ["", *words], strict=False)
    problem = parse_dyn([word for word, before in pairs if not _is_open(word, before)])
    open_words = [word for word in words if _PLACEHOLDER.search(word)]
    excuses = ["are required", *(f"invalid choice: {word!r}" for word in open_words)]
    excused = bool(open_words and problem) and any(excuse in str(problem) for excuse in excuses)
    return None if excused else problem


def _is_open(word: str, before: str) -> bool:
    """Whether a word is a placeholder that may be left out: one that is no value of a flag."""
    return bool(_PLACEHOLDER.search(word)) and not before.startswith("-")


def _is_command(program: str, workspace: Workspace) -> bool:
    scripts = {name for package in workspace.members for name in package.config["project"].get("scripts", {})}
    beside = Path(sys.executable).parent / program
    return program in scripts or beside.exists() or shutil.which(program) is not None
