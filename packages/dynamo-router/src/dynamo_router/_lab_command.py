"""``dynamo-router replay``: policies on a trace, compared."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec
from pydantic import Field

from dynamo_core.errors import ConfigurationError
from dynamo_core.settings import DynamoSettings, resolve_settings
from dynamo_router._lab_replay import OpenLoop, Replay, ReplayedRequest
from dynamo_router._lab_report import page, table
from dynamo_router._lab_stats import Gate, summarize
from dynamo_router._lab_trace import MOONCAKE_BLOCK_SIZE, TraceRequest, read_trace, scale_rate
from dynamo_router._lab_worker import WorkerModel

PROG = "dynamo-router replay TRACE"


class LabSettings(DynamoSettings):
    """The modelled fleet, and the part of a trace that it serves."""

    component: ClassVar[str] = "router_lab"

    workers: Annotated[int, Field(ge=1, description="Modelled workers")] = 8
    rate: Annotated[float, Field(gt=0, description="Density of arrivals, 1 as recorded")] = 1.0
    limit: Annotated[int | None, Field(ge=1, description="Requests to read from the trace")] = None
    block_size: Annotated[int, Field(ge=1, description="Tokens a block, for traces without hashes")] = (
        MOONCAKE_BLOCK_SIZE
    )
    prefill_tokens_per_s: Annotated[float, Field(gt=0, description="Prefill pace of a worker")] = 8000.0
    decode_s: Annotated[float, Field(gt=0, description="Seconds a generated token")] = 0.025
    decode_slowdown: Annotated[float, Field(ge=0, description="Share by which each further request slows decode")] = 0.0
    prefill_slowdown: Annotated[float, Field(ge=0, description="Share by which each running request slows prefill")] = (
        0.0
    )
    kv_blocks: Annotated[int, Field(ge=1, description="Device blocks of a worker")] = 3000
    view_delay_s: Annotated[float, Field(ge=0, description="Seconds by which KV events reach the router late")] = 0.0
    resamples: Annotated[int, Field(ge=0, description="Bootstrap resamples for the intervals")] = 100
    seed: Annotated[int, Field(description="Seed of ties, draws and resamples")] = 0


class ReplaySettings(LabSettings):
    """The policies of a replay, and what it reports."""

    component: ClassVar[str] = "router_replay"

    policy: Annotated[
        list[str],
        Field(description="Policies, the first being the baseline; with options as NAME:OPTION=VALUE:OPTION=VALUE"),
    ] = ["ttft", "kv", "round-robin"]  # noqa: RUF012 - pydantic copies defaults
    fail_if: Annotated[
        list[str], Field(description="Exit 1 if a policy changes so against the first: 'ttft_p99 > +3%%'")
    ] = []  # noqa: RUF012 - pydantic copies defaults
    report_html: Annotated[str, Field(description="File to write an HTML report to")] = ""
    json_lines: Annotated[bool, Field(description="Print one JSON object a policy instead of the table")] = False


def replay(argv: Sequence[str], write: Callable[[str], None]) -> int:
    """Run the command; returns its exit status.

    Raises:
        ConfigurationError: for a bad trace, flag, policy or gate.
    """
    path, flags = split_arguments(PROG, argv)
    settings = resolve_settings(PROG, (ReplaySettings,), flags).get(ReplaySettings)
    gates = [Gate.parse(text) for text in settings.fail_if]
    trace = read_trace(Path(path), block_size=settings.block_size, limit=settings.limit)
    results = {
        spec: run_policy(spec, settings, scale_rate(trace, settings.rate), _progress(spec, len(trace)))
        for spec in settings.policy
    }
    summaries = {
        spec: summarize(found, resamples=settings.resamples, seed=settings.seed) for spec, found in results.items()
    }
    if settings.json_lines:
        for spec, figures in summaries.items():
            write(json.dumps({"policy": spec, "requests": len(trace), **msgspec.to_builtins(figures)}))
    else:
        write(table(summaries))
    if settings.report_html:
        title = f"{Path(path).name}: {len(trace)} requests on {settings.workers} workers"
        write_file("--report-html", settings.report_html, page(title, summaries, results))
    base = summaries[settings.policy[0]]
    failures = [gate.failure(spec, base, summaries[spec]) for gate in gates for spec in settings.policy[1:]]
    for failure in filter(None, failures):
        write(f"FAILED {failure}")
    return 1 if any(failures) else 0


def run_policy(
    spec: str,
    settings: LabSettings,
    trace: Sequence[TraceRequest],
    on_progress: Callable[[int], None] | None = None,
) -> list[ReplayedRequest]:
    """Replay a trace under one policy.

    Raises:
        ConfigurationError: for an unknown policy or option.
    """
    name, options = parse_policy(spec)
    return run_options(name, options, settings, trace, on_progress)


def run_options(
    name: str,
    options: Mapping[str, Any],
    settings: LabSettings,
    trace: Sequence[TraceRequest],
    on_progress: Callable[[int], None] | None = None,
) -> list[ReplayedRequest]:
    """Replay a trace under a policy with options.

    Raises:
        ConfigurationError: for an unknown policy or option.
    """
    model = WorkerModel(
        prefill_tokens_per_s=settings.prefill_tokens_per_s,
        decode_s=settings.decode_s,
        decode_slowdown=settings.decode_slowdown,
        prefill_slowdown=settings.prefill_slowdown,
        kv_blocks=settings.kv_blocks,
    )
    run = Replay(
        name,
        options,
        workers=settings.workers,
        model=model,
        block_size=settings.block_size,
        view_delay_s=settings.view_delay_s,
        seed=settings.seed,
    )
    return run.run(OpenLoop(trace), on_progress)


def write_file(flag: str, path: str, text: str) -> None:
    """Write a result that a flag asked for.

    Raises:
        ConfigurationError: if the file cannot be written.
    """
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{flag} {path} cannot be written: {error.strerror or error}") from error


def split_arguments(prog: str, argv: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Part the trace, which comes first, from the flags.

    Raises:
        ConfigurationError: if there is no trace, and help is not what is asked for.
    """
    if argv and not argv[0].startswith("-"):
        return argv[0], argv[1:]
    if "--help" not in argv and "-h" not in argv:
        raise ConfigurationError(f"{prog}: give the trace file first; see {prog.removesuffix(' TRACE')} --help")
    return "", argv


def parse_policy(spec: str) -> tuple[str, Mapping[str, Any]]:
    """Read ``NAME:OPTION=VALUE:...``.

    Raises:
        ConfigurationError: if an option has no value.
    """
    name, *pairs = spec.split(":")
    options: dict[str, Any] = {}
    for pair in pairs:
        option, equals, text = pair.partition("=")
        if not equals:
            raise ConfigurationError(f"--policy {spec!r}: option {pair!r} needs a value; write {pair}=VALUE")
        try:
            options[option] = json.loads(text)
        except json.JSONDecodeError:
            options[option] = text
    return name, options


def _progress(spec: str, total: int) -> Callable[[int], None] | None:
    if not sys.stderr.isatty():
        return None

    def show(done: int) -> None:
        filled = 30 * done // total
        sys.stderr.write(f"\r{spec:<24} [{'#' * filled}{'.' * (30 - filled)}] {done}/{total}\x1b[K")
        if done + 256 > total:
            sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()

    return show
