"""Rules of the repository, one module each; every gate is a function from a workspace to findings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dynamo_tools.finding import Finding
from dynamo_tools.gates import (
    contracts,
    core_budget,
    deps,
    exports,
    fragments,
    lengths,
    lock,
    ranges,
    ruff,
    siblings,
    surface,
    toplevel,
    types,
    words,
    workflows,
)
from dynamo_tools.workspace import Workspace

Check = Callable[[Workspace], Iterable[Finding]]


@dataclass(frozen=True)
class Gate:
    """A named rule.

    Attributes:
        name: What ``dyn check`` calls it.
        check: The rule.
        summary: One line for the help text.
    """

    name: str
    check: Check
    summary: str


GATES: tuple[Gate, ...] = (
    Gate("types", types.check, "pyright strict over the whole workspace"),
    Gate("contracts", contracts.check, "import contracts and layers"),
    Gate("deps", deps.check, "declared and imported dependencies agree"),
    Gate("surface", surface.check, "api/public.txt is up to date"),
    Gate("format", ruff.check_format, "ruff format"),
    Gate("lint", ruff.check_lint, "ruff check"),
    Gate("lengths", lengths.check, "files and functions are short"),
    Gate("siblings", siblings.check, "no component knows another"),
    Gate("exports", exports.check, "__all__ is sorted and complete"),
    Gate("core-budget", core_budget.check, "core stays small"),
    Gate("fragments", fragments.check, "changes have changelog fragments"),
    Gate("lock", lock.check, "uv.lock is up to date"),
    Gate("ranges", ranges.check, "requirements have the right bounds"),
    Gate("words", words.check, "files speak of the product"),
    Gate("workflows", workflows.check, "workflows are safe"),
    Gate("toplevel", toplevel.check, "the tree keeps its shape"),
)
"""Every gate but ``agents``, which needs the command's own parser; slow ones first, so that they start first."""
