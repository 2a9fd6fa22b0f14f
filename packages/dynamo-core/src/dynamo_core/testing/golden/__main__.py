"""Check the golden files; with ``--write`` add the missing ones first."""

from __future__ import annotations

import argparse
import sys

from dynamo_core.errors import BackendProtocolError
from dynamo_core.testing import golden
from dynamo_core.wire import CODECS


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m dynamo_core.testing.golden", description=golden.__doc__)
    parser.add_argument("--write", action="store_true", help="add files for schemas that have none")
    if parser.parse_args(argv).write:
        for schema in golden.write():
            print(f"added {schema}")  # noqa: T201 - the output of the command
    problems = [f"{schema} has no golden files; run with --write" for schema in golden.missing()]
    for schema in sorted(CODECS.keys() - set(golden.missing())):
        try:
            golden.check(schema)
        except BackendProtocolError as error:
            problems.append(error.message)
    for problem in problems:
        print(problem, file=sys.stderr)  # noqa: T201 - the output of the command
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
