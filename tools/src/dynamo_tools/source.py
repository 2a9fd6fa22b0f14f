"""Reading Python sources: syntax trees, lines of code, docstrings."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Function:
    """A function or method: its dotted name in the module, first line, and length in lines without decorators."""

    name: str
    line: int
    length: int


def parse(path: Path) -> ast.Module:
    """Parse a file.

    Raises:
        SyntaxError: if it is no Python.
    """
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def functions(tree: ast.Module) -> list[Function]:
    """Every function of a module, methods and nested ones included."""
    return list(_functions(tree, ""))


def code_lines(path: Path) -> int:
    """Logical lines of code: one for each statement however it is wrapped, none for docstrings and comments."""
    text = path.read_text(encoding="utf-8")
    statements = sum(token.type == tokenize.NEWLINE for token in tokenize.generate_tokens(io.StringIO(text).readline))
    words = sum(
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in ast.walk(ast.parse(text))
    )
    return statements - words


def is_empty(src: Path) -> bool:
    """Whether a package has no code beyond an ``__all__``: there is nothing for some gates to judge."""
    return sum(code_lines(path) for path in src.rglob("*.py")) <= 1


def python_blocks(path: Path) -> list[tuple[int, str]]:
    """Fenced ``python`` blocks of a Markdown file, each with the line its code starts on."""
    return fenced_blocks(path, ("python", "py"))


def fenced_blocks(path: Path, languages: tuple[str, ...]) -> list[tuple[int, str]]:
    """Fenced blocks of a Markdown file in one of the languages, each with the line its content starts on."""
    found: list[tuple[int, str]] = []
    language: str | None = None
    start, body = 0, list[str]()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith("```"):
            body.append(line)
        elif language is None:
            language, start, body = line[3:].strip(), number + 1, []
        else:
            if language in languages:
                found.append((start, "\n".join(body) + "\n"))
            language = None
    return found


def _functions(node: ast.AST, prefix: str) -> Iterator[Function]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FunctionNode):
            yield Function(prefix + child.name, child.lineno, (child.end_lineno or child.lineno) - child.lineno + 1)
        name = prefix + child.name + "." if isinstance(child, FunctionNode | ast.ClassDef) else prefix
        yield from _functions(child, name)
