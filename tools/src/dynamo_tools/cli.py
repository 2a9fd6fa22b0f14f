"""The command ``dyn``."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from dynamo_tools.verbs import (
    affected,
    bench,
    check,
    compat,
    docs,
    fragments,
    imports,
    isolate,
    readme,
    release,
    semver,
    slow,
    stranger,
    surface,
    test,
    wheels,
)
from dynamo_tools.workspace import Workspace, find_root


class Verb(Protocol):
    """A module of ``verbs``."""

    @property
    def NAME(self) -> str:  # noqa: N802 - a constant of the module
        """What is typed after ``dyn``."""
        ...

    @property
    def SUMMARY(self) -> str:  # noqa: N802 - a constant of the module
        """One line for the help text."""
        ...

    def add(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        ...

    def main(self, workspace: Workspace, arguments: argparse.Namespace) -> int:
        """Run; return the exit status."""
        ...


VERBS: tuple[Verb, ...] = (
    check,
    test,
    affected,
    isolate,
    wheels,
    imports,
    docs,
    readme,
    surface,
    semver,
    fragments,
    release,
    compat,
    stranger,
    slow,
    bench,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return its exit status, 2 for a wrong command."""
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.main(Workspace(find_root(Path.cwd())), arguments))
    except LookupError as error:
        print(f"dyn {arguments.verb}: {error.args[0]}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs."""
    parser = argparse.ArgumentParser(prog="dyn", description="Gates, tests and benchmarks of the workspace.")
    commands = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        command = commands.add_parser(verb.NAME, help=verb.SUMMARY, description=verb.SUMMARY, allow_abbrev=False)
        verb.add(command)
        command.set_defaults(main=verb.main)
    return parser


def explain_arguments(words: list[str]) -> str | None:
    """What is wrong with a ``dyn`` command line as a document writes it, or None."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            build_parser().parse_args(words)
        except SystemExit as error:
            if error.code:
                return f"names {' '.join(['dyn', *words])!r}: {errors.getvalue().strip().splitlines()[-1]}"
    return None
