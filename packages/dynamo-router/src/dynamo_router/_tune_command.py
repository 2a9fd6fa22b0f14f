"""``dynamo-router tune``: options of a policy that suit a trace."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from dynamo_core.errors import ConfigurationError
from dynamo_core.settings import resolve_settings
from dynamo_router._lab_command import LabSettings, run_options, split_arguments, write_file
from dynamo_router._lab_stats import FIGURES
from dynamo_router._lab_trace import read_trace, scale_rate
from dynamo_router._lab_tune import SPACES, Candidate, Range, Search, Tuned

PROG = "dynamo-router tune TRACE"


class TuneSettings(LabSettings):
    """What is tuned for what, and how long the search is."""

    component: ClassVar[str] = "router_tune"

    policy: Annotated[str, Field(description="Policy whose options are searched")] = "ttft"
    vary: Annotated[
        list[str], Field(description="What may vary, as OPTION=LOW..HIGH; empty for what the policy's usual knobs are")
    ] = []  # noqa: RUF012 - pydantic copies defaults
    objective: Annotated[str, Field(description="Figure to improve: hit_rate, ttft_mean, ttft_p50, ttft_p90, ...")] = (
        "ttft_mean"
    )
    candidates: Annotated[int, Field(ge=2, le=10_000, description="Sets of options that compete")] = 27
    output: Annotated[
        str, Field(description="File to write the settings to, for --config; the defaults if nothing was better")
    ] = ""


def tune(argv: Sequence[str], write: Callable[[str], None]) -> int:
    """Run the command; returns its exit status.

    Raises:
        ConfigurationError: for a bad trace, flag, policy, range or figure.
    """
    path, flags = split_arguments(PROG, argv)
    settings = resolve_settings(PROG, (TuneSettings,), flags).get(TuneSettings)
    if settings.objective not in FIGURES:
        raise ConfigurationError(f"--objective {settings.objective!r} is none of {', '.join(FIGURES)}")
    space = [Range.parse(text) for text in settings.vary or _usual(settings.policy)]
    trace = scale_rate(read_trace(Path(path), block_size=settings.block_size, limit=settings.limit), settings.rate)
    search = Search(
        lambda options, requests: run_options(settings.policy, options, settings, requests),
        objective=settings.objective,
        space=space,
        candidates=settings.candidates,
        resamples=settings.resamples,
        seed=settings.seed,
        on_trial=_progress(),
    )
    found = search.run(trace)
    write(report(settings.policy, settings.objective, found))
    if settings.output:
        write_file("--output", settings.output, _file(settings.policy, found))
        write(f"wrote {settings.output}")
    return 0


def report(policy: str, objective: str, found: Tuned) -> str:
    """Return the ranking and the comparison as text."""
    names = sorted({name for candidate in found.ranking for name in candidate.options})
    width = max(16, *(len(name) for name in names)) if names else 16
    head = f"{objective:>16}" + "".join(f"{name:>{width + 2}}" for name in names)
    lines = [f"On the first half, {found.ranking[0].requests} requests:", head]
    lines += [_line(candidate, names, width) for candidate in found.ranking]
    change = found.change
    lines += [
        f"On the second half, {found.best.requests} requests that the search has not seen:",
        f"{found.default.value:>16.6g}  default options of {policy}",
        f"{found.best.value:>16.6g}  {_options(found.best)}",
        f"change {change.value:+.1%} [{change.low:+.1%}, {change.high:+.1%}]: "
        + ("better" if found.better else "not better than the default options for certain"),
    ]
    return "\n".join(lines)


def _line(candidate: Candidate, names: Sequence[str], width: int) -> str:
    cells = [candidate.options.get(name) for name in names]
    shown = "".join(f"{'default' if cell is None else format(cell, 'g'):>{width + 2}}" for cell in cells)
    return f"{candidate.value:>16.6g}{shown}"


def _options(candidate: Candidate) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in candidate.options.items()) or "the defaults won"


def _file(policy: str, found: Tuned) -> str:
    chosen = found.best if found.better else found.default
    change = found.change
    return (
        f"# Change on unseen requests: {change.value:+.1%} [{change.low:+.1%}, {change.high:+.1%}]\n"
        f"policy: {json.dumps(policy)}\npolicy_options: {json.dumps(chosen.options)}\n"
    )


def _usual(policy: str) -> Sequence[str]:
    usual = SPACES.get(policy)
    if usual is None:
        raise ConfigurationError(
            f"nothing is known to vary in policy {policy!r} (known: {', '.join(SPACES)}); give --vary OPTION=LOW..HIGH"
        )
    return usual


def _progress() -> Callable[[int, int], None] | None:
    if not sys.stderr.isatty():
        return None

    def show(number: int, total: int) -> None:
        filled = 30 * number // total
        sys.stderr.write(f"\r[{'#' * filled}{'.' * (30 - filled)}] replay {number} of {total}\x1b[K")
        if number == total:
            sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()

    return show
