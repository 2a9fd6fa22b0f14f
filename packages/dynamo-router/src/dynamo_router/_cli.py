"""The ``dynamo-router`` command."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import structlog

from dynamo_core.errors import ConfigurationError, DynamoError

USAGE = """usage: dynamo-router COMMAND ...

  replay TRACE   run policies on a recorded trace and compare them
  tune TRACE     search a policy's options for a trace
  serve          an HTTP service that selects workers
  index          an HTTP service that only says who holds which prefix
  explain ID     show why a running service took a decision

See dynamo-router COMMAND --help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 for a failed gate or answer, 2 for wrong usage."""
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or given[0] in ("-h", "--help"):
        _write(USAGE)
        return 0 if given else 2
    try:
        return _run(given[0], given[1:])
    except ConfigurationError as error:
        sys.stderr.write(f"dynamo-router: {error.message}\n")
        return 2
    except DynamoError as error:
        sys.stderr.write(f"dynamo-router: {error.message}\n")
        return 1


def run() -> None:
    """Run the command as a process: logs go to stderr, so that what is printed can be piped."""
    structlog.configure(  # noqa: TID251 - the command is an entry point, which is who configures logging
        logger_factory=structlog.PrintLoggerFactory(sys.stderr)
    )
    try:
        status = main()
    except BrokenPipeError:
        # Whoever read the output has enough. What is still buffered must not fail once more at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)


def _run(command: str, argv: Sequence[str]) -> int:
    if command == "replay":
        from dynamo_router._lab_command import replay

        return replay(argv, _write)
    if command == "tune":
        from dynamo_router._tune_command import tune

        return tune(argv, _write)
    if command == "serve":
        from dynamo_router._serve import serve

        return serve(argv, _write)
    if command == "index":
        from dynamo_router._serve import serve_index

        return serve_index(argv, _write)
    if command == "explain":
        from dynamo_router._explain import explain

        return explain(argv, _write)
    raise ConfigurationError(f"no command {command!r}; commands are replay, tune, serve, index and explain")


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
