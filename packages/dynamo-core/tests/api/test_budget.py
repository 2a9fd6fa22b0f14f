"""The package keeps to its line budget: logical lines of code, without docstrings and without the kit."""

import ast
import tokenize
from pathlib import Path

import dynamo_core

BUDGET_LINES = 3000
ROOT = Path(dynamo_core.__file__).parent


def logical_lines(path: Path) -> int:
    with path.open("rb") as file:
        lines = sum(token.type == tokenize.NEWLINE for token in tokenize.tokenize(file.readline))
    words = sum(
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for node in ast.walk(ast.parse(path.read_bytes()))
    )
    return lines - words


def test_package_keeps_to_its_budget() -> None:
    counted = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] != "testing"]
    assert sum(logical_lines(path) for path in counted) <= BUDGET_LINES


def test_files_stay_short() -> None:
    long = [path.name for path in ROOT.rglob("*.py") if len(path.read_text(encoding="utf-8").splitlines()) > 400]
    assert long == []
